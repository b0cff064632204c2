"""StableMax: a softmax substitute that does not saturate, its loss, a meter of collapse."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from regularizers._shared.checks import (
    FLOATING,
    check_floating,
    check_one_of,
    check_shape,
    check_tensor,
    check_values,
)
from regularizers._shared.reductions import REDUCTIONS
from regularizers.ops._operator import accumulate_dtype


def stablemax(x: Tensor, *, dim: int = -1) -> Tensor:
    r"""Return probabilities that grow with logits linearly, not exponentially.

    .. math::
        \frac{s(x_k)}{\sum_j s(x_j)}, \qquad
        s(x) = x + 1 \text{ for } x \ge 0, \quad \frac{1}{1 - x} \text{ for } x < 0

    s and its first derivative are continuous. Unlike softmax it is not invariant to a shift of
    the logits.

    Args:
        x: ``[*]``, floating-point logits; half types are computed in float32.
        dim: the dimension of the classes.

    Returns:
        ``[*]``, positive, with sums of 1 over ``dim``, in the dtype of ``x``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.

    Example:
        >>> stablemax(torch.tensor([2.0, 0.0, -1.0]))
        tensor([0.6667, 0.2222, 0.1111])

    Source:
        L. Prieto and others, 2025, arXiv 2501.04697, and the authors' code.
    """
    check_floating("x", x)
    s, _ = _scaled(x.to(accumulate_dtype(x.dtype)), dim)
    return (s / s.sum(dim, keepdim=True)).to(x.dtype)


def log_stablemax(x: Tensor, *, dim: int = -1) -> Tensor:
    r"""Return the logarithm of :func:`stablemax`.

    .. math:: \mathrm{sign}(x_k) \log(1 + |x_k|) - \log \sum_j s(x_j)

    Args:
        x: ``[*]``, floating-point logits; half types are computed in float32.
        dim: the dimension of the classes.

    Returns:
        ``[*]``, in the dtype of ``x``. The entry of a class with nearly all of the sum is off by
        the rounding of the sum; :func:`stablemax_cross_entropy` is not.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.

    Example:
        >>> log_stablemax(torch.tensor([2.0, 0.0, -1.0]))
        tensor([-0.4055, -1.5041, -2.1972])

    Source:
        arXiv 2501.04697 and the authors' code, whose gradient is NaN at a logit of exactly 1 in
        float32; here it is not.
    """
    check_floating("x", x)
    wide = x.to(accumulate_dtype(x.dtype))
    up, down = torch.log1p(wide.clamp(min=0)), -torch.log1p(-wide.clamp(max=0))
    s, largest = _scaled(wide, dim)
    total = s.sum(dim, keepdim=True).log() + largest.log()
    return (torch.where(wide >= 0, up, down) - total).to(x.dtype)


def _scaled(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return s(x) over its largest value, whose sum with others could overflow, and that value."""
    s = _s(x)
    largest = s.amax(dim, keepdim=True).detach() if s.numel() else s.new_ones(())
    return s / largest, largest


def _s(x: Tensor) -> Tensor:
    # Each branch sees only arguments of its own side: `where` would hand an infinite derivative of
    # the other one down as NaN.
    return torch.where(x >= 0, 1 + x, 1 / (1 - x.clamp(max=0)))


