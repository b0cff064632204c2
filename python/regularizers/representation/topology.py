"""A differentiable surrogate of a mask's topology: soft Euler numbers and total variation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_floating,
    check_not_negative,
    check_one_of,
    check_positive,
    check_tensor,
    check_values,
)
from regularizers._shared.reductions import REDUCTIONS, Reduction, reduce_rows
from regularizers.ops._operator import accumulate_dtype


def soft_euler_characteristic(occ: Tensor) -> Tensor:
    r"""Compute the Euler characteristic of soft masks: components less holes.

    .. math::
        \chi(x) = \sum_{ij} x_{ij} - \sum_{ij} x_{ij} x_{i,j+1} - \sum_{ij} x_{ij} x_{i+1,j}
        + \sum_{ij} x_{ij} x_{i,j+1} x_{i+1,j} x_{i+1,j+1}

    On a binary mask this is b0 - b1 with a 4-connected foreground and an 8-connected background,
    as :func:`betti_numbers` counts them. Factored, it is the number of runs in the rows less the
    number of runs in the overlaps of neighbouring rows, which adds up small numbers only:

    .. math::
        \chi(x) = R(x) - R(x_{i} \odot x_{i+1}), \qquad
        R(x) = \sum_{ij} x_{ij} (1 - x_{i,j+1}), \quad x_{i,W} = 0

    Args:
        occ: occupancies ``[B, 1, H, W]``, floating point.

    Returns:
        ``[B]``, float32 for half types.

    Raises:
        TypeError: ``occ`` is not floating point.
        ValueError: ``occ`` is not of that shape.

    Example:
        >>> mask = torch.ones(1, 1, 5, 5)
        >>> mask[..., 2, 2] = 0  # a hole
        >>> soft_euler_characteristic(mask)
        tensor([0.])

    Source:
        HyperTopo-Adapters, authors' code read.
    """
    _check_map("occ", occ)
    return _euler(occ.to(accumulate_dtype(occ.dtype)))[:, 0]


def euler_characteristic_loss(
    pred: Tensor,
    target: Tensor,
    *,
    thresholds: Sequence[float] = (0.3, 0.5, 0.7),
    sigma: float = 0.1,
    normalize: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Compute the squared error of the soft Euler characteristic at several thresholds.

    .. math::
        L = \operatorname{mean}_t \frac{1}{H W} \Big( \chi\big(\operatorname{sigmoid}
        \tfrac{p - t}{\sigma}\big) - \chi([y > \tfrac12]) \Big)^2

    A hole and an island that should not be there cancel in :math:`\chi`: the loss does not see
    them, the Betti numbers do.

    Args:
        pred: probabilities ``[B, 1, H, W]``.
        target: mask of the same shape, of any type; above 0.5 is foreground. No gradient.
        thresholds: t, one or more in (0, 1).
        sigma: softness of the threshold, above 0, in units of probability.
        normalize: divide by H W.
        reduction: over the batch: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        With no dimensions, or ``[B]``; float32 for half types.

    Raises:
        TypeError: ``pred`` is not floating point.
        ValueError: a shape, a threshold or an option is out of range, or ``pred`` is outside of
            [0, 1] by more than 1e-6.

    Example:
        >>> full = torch.ones(1, 1, 8, 8)
        >>> island = full.clone()
        >>> island[..., :, 4] = 0  # two components
        >>> print(f"{euler_characteristic_loss(island, full, sigma=0.02):.4f}")
        0.0156

    Source:
        HyperTopo-Adapters, authors' code read.
    """
    _check_maps(pred, target)
    check_positive("sigma", sigma)
    check_one_of("reduction", reduction, REDUCTIONS)
    levels = tuple(thresholds)
    if not levels or not all(0 < level < 1 for level in levels):
        raise ValueError(f"thresholds must lie in (0, 1), got {levels}")
    wide = pred.to(accumulate_dtype(pred.dtype))
    found = torch.cat([_euler(torch.sigmoid((wide - level) / sigma)) for level in levels], 1)
    truth = _euler((target > 0.5).to(wide.dtype))
    errors = (found - truth).square().mean(1)
    if normalize:
        errors = errors / (pred.shape[2] * pred.shape[3])
    return reduce_rows(errors, reduction)


