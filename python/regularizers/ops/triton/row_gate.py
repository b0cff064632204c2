"""Triton kernel of row_gate: each program takes a piece of one row; dropped rows are not read."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from regularizers.ops._layout import empty_dense, in_layout_of
from regularizers.ops.row_gate import check_rate
from regularizers.ops.triton.dropout import accumulate_type
from regularizers.ops.triton.philox import drop_rule, keep_elements, keep_scale

BLOCK = 1024


def row_gate(
    x: Tensor,
    residual: Tensor | None,
    p: Tensor,
    seed: Tensor,
    stream: int,
    scale_by_keep: bool,
) -> Tensor:
    """Return ``residual + c x`` with one factor c a row, laid out as ``empty_dense(x)``."""
    check_rate(p)
    out = empty_dense(x)
    if x.numel() == 0:
        return out
    row_elements = x.numel() // x.shape[0]
    tiles = triton.cdiv(row_elements, BLOCK)
    with torch.cuda.device_of(x):
        _gate[(tiles * x.shape[0],)](
            in_layout_of(out, x),
            None if residual is None else in_layout_of(out, residual),
            out,
            p,
            seed,
            stream,
            row_elements,
            tiles,
            scale_by_keep,
            BLOCK,
        )
    return out


@triton.jit(do_not_specialize=["stream", "row_elements", "tiles"])
def _gate(
    x,
    residual,
    y,
    p,
    seed,
    stream,
    row_elements,
    tiles,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    place = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = place < row_elements
    element = row * row_elements + place
    keep = keep_elements(tl.load(seed), drop_rule(p), row + tl.arange(0, 1), stream)
    value = tl.load(x + element, inside & keep, 0.0).to(accumulate_type(x.dtype.element_ty))
    if SCALE:
        value = value * keep_scale(p).to(value.dtype)
    if residual is not None:
        value += tl.load(residual + element, inside).to(value.dtype)
    tl.store(y + element, value.to(y.dtype.element_ty), inside)
