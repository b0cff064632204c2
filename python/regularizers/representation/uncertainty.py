"""Matching under jittered targets: coarse at first, precise at the end."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regularizers._shared.checks import (
    check_floating,
    check_not_negative,
    check_one_of,
    check_positive,
    check_same_dtype,
)
from regularizers._shared.distributed import gather_batch
from regularizers._shared.reductions import REDUCTIONS, Reduction, reduce_rows
from regularizers._shared.scheduled import scheduled
from regularizers.ops._operator import accumulate_dtype
from regularizers.ops.pairwise import pairwise_logsumexp

Per = Literal["batch", "sample"]


class NormalAugmenter(nn.Module):
    r"""Jitter embeddings as much as their own entries vary.

    .. math::
        \hat f = a\, \alpha \odot \bar f + b\, \beta, \qquad
        \bar f = \frac{f - \mu}{\sqrt{v + \varepsilon}}, \qquad
        \alpha_d \sim N(1, s^2), \quad \beta_d \sim N(\mu, s^2)

    with the mean :math:`\mu`, the biased variance v and the unbiased standard deviation s of the
    entries of each embedding by itself. It is meant for the targets of a matching loss. Draws
    carry no gradient; it passes through :math:`\bar f` alone. In ``eval()`` embeddings come back
    as they are.

    Args:
        alpha_scale: a, at least 0.
        beta_scale: b, at least 0.
        eps: :math:`\varepsilon`, above 0.

    Shape:
        ``[B, D]`` to ``[B, D]`` of the same type, D at least 2.

    Raises:
        TypeError: embeddings are not floating point.
        ValueError: an argument is out of range, or embeddings are not ``[B, D >= 2]``.

    Example:
        >>> NormalAugmenter()(torch.full((1, 3), 0.5))  # a constant row has no spread
        tensor([[0.5000, 0.5000, 0.5000]])

    Source:
        Y. Chen et al., "Composed Image Retrieval with Text Feedback via Multi-grained Uncertainty
        Regularization", ICLR 2024, arXiv 2211.07394, authors' code read, which normalises rows by
        an ``InstanceNorm1d`` that takes the batch for one sample, and draws in ``eval()`` too.
    """

    def __init__(
        self, *, alpha_scale: float = 1.0, beta_scale: float = 1.0, eps: float = 1e-5
    ) -> None:
        super().__init__()
        check_not_negative("alpha_scale", alpha_scale)
        check_not_negative("beta_scale", beta_scale)
        check_positive("eps", eps)
        self.alpha_scale = alpha_scale
        self.beta_scale = beta_scale
        self.eps = eps

    def forward(self, f: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return jittered embeddings; ``generator`` must be on their device."""
        check_floating("f", f)
        if f.dim() != 2 or f.shape[1] < 2:
            raise ValueError(f"f must have shape [B, D >= 2], got {list(f.shape)}")
        if not self.training:
            return f
        wide = f.to(accumulate_dtype(f.dtype))
        centered = wide - wide.mean(1, keepdim=True)
        variance = centered.square().mean(1, keepdim=True)
        standard = centered * (variance + self.eps).rsqrt()
        with torch.no_grad():
            spread, mean = torch.std_mean(wide, dim=1, keepdim=True)
            alpha, beta = (torch.empty_like(wide).normal_(generator=generator) for _ in range(2))
            alpha, beta = 1 + spread * alpha, mean + spread * beta
        return (self.alpha_scale * alpha * standard + self.beta_scale * beta).to(f.dtype)

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return f"alpha_scale={self.alpha_scale:g}, beta_scale={self.beta_scale:g}, eps={self.eps:g}"