def total_variation(pred: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""Compute the anisotropic total variation of maps.

    .. math::
        \operatorname{mean}_{ij} |x_{i,j+1} - x_{ij}|
        + \operatorname{mean}_{ij} |x_{i+1,j} - x_{ij}|

    each mean over its own number of differences; 0 for a direction with one pixel.

    Args:
        pred: ``[B, 1, H, W]``, floating point.
        reduction: over the batch: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        With no dimensions, or ``[B]``; float32 for half types.

    Raises:
        TypeError: ``pred`` is not floating point.
        ValueError: ``pred`` is not of that shape, or ``reduction`` is unknown.

    Example:
        >>> total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]))
        tensor(1.)

    Source:
        HyperTopo-Adapters, authors' code read.
    """
    _check_map("pred", pred)
    check_one_of("reduction", reduction, REDUCTIONS)
    wide = pred.to(accumulate_dtype(pred.dtype))
    values = wide.new_zeros(wide.shape[0])
    for dim in (2, 3):
        if wide.shape[dim] > 1:
            values = values + wide.diff(dim=dim).abs().mean((1, 2, 3))
    return reduce_rows(values, reduction)


def topology_surrogate_loss(
    pred: Tensor,
    target: Tensor,
    *,
    alpha: float = 1e-3,
    beta: float = 1e-3,
    thresholds: Sequence[float] = (0.3, 0.5, 0.7),
    sigma: float = 0.1,
    normalize: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Add up the Euler-characteristic loss and the total variation.

    .. math:: L = \alpha L_{EC} + \beta\, TV

    It goes beside a loss by pixels. Alone, or with a large :math:`\alpha`, the Euler term finds
    masks of the right characteristic that have nothing else in common with the target.

    Args:
        pred: probabilities ``[B, 1, H, W]``.
        target: mask of the same shape, of any type; above 0.5 is foreground. No gradient.
        alpha: weight of :func:`euler_characteristic_loss`, at least 0.
        beta: weight of :func:`total_variation`, at least 0.
        thresholds: as in :func:`euler_characteristic_loss`.
        sigma: likewise.
        normalize: likewise.
        reduction: over the batch: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        With no dimensions, or ``[B]``; float32 for half types.

    Raises:
        TypeError: as :func:`euler_characteristic_loss`.
        ValueError: likewise; a weight is negative.

    Example:
        >>> logits = torch.zeros(2, 1, 16, 16, requires_grad=True)
        >>> topology_surrogate_loss(logits.sigmoid(), torch.ones(2, 1, 16, 16)).backward()

    Source:
        HyperTopo-Adapters, authors' code and configuration read.
    """
    check_not_negative("alpha", alpha)
    check_not_negative("beta", beta)
    error = euler_characteristic_loss(
        pred,
        target,
        thresholds=thresholds,
        sigma=sigma,
        normalize=normalize,
        reduction=reduction,
    )
    return alpha * error + beta * total_variation(pred, reduction=reduction)


def _euler(x: Tensor) -> Tensor:
    """Return the characteristic of ``[..., H, W]``."""
    return _runs(x) - _runs(x[..., :-1, :] * x[..., 1:, :])


def _runs(x: Tensor) -> Tensor:
    ends = (x[..., :-1] * (1 - x[..., 1:])).sum((-2, -1))
    return ends + x[..., -1].sum(-1)


def _check_map(name: str, x: Tensor) -> None:
    check_floating(name, x)
    if x.dim() != 4 or x.shape[1] != 1 or x.numel() == 0:
        raise ValueError(
            f"{name} must have shape [B, 1, H, W], none of them 0, got {list(x.shape)}"
        )


def _check_maps(pred: Tensor, target: Tensor) -> None:
    _check_map("pred", pred)
    check_tensor("target", target)
    if target.shape != pred.shape:
        raise ValueError(
            f"target must have the shape of pred, {list(pred.shape)}, got {list(target.shape)}"
        )
    low, high = pred.detach().aminmax()
    check_values(
        ~((low < -1e-6) | (high > 1 + 1e-6)),  # NaN passes, and comes out as NaN
        lambda: f"pred must lie in [0, 1], got values from {low.item():g} to {high.item():g}",
    )