def stablemax_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    dtype: torch.dtype | None = torch.float64,
) -> Tensor:
    r"""Return the cross-entropy of StableMax probabilities.

    .. math::
        -\log \frac{s(x_y)}{\sum_k s(x_k)} =
            \log\!\left(1 + \frac{\sum_{k \ne y} s(x_k)}{s(x_y)}\right)

    The form on the right is what is computed: nothing cancels, so neither the loss nor its gradient
    vanishes however large the margin is. ``torch.nn.functional.cross_entropy`` in float32 is
    exactly 0, and so is its gradient, from a margin of 17.

    A drop-in for ``torch.nn.functional.cross_entropy`` with class indices (no label smoothing).

    Args:
        logits: ``[n, c]``, ``[c]`` or ``[n, c, d1, ...]``, floating point.
        target: ``[n]``, ``[]`` or ``[n, d1, ...]``, int64 classes in [0, c) or ``ignore_index``.
        weight: ``[c]``, a factor for each class; the mean is then the weighted one.
        ignore_index: a target that counts for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        dtype: what to compute in, float64 in the paper; None for the dtype of ``logits``, float32
            for half types.

    Returns:
        A tensor with no dimensions, or of the shape of ``target`` for ``"none"``; in the dtype of
        ``logits``, float32 for half types. The mean over nothing is NaN, as torch's.

    Raises:
        TypeError: ``logits`` or ``weight`` is not floating point, ``target`` is not int64.
        ValueError: shapes do not match, a class is out of range (unchecked on a GPU), or
            ``reduction`` is unknown.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [1e6, 0.0, 0.0]])
        >>> stablemax_cross_entropy(logits, torch.tensor([0, 0]), reduction="none")
        tensor([4.0547e-01, 2.0000e-06])

    Source:
        L. Prieto and others, 2025, arXiv 2501.04697, and the authors' code; the form without
        cancellation is the library's.
    """
    _check_pair(logits, target, ignore_index)
    check_one_of("reduction", reduction, REDUCTIONS)
    if dtype is not None and dtype not in FLOATING:
        raise TypeError(f"dtype must be a floating-point type, got {dtype}")
    dim = min(1, logits.dim() - 1)
    if weight is not None:
        check_floating("weight", weight)
        check_shape("weight", weight, (logits.shape[dim],), "[classes]")
    result = accumulate_dtype(logits.dtype)
    s = _s(logits.to(dtype or result))
    kept = target != ignore_index
    index = torch.where(kept, target, 0).unsqueeze(dim)
    own = s.gather(dim, index)
    rest = s.scatter(dim, index, 0).sum(dim, keepdim=True)
    loss = torch.log1p(rest / own).squeeze(dim)
    factor = kept.to(loss.dtype)
    if weight is not None:
        factor = factor * weight.to(loss.dtype)[index.squeeze(dim)]
    loss = torch.where(kept, loss * factor, 0)
    if reduction == "none":
        return loss.to(result)
    total = loss.sum()
    return (total / factor.sum() if reduction == "mean" else total).to(result)


def softmax_collapse_fraction(
    logits: Tensor, target: Tensor | None = None, *, ignore_index: int = -100
) -> Tensor:
    r"""Return the share of samples on which softmax has collapsed: their loss is exactly zero.

    In floating point :math:`\sum_k e^{x_k - \max x}` is exactly 1 once the largest logit leads by
    enough (17 in float32, 37 in float64): the loss of a sample with that class is then 0, and so is
    the gradient of its logit.

    Args:
        logits: ``[n, c]``, ``[c]`` or ``[n, c, d1, ...]``, floating point; half types as float32.
        target: int64 classes as in :func:`stablemax_cross_entropy`. Without it, the share of
            samples whose sum is exactly 1, whatever their class.
        ignore_index: a target that does not count.

    Returns:
        A tensor with no dimensions, in [0, 1]; NaN for no samples.

    Raises:
        TypeError: ``logits`` is not floating point, ``target`` is not int64.
        ValueError: shapes do not match, or a class is out of range (unchecked on a GPU).

    Example:
        >>> logits = torch.tensor([[16.0, 0.0], [17.0, 0.0], [0.0, 17.0]])
        >>> target = torch.tensor([0, 0, 0])
        >>> softmax_collapse_fraction(logits, target), softmax_collapse_fraction(logits)
        (tensor(0.3333), tensor(0.6667))

    Source:
        arXiv 2501.04697; both meters are in the authors' code.
    """
    check_floating("logits", logits)
    wide = logits.detach().to(accumulate_dtype(logits.dtype))
    if target is None:
        dim = min(1, logits.dim() - 1)
        if logits.dim() == 0:
            raise ValueError("logits must have a dimension of classes, got a number")
        total = (wide - wide.amax(dim, keepdim=True)).exp().sum(dim)
        return (total == 1).to(wide.dtype).mean()
    _check_pair(logits, target, ignore_index)
    loss = F.cross_entropy(wide, target, ignore_index=ignore_index, reduction="none")
    kept = target != ignore_index
    return ((loss == 0) & kept).sum().to(wide.dtype) / kept.sum()


def _check_pair(logits: Tensor, target: Tensor, ignore_index: int) -> None:
    check_floating("logits", logits)
    check_tensor("target", target)
    if logits.dim() == 0:
        raise ValueError("logits must have a dimension of classes, got a number")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64 classes, got {target.dtype}")
    dim = min(1, logits.dim() - 1)
    classes = logits.shape[dim]
    shape = logits.shape[:dim] + logits.shape[dim + 1 :]
    check_shape("target", target, tuple(shape), "the shape of logits without classes")
    within = ((target >= 0) & (target < classes)) | (target == ignore_index)
    check_values(within.all(), lambda: f"target must lie in [0, {classes}) or be {ignore_index}")
