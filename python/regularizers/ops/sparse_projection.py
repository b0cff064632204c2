"""Projections on the simplex with at most k nonzeros, along a dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_same_device,
    check_shape,
)
from regularizers.ops._operator import Operator, accumulate_dtype, autocast_dtype, transformed


def sparse_projection(
    v: Tensor, z: float | Tensor | None = 1.0, *, k: int | None = None, dim: int = -1
) -> Tensor:
    r"""Project on the simplex of size ``z`` with at most ``k`` nonzeros, along a dimension.

    .. math:: P(v) = \operatorname{argmin}_t \|t - v\|^2, \quad
        t \ge 0, \quad \textstyle\sum_i t_i = z, \quad \|t\|_0 \le k

    It is :math:`t_i = \max(v_i - \theta, 0)` on the k largest entries, with the :math:`\theta` that
    gives the sum; of equal entries the first count. ``z=None`` asks for no sum: then
    :math:`t = \max(v, 0)` on the k largest. The kernel reads a row once, keeps what lies less than
    z below its largest entry, and sorts nothing.

    The derivative is that of the piece at hand: with s the 0-1 support, a cotangent g goes to
    :math:`s \odot (g - \bar g_s)` in v and to its mean over the support, :math:`\bar g_s`, in z.

    Args:
        v: ``[*]``; float32, float64, bfloat16 or float16.
        z: sum of the result, at least 0; a number, a tensor with no dimensions, or one for each
            projected vector, with the shape of ``v`` without ``dim``. None: no sum.
        k: nonzeros at most, at least 1; None for all.
        dim: the dimension along which to project.

    Returns:
        The shape and dtype of ``v``. A vector with a NaN gives NaN.

    Raises:
        TypeError: ``v`` is not a floating-point tensor or ``k`` not an int.
        ValueError: ``z`` is negative or of the wrong shape or device, ``k`` is below 1, or ``dim``
            does not exist.

    Example:
        >>> sparse_projection(torch.tensor([0.5, 0.4, 0.3]), k=2)
        tensor([0.5500, 0.4500, 0.0000])

    Source:
        C. Michelot, 1986 (the iteration); A. Kyrillidis et al., 2013, arXiv 1206.1529 (top k
        first); formulas checked numerically.
    """
    check_floating("v", v)
    if not -v.dim() <= dim < v.dim():
        raise ValueError(f"dim must be a dimension of v, got {dim} for shape {list(v.shape)}")
    if k is not None:
        check_at_least("k", k, 1)
    if autocast_dtype(v.device) is not None and v.dtype != torch.float64:
        v = v.float()
    rows = v.movedim(dim, -1)
    count = rows.shape[-1] if k is None else min(k, rows.shape[-1])
    sums = None if z is None else _sums(z, rows)
    projected = _projection(rows, sums, count) if transformed() else PROJECTION(rows, sums, count)
    result: Tensor = projected.movedim(-1, dim)
    return result


def _sums(z: float | Tensor, rows: Tensor) -> Tensor:
    """Return z as one number a row."""
    if not isinstance(z, Tensor):
        if isinstance(z, bool) or not isinstance(z, (int, float, torch.SymFloat, torch.SymInt)):
            raise TypeError(f"z must be a number, a tensor or None, got {type(z).__name__}")
        if not z >= 0:
            raise ValueError(f"z must be at least 0, got {z}")
        return rows.new_full(rows.shape[:-1], z)
    check_floating("z", z)
    check_same_device("z", z, "v", rows)
    if z.dim() != 0:
        check_shape("z", z, tuple(rows.shape[:-1]), f"of v without dim {list(rows.shape[:-1])}")
    return z.to(rows.dtype).expand(rows.shape[:-1])


def largest(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest entries of the last dimension, descending, and their places."""
    values, order = s.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], order[..., :k]