def uncertainty_matching_loss(
    query: Tensor,
    augmented: Tensor,
    *,
    per: Per = "batch",
    reduction: Reduction = "mean",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Match queries with jittered targets, less firmly the more the targets vary.

    .. math::
        L = \tfrac12 \big( e^{-\sigma} \mathrm{CE}(q, \hat f) + \sigma \big), \qquad
        \mathrm{CE}_i = \log \sum_j e^{q_i \cdot \hat f_j} - q_i \cdot \hat f_i

    :math:`\sigma` is the standard deviation of all entries of :math:`\hat f`. It has the part of a
    log-variance, and a gradient: at a fixed CE the least value is at :math:`\sigma = \log CE`.
    There is no temperature and no normalisation; scale embeddings before.

    Args:
        query: q, ``[B, D]``, floating point.
        augmented: :math:`\hat f`, ``[B, D]``, from :class:`NormalAugmenter`; row i belongs to
            query i.
        per: ``"batch"`` for one :math:`\sigma`, ``"sample"`` for one a row of
            :math:`\hat f`, which weighs the cross-entropy of its own row.
        reduction: over the batch: ``"mean"``, ``"sum"`` or ``"none"``.
        process_group: processes whose batches are one; the loss is that of the whole. Local
            batches must have one size.

    Returns:
        With no dimensions, or ``[B]``; float32 for half types.

    Raises:
        TypeError: tensors are not floating point or differ in type.
        ValueError: shapes differ, B is 0, D is below 2, or an option is unknown.

    Example:
        >>> uncertainty_matching_loss(torch.eye(4), torch.eye(4))  # doctest: +ELLIPSIS
        tensor(0.4614)

    Source:
        Y. Chen et al., ICLR 2024, arXiv 2211.07394, authors' code read. The paper writes
        :math:`1 / 2 \sigma^2` for the weight and :math:`\frac12 \log \sigma^2` for the penalty;
        the code's form is taken.
    """
    check_one_of("per", per, ("batch", "sample"))
    check_one_of("reduction", reduction, REDUCTIONS)
    _check_pair(query, "augmented", augmented)
    query, augmented = gather_batch(query, process_group), gather_batch(augmented, process_group)
    return reduce_rows(_uncertain(query, augmented, per), reduction)


class MultiGrainedUncertaintyLoss(nn.Module):
    r"""Go from uncertain to precise matching over the epochs.

    .. math::
        L = \gamma L_u(q, \hat f) + (1 - \gamma)\, \mathrm{CE}(q, t), \qquad
        \gamma = e^{-g\, \mathrm{epoch} / \mathrm{epochs}}

    with :math:`L_u` of :func:`uncertainty_matching_loss`: coarse alone at the start, 37 % of it
    left at the end.

    Args:
        total_epochs: above 0; the paper trains for 50 to 60.
        gamma_scale: g, at least 0.
        per: as in :func:`uncertainty_matching_loss`.
        process_group: likewise.

    Shape:
        Queries, targets and jittered targets ``[B, D]`` to a loss with no dimensions, float32 for
        half types. ``epoch`` is a number, or a floating-point tensor with no dimensions, in
        [0, total_epochs].

    Raises:
        TypeError: tensors are not floating point or differ in type.
        ValueError: shapes differ, or an argument is out of range.

    Example:
        >>> loss = MultiGrainedUncertaintyLoss(total_epochs=50)
        >>> query, target = torch.randn(2, 8, 16).requires_grad_()
        >>> loss(query, target, NormalAugmenter()(target), epoch=3).backward()

    Source:
        Y. Chen et al., ICLR 2024, arXiv 2211.07394, authors' code read.
    """

    def __init__(
        self,
        *,
        total_epochs: float,
        gamma_scale: float = 1.0,
        per: Per = "batch",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_positive("total_epochs", total_epochs)
        check_not_negative("gamma_scale", gamma_scale)
        check_one_of("per", per, ("batch", "sample"))
        self.total_epochs = total_epochs
        self.gamma_scale = gamma_scale
        self.per: Per = per
        self.process_group = process_group

    def forward(
        self, query: Tensor, target: Tensor, augmented: Tensor, *, epoch: float | Tensor
    ) -> Tensor:
        """Return the loss at an epoch, which may be a fraction."""
        _check_pair(query, "target", target)
        _check_pair(query, "augmented", augmented)
        time = scheduled("epoch", epoch, query, self._check_epoch)
        query, target, augmented = (
            gather_batch(x, self.process_group) for x in (query, target, augmented)
        )
        coarse = _uncertain(query, augmented, self.per).mean()
        gamma = torch.exp(-self.gamma_scale * time / self.total_epochs).to(coarse.dtype)
        return gamma * coarse + (1 - gamma) * _matching(query, target).mean()

    def _check_epoch(self, name: str, value: float) -> None:
        if not 0 <= value <= self.total_epochs:
            raise ValueError(f"{name} must lie in [0, {self.total_epochs}], got {value}")

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return (
            f"total_epochs={self.total_epochs:g}, gamma_scale={self.gamma_scale:g}, "
            f"per={self.per!r}"
        )


def _matching(query: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of every query with the targets of the batch, ``[B]``."""
    dtype = accumulate_dtype(query.dtype)
    own = (query.to(dtype) * target.to(dtype)).sum(1)
    return pairwise_logsumexp(query, target, exclude_self=False).logsumexp - own


def _uncertain(query: Tensor, augmented: Tensor, per: Per) -> Tensor:
    wide = augmented.to(accumulate_dtype(augmented.dtype))
    sigma = wide.std() if per == "batch" else wide.std(1)
    return 0.5 * (torch.exp(-sigma) * _matching(query, augmented) + sigma)


def _check_pair(query: Tensor, name: str, other: Tensor) -> None:
    check_floating("query", query)
    check_floating(name, other)
    check_same_dtype(name, other, "query", query)
    if query.dim() != 2 or query.shape[0] < 1 or query.shape[1] < 2:
        raise ValueError(f"query must have shape [B >= 1, D >= 2], got {list(query.shape)}")
    if other.shape != query.shape:
        raise ValueError(
            f"{name} must have the shape of query, {list(query.shape)}, got {list(other.shape)}"
        )
