"""Triton kernels of prefix_linear: tiles of rows of similar length, whose sums stop at the longest.

The GPU twin of csrc/cpu/nested.cpp. Rows are taken in the order of their lengths, longest first, on
the device: nothing waits for the host. A tile of rows sums over the features of its longest row; a
panel of features of dW sums over the rows that reach into it, which are the leading ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from regularizers.ops.nested import _check_values
from regularizers.ops.triton.masked_linear_cross_entropy import LEAST_TILE, _operand_types

MOST_ROWS, MOST_COLUMNS = 64, 128


def _tile(size: int, most: int) -> int:
    padded: int = triton.next_power_of_2(size)
    return min(most, max(LEAST_TILE, padded))


def _depth(x: Tensor) -> int:
    return 32 if x.dtype.itemsize == 2 else 16


def _by_length(k: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return the length of every row and the rows in the order of their lengths."""
    if k.dim() == 0:
        return k.expand(rows).contiguous(), torch.arange(rows, device=k.device)
    return k.contiguous(), k.argsort(descending=True, stable=True)


def prefix_linear(x: Tensor, weight: Tensor, bias: Tensor | None, k: Tensor) -> Tensor:
    """Return y [B, C]."""
    _check_values(k, x.shape[1])  # on a GPU there is nothing to look at
    (rows, features), classes = x.shape, weight.shape[0]
    out = x.new_empty(rows, classes)
    if out.numel() == 0:
        return out
    lengths, order = _by_length(k, rows)
    tile_rows, tile_classes = _tile(rows, MOST_ROWS), _tile(classes, MOST_COLUMNS)
    operand, _, precision = _operand_types(x.dtype)
    with torch.cuda.device_of(x):
        _forward[(triton.cdiv(rows, tile_rows) * triton.cdiv(classes, tile_classes),)](
            x.contiguous(), weight.contiguous(), bias if bias is None else bias.contiguous(),
            lengths, order, out, rows, features, classes, operand, precision,
            tile_rows, tile_classes, _depth(x),
        )  # fmt: skip
    return out


