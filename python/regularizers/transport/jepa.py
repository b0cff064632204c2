"""Losses of joint-embedding predictive training: invariance, and its mix with a regularizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regularizers._shared.checks import check_floating, check_not_negative, check_probability
from regularizers.ops._operator import loss_dtype
from regularizers.transport.sketching import as_views

Regularizer = Callable[[Tensor], Tensor]


def invariance_loss(z: Tensor, *, num_global: int | None = None) -> Tensor:
    r"""Pull all views of a sample to the mean of its global views.

    .. math::
        L = \operatorname{mean}_{v,n,d} (z_{vnd} - \bar z_{nd})^2, \qquad
        \bar z = \frac{1}{V_g} \sum_{v < V_g} z_v

    The gradient flows through the mean, too. Alone it has collapse as its optimum.

    Args:
        z: embeddings ``[V, B, D]``, global views first.
        num_global: :math:`V_g`, in [1, V]; all views when omitted.

    Returns:
        The loss, a tensor with no dimensions; dtype of ``z``, float32 under autocast.

    Raises:
        TypeError: ``z`` is not a floating-point tensor, or ``num_global`` not an int.
        ValueError: ``z`` is of the wrong shape, or ``num_global`` is out of range.

    Example:
        >>> invariance_loss(torch.tensor([[[0.0], [1.0]], [[2.0], [1.0]]]))
        tensor(0.5000)

    Source:
        "VISReg", 2026, arXiv 2606.02572, authors' code read.
    """
    check_floating("z", z)
    if z.dim() != 3:
        raise ValueError(f"z must have shape [views, batch, dim], got {list(z.shape)}")
    views = z.shape[0]
    if num_global is None:
        num_global = views
    if isinstance(num_global, bool) or not isinstance(num_global, int):
        raise TypeError(f"num_global must be an int, got {type(num_global).__name__}")
    if not 1 <= num_global <= views:
        raise ValueError(f"num_global must lie in [1, {views}], got {num_global}")
    dtype = loss_dtype(z)
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    center = wide[:num_global].mean(0)
    return (wide - center).square().mean().to(dtype)


def jepa_loss(
    z: Tensor, regularizer: Regularizer, *, lamb: float = 0.9, num_global: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Mix a regularizer of the embeddings with the invariance of their views.

    .. math:: L = \lambda R(z) + (1 - \lambda) \operatorname{invariance}(z)

    Args:
        z: embeddings ``[V, B, D]``, global views first.
        regularizer: ``R(z)``, such as :class:`~regularizers.transport.VISReg` or
            :class:`~regularizers.transport.SIGReg`.
        lamb: :math:`\lambda`, in [0, 1].
        num_global: number of global views, as in :func:`invariance_loss`.

    Returns:
        The loss, a tensor with no dimensions, and ``{"regularizer", "invariance"}``, detached.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or of the wrong shape.

    Example:
        >>> from regularizers.transport import VISReg
        >>> z = torch.randn(4, 32, 8, requires_grad=True)
        >>> loss, terms = jepa_loss(z, VISReg(num_slices=64), num_global=2)
        >>> loss.backward()
        >>> sorted(terms)
        ['invariance', 'regularizer']

    Source:
        "VISReg", 2026, arXiv 2606.02572, authors' code read; 4 global and 6 local views there.
    """
    check_probability("lamb", lamb)
    invariance = invariance_loss(z, num_global=num_global)
    penalty = regularizer(as_views(z))
    loss = lamb * penalty + (1 - lamb) * invariance
    return loss, {"regularizer": penalty.detach(), "invariance": invariance.detach()}


def jepa_world_model_loss(
    pred: Tensor,
    target: Tensor,
    emb: Tensor,
    regularizer: Regularizer,
    *,
    lamb: float,
    theta: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Train a latent world model end to end: predict embeddings, keep them from collapsing.

    .. math::
        L = \operatorname{mean} (\mathrm{pred} - \mathrm{target})^2 + \lambda R(\mathrm{emb})
        + \theta\, \mathrm{ortho}

    The target is not detached and no average of the encoder is kept: gradients flow through both
    sides. ``ortho`` is ``regularizer.orthogonality_loss()``, for trainable projections of
    :class:`~regularizers.transport.SubspaceSIGReg`.

    Args:
        pred: predicted embeddings, of any shape.
        target: embeddings to be predicted, shape of ``pred``.
        emb: embeddings ``[B, T, D]`` (batch x time x dim), as the regularizer wants them.
        regularizer: ``R(emb)``.
        lamb: :math:`\lambda`, at least 0.
        theta: :math:`\theta`, at least 0; above 0 the regularizer needs ``orthogonality_loss``.

    Returns:
        The loss, a tensor with no dimensions, and its terms ``{"prediction", "regularizer"}``
        (and ``"orthogonality"`` for ``theta`` above 0), detached.

    Raises:
        TypeError: an argument is of the wrong type, or ``regularizer`` has no
            ``orthogonality_loss`` while ``theta`` is above 0.
        ValueError: shapes differ, or a weight is negative.

    Example:
        >>> from regularizers.transport import SubspaceSIGReg
        >>> emb = torch.randn(16, 5, 8, requires_grad=True)
        >>> regularizer = SubspaceSIGReg(8, num_subspaces=2, num_slices=32)
        >>> loss, terms = jepa_world_model_loss(
        ...     emb[:, :-1] * 0.9, emb[:, 1:], emb, regularizer, lamb=0.1
        ... )
        >>> loss.backward()
        >>> sorted(terms)
        ['prediction', 'regularizer']

    Source:
        "Sub-JEPA", 2026, arXiv 2605.09241, authors' code read (the objective of LeWM).
    """
    check_floating("pred", pred)
    check_floating("target", target)
    if pred.shape != target.shape:
        raise ValueError(
            f"target must have the shape of pred ({list(pred.shape)}), got {list(target.shape)}"
        )
    check_not_negative("lamb", lamb)
    check_not_negative("theta", theta)
    prediction = (pred - target).square().mean()
    penalty = regularizer(emb)
    loss = prediction + lamb * penalty
    terms = {"prediction": prediction.detach(), "regularizer": penalty.detach()}
    if theta > 0:
        ortho: Any = getattr(regularizer, "orthogonality_loss", None)
        if ortho is None:
            raise TypeError("regularizer must have orthogonality_loss() while theta is above 0")
        orthogonality = ortho()
        loss = loss + theta * orthogonality
        terms["orthogonality"] = orthogonality.detach()
    return loss, terms
