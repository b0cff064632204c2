"""Fused stochastic depth: rows of a batch are dropped or scaled up, and added to a residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_probability,
    check_same_device,
    check_same_dtype,
)
from regularizers._shared.randomness import draw_seed
from regularizers._shared.scheduled import scheduled
from regularizers.ops._layout import empty_dense
from regularizers.ops._operator import Operator, accumulate_dtype, autocast_dtype, transformed
from regularizers.ops.philox import philox_words


def row_gate(
    x: Tensor,
    p: float | Tensor,
    residual: Tensor | None = None,
    *,
    scale_by_keep: bool = True,
    stream: int = 0,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Drop whole rows of ``x``, scale the others up, and add them to ``residual``, in one pass.

    .. math::
        y_i = r_i + c_i x_i, \qquad
        c_i = \begin{cases} 0 & \text{with probability } p \\ 1 / (1 - p) & \text{else}
        \end{cases}

    One decision a row (an entry of the first dimension), from the Philox word of (stream, element
    i), made again in the backward pass and never stored. Dropped rows of ``x`` are not read: a NaN
    there does not reach the result, nor its gradient. At p = 1 the result is the residual.

    Args:
        x: ``[B, *]``; float32, float64, bfloat16 or float16.
        p: probability that a row is dropped, in [0, 1]; a number, or a floating-point tensor with
            no dimensions on the device of ``x`` (then a compiled graph serves every value). Not
            differentiated through.
        residual: what the rows are added to, with the shape and dtype of ``x`` (under autocast both
            are raised to the wider type); None for 0.
        scale_by_keep: False leaves the factor 1 / (1 - p) out.
        stream: number of the branch, in [0, 2^32): branches that share a seed draw independently.
        seed: int in [-2^63, 2^63) or int64 tensor with no dimensions. The same seed gives the same
            decisions on every device, backend and memory layout. Drawn from the default generator
            when omitted.
        generator: generator to draw the seed from; not inside ``torch.compile`` or activation
            checkpointing.

    Returns:
        The shape and dtype of ``x``; channels_last where ``x`` is, row-major otherwise.

    Raises:
        TypeError: a tensor is not of a floating-point type, or the types differ.
        ValueError: ``x`` has no dimensions, ``residual`` has another shape or device, or ``p``,
            ``stream`` or ``seed`` is out of range.

    Example:
        >>> x = torch.ones(4, 3)
        >>> row_gate(x, 0.5, residual=x, seed=42)
        tensor([[3., 3., 3.],
                [1., 1., 1.],
                [1., 1., 1.],
                [1., 1., 1.]])

    Source:
        The operator under drop path and stochastic depth (2016, arXiv 1603.09382; 2017, arXiv
        1707.07012).
    """
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must have shape [batch, *], got no dimensions")
    if residual is not None:
        check_floating("residual", residual)
        if residual.shape != x.shape:
            raise ValueError(
                f"residual must have the shape of x {list(x.shape)}, got {list(residual.shape)}"
            )
        check_same_device("residual", residual, "x", x)
        if autocast_dtype(x.device) is not None:
            wider = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(wider), residual.to(wider)
        check_same_dtype("residual", residual, "x", x)
    check_at_least("stream", stream, 0)
    if stream >= 2**32:
        raise ValueError(f"stream must be below 2^32, got {stream}")
    rate = scheduled("p", p, x, check_probability)
    bits = draw_seed(seed, generator, x)
    if transformed():
        return _gated(x, residual, rate, bits, stream, scale_by_keep)
    result: Tensor = ROW_GATE(x, residual, rate, bits, stream, scale_by_keep)
    return result


def kept_rows(rows: int, p: Tensor, seed: Tensor, stream: int = 0) -> Tensor:
    """Return which rows :func:`row_gate` keeps, bool ``[rows]``.

    Args:
        rows: number of rows.
        p: float64 tensor with no dimensions, in [0, 1].
        seed: int64 tensor with no dimensions.
        stream: number of the branch.

    Returns:
        bool tensor ``[rows]``.

    Example:
        >>> kept_rows(4, torch.tensor(0.5).double(), torch.tensor(42))
        tensor([ True, False, False, False])
    """
    words = philox_words(seed, rows, stream=stream)
    return words >= (p * 2.0**32 + 0.5).to(torch.int64)


def _gated(
    x: Tensor,
    residual: Tensor | None,
    p: Tensor,
    seed: Tensor,
    stream: int,
    scale_by_keep: bool,
) -> Tensor:
    """Compute the gate in plain PyTorch; the specification."""
    keep = kept_rows(x.shape[0], p, seed, stream).reshape(-1, *[1] * (x.dim() - 1))
    wide = x.to(accumulate_dtype(x.dtype))
    factor = torch.where(p < 1, 1 / (1 - p), 0).to(wide.dtype) if scale_by_keep else 1.0
    branch = torch.where(keep, wide * factor, 0)
    return (branch if residual is None else residual.to(wide.dtype) + branch).to(x.dtype)


def check_rate(p: Tensor) -> None:
    """Check the value of a scheduled rate where that costs no synchronisation."""
    if p.device.type == "cpu":
        check_probability("p", p.item())


def _reference(
    x: Tensor,
    residual: Tensor | None,
    p: Tensor,
    seed: Tensor,
    stream: int,
    scale_by_keep: bool,
) -> Tensor:
    check_rate(p)
    return empty_dense(x).copy_(_gated(x, residual, p, seed, stream, scale_by_keep))


def _fake(x: Tensor, *others: Any) -> Tensor:
    return empty_dense(x)


# Linear in x and residual; the map of x is its own adjoint.
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, residual, p, seed, *options = inputs
    ctx.save_for_backward(p, seed)
    ctx.options = options
    ctx.has_residual = residual is not None


def _backward(backend: str | None, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = ROW_GATE.kernel(backend)(grad, None, *ctx.saved_tensors, *ctx.options)
    return grad_x, grad if ctx.has_residual else None, *[None] * 4


ROW_GATE = Operator(
    "row_gate",
    "(Tensor x, Tensor? residual, Tensor p, Tensor seed, SymInt stream, bool scale_by_keep) "
    "-> Tensor",
    fake=_fake,
    reference=_reference,
    triton="row_gate:row_gate",
    setup_context=_setup_context,
    backward=_backward,
)