def simplex_threshold(top: Tensor, z: Tensor) -> Tensor:
    """Return theta [*, 1] with sum max(top - theta, 0) = z, for entries in descending order."""
    count = torch.arange(1, top.shape[-1] + 1, device=top.device)
    means = (top.cumsum(-1) - z.unsqueeze(-1)) / count
    support = (top > means).sum(-1, keepdim=True).clamp(min=1)
    return means.gather(-1, support - 1)


def _projection(v: Tensor, z: Tensor | None, k: int) -> Tensor:
    """Project the last dimension in plain PyTorch; the specification."""
    if v.shape[-1] == 0:
        return v.clone()
    wide = v.to(accumulate_dtype(v.dtype))
    top, order = largest(wide, k)
    kept = top if z is None else top - simplex_threshold(top, z.to(wide.dtype))
    projected = torch.zeros_like(wide).scatter(-1, order, kept.relu())
    return torch.where(wide.isnan().any(-1, keepdim=True), torch.nan, projected).to(v.dtype)


def _projection_reference(v: Tensor, z: Tensor | None, k: int) -> Tensor:
    _check_sums(z)
    return _projection(v, z, k).contiguous()


def _check_sums(z: Tensor | None) -> None:
    if z is not None and z.device.type == "cpu" and not bool((z >= 0).all()):
        raise ValueError(f"z must be at least 0, got {z.min().item():g}")


def _projection_backward_reference(
    grad: Tensor, out: Tensor, simplex: bool
) -> tuple[Tensor, Tensor]:
    on = out > 0
    wide = torch.where(on, grad.to(accumulate_dtype(grad.dtype)), 0)
    if not simplex:
        return wide.to(out.dtype).contiguous(), out.new_empty(0)
    mean = wide.sum(-1) / on.sum(-1).clamp(min=1)
    grad_v = torch.where(on, wide - mean.unsqueeze(-1), 0)
    return grad_v.to(out.dtype).contiguous(), mean.to(out.dtype)


def _projection_backward_fake(grad: Tensor, out: Tensor, simplex: bool) -> tuple[Tensor, Tensor]:
    return out.new_empty(out.shape), out.new_empty(out.shape[:-1] if simplex else 0)


def _projection_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.simplex = inputs[1] is not None


def _projection_rule(backend: str | None, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (out,) = ctx.saved_tensors
    grad_v, grad_z = PROJECTION_BACKWARD.kernel(backend)(grad, out, ctx.simplex)
    return grad_v, grad_z if ctx.simplex else None, None


def _projection_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, out, simplex = inputs
    ctx.save_for_backward(out)
    ctx.simplex = simplex


# The backward map is linear in grad and symmetric, and its support is constant on each piece.
def _projection_backward_rule(
    backend: str | None, ctx: Any, grad_v: Tensor, grad_z: Tensor
) -> tuple[Any, ...]:
    (out,) = ctx.saved_tensors
    kernel = PROJECTION_BACKWARD.kernel(backend)
    grad, _ = kernel(grad_v, out, ctx.simplex)
    if ctx.simplex:
        on = (out > 0).to(out.dtype)
        grad = grad + on * (grad_z / on.sum(-1).clamp(min=1)).unsqueeze(-1)
    return grad, None, None


PROJECTION = Operator(
    "sparse_projection",
    "(Tensor v, Tensor? z, SymInt k) -> Tensor",
    fake=lambda v, z, k: v.new_empty(v.shape),
    reference=_projection_reference,
    triton="sparse_ot:sparse_projection",
    setup_context=_projection_context,
    backward=_projection_rule,
)
PROJECTION_BACKWARD = Operator(
    "sparse_projection_backward",
    "(Tensor grad, Tensor out, bool simplex) -> (Tensor grad_v, Tensor grad_z)",
    fake=_projection_backward_fake,
    reference=_projection_backward_reference,
    triton="sparse_ot:sparse_projection_backward",
    setup_context=_projection_backward_context,
    backward=_projection_backward_rule,
)