def prefix_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, k: Tensor, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return dx [B, D] and dW [C, D], each empty where it is not wanted."""
    _check_values(k, x.shape[1])
    (rows, features), classes = x.shape, weight.shape[0]
    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if wants_x else x[:0, 0]
    grad_weight = weight.new_zeros(weight.shape) if wants_weight else x[:0, 0]
    if grad.numel() == 0 or features == 0:
        return grad_x.clone(), grad_weight.clone()
    lengths, order = _by_length(k, rows)
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    tile_rows, tile_features = _tile(rows, MOST_ROWS), _tile(features, MOST_COLUMNS)
    tile_classes = _tile(classes, MOST_ROWS)
    panels = triton.cdiv(features, tile_features)
    _, operand, precision = _operand_types(x.dtype)
    with torch.cuda.device_of(x):
        if wants_x:
            _input_gradient[(triton.cdiv(rows, tile_rows) * panels,)](
                grad, weight, lengths, order, grad_x, rows, features, classes, operand, precision,
                tile_rows, tile_features, _depth(x),
            )  # fmt: skip
        if wants_weight:
            starts = torch.arange(panels, device=k.device) * tile_features
            reach = (lengths[:, None] > starts).sum(0)
            _weight_gradient[(triton.cdiv(classes, tile_classes) * panels,)](
                grad, x, lengths, order, reach, grad_weight, features, classes, operand, precision,
                tile_classes, tile_features, _depth(x),
            )  # fmt: skip
    return (
        grad_x if wants_x else grad_x.clone(),
        grad_weight if wants_weight else grad_weight.clone(),
    )


@triton.jit
def _rows_of_tile(lengths, order, first, rows, ROWS: tl.constexpr):
    """Return which rows a tile has, whether they exist, and their lengths: 0 of those that do not.

    The places are int64.
    """
    place = first + tl.arange(0, ROWS)
    exists = place < rows
    row = tl.load(order + place, exists, other=0)
    return row, exists, tl.load(lengths + row, exists, other=0)


@triton.jit
def _forward(
    x, weight, bias, lengths, order, out, rows, features, classes,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    class_tiles = tl.cdiv(classes, CLASSES)
    first = tl.program_id(0) // class_tiles * ROWS
    row, exists, kept = _rows_of_tile(lengths, order, first, rows, ROWS)
    c = tl.program_id(0) % class_tiles * CLASSES + tl.arange(0, CLASSES)
    WIDE: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((ROWS, CLASSES), WIDE)
    longest = tl.max(kept, 0)
    for start in range(0, longest, DEPTH):
        d = start + tl.arange(0, DEPTH)
        left = tl.load(
            x + row[:, None] * features + d[None, :], d[None, :] < kept[:, None], other=0.0
        )
        right = tl.load(
            weight + c[None, :].to(tl.int64) * features + d[:, None],
            (c[None, :] < classes) & (d[:, None] < longest),
            other=0.0,
        )
        total = tl.dot(
            left.to(OPERAND), right.to(OPERAND), total,
            input_precision=PRECISION, out_dtype=WIDE,
        )  # fmt: skip
    if bias is not None:
        total += tl.load(bias + c, c < classes, other=0.0).to(WIDE)[None, :]
    inside = exists[:, None] & (c[None, :] < classes)
    tl.store(out + row[:, None] * classes + c[None, :], total.to(out.dtype.element_ty), inside)


# dx = 1[d < k] (g W); panels behind the longest row of a tile keep the zeros they hold.
@triton.jit
def _input_gradient(
    grad, weight, lengths, order, out, rows, features, classes,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    panels = tl.cdiv(features, FEATURES)
    first = tl.program_id(0) // panels * ROWS
    row, exists, kept = _rows_of_tile(lengths, order, first, rows, ROWS)
    begin = tl.program_id(0) % panels * FEATURES
    if begin < tl.max(kept, 0):
        d = begin + tl.arange(0, FEATURES)
        WIDE: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
        total = tl.zeros((ROWS, FEATURES), WIDE)
        for start in range(0, classes, DEPTH):
            c = start + tl.arange(0, DEPTH)
            left = tl.load(
                grad + row[:, None] * classes + c[None, :],
                exists[:, None] & (c[None, :] < classes),
                other=0.0,
            )
            right = tl.load(
                weight + c[:, None].to(tl.int64) * features + d[None, :],
                (c[:, None] < classes) & (d[None, :] < features),
                other=0.0,
            )
            total = tl.dot(
                left.to(OPERAND), right.to(OPERAND), total,
                input_precision=PRECISION, out_dtype=WIDE,
            )  # fmt: skip
        inside = d[None, :] < kept[:, None]
        tl.store(out + row[:, None] * features + d[None, :], total.to(out.dtype.element_ty), inside)


# dW = g^T (1[d < k] x), over the leading rows, those that reach into the panel.
@triton.jit
def _weight_gradient(
    grad, x, lengths, order, reach, out, features, classes,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    CLASSES: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    panels = tl.cdiv(features, FEATURES)
    panel = tl.program_id(0) % panels
    c = tl.program_id(0) // panels * CLASSES + tl.arange(0, CLASSES)
    d = panel * FEATURES + tl.arange(0, FEATURES)
    leading = tl.load(reach + panel)
    WIDE: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((CLASSES, FEATURES), WIDE)
    for start in range(0, leading, DEPTH):
        row, exists, kept = _rows_of_tile(lengths, order, start, leading, DEPTH)
        left = tl.load(
            grad + row[None, :] * classes + c[:, None],
            exists[None, :] & (c[:, None] < classes),
            other=0.0,
        )
        right = tl.load(
            x + row[:, None] * features + d[None, :], d[None, :] < kept[:, None], other=0.0
        )
        total = tl.dot(
            left.to(OPERAND), right.to(OPERAND), total,
            input_precision=PRECISION, out_dtype=WIDE,
        )  # fmt: skip
    inside = (c[:, None] < classes) & (d[None, :] < features)
    place = c[:, None].to(tl.int64) * features + d[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), inside)
