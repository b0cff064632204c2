"""Triton kernels of the prefix scan: running logits of a few rows stay in registers.

The GPU twin of csrc/cpu/prefix_scan_kernels.h. In the gradient of the expected loss a program takes
a tile of classes, since the log-sum-exp of every prefix is known by then, and a group of rows; the
parts of the gradients are added up at the end: no two programs add to one number.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from regularizers.ops._operator import accumulate_dtype
from regularizers.ops.prefix_scan import (
    _accuracy_reference,
    _check_values,
    _loss_backward_reference,
    _loss_reference,
)

# Running logits of one program, eight or sixteen a thread.
TILE_ELEMENTS = 4096
# The classes of a row that one program still holds; the reference serves more.
MOST_CLASSES = 16384
# A program of the gradient holds logits and their gradient.
GRADIENT_CLASSES, GRADIENT_ROWS = 64, 32
# Programs that a large GPU runs at once.
FILLING_PROGRAMS = 256
# Steps between stored logits; backward walks down from them by subtraction.
CHECKPOINT_STEPS = 64


def _row_tile(classes: int) -> tuple[int, int]:
    padded = triton.next_power_of_2(classes)
    return max(1, min(32, TILE_ELEMENTS // padded)), padded


def _by_feature(weight: Tensor) -> Tensor:
    return weight.T.contiguous()


def prefix_accuracy(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """Return the count of right rows for every prefix, int64 [D]."""
    (rows, features), classes = x.shape, weight.shape[0]
    if classes > MOST_CLASSES or x.numel() == 0 or classes == 0:
        return _accuracy_reference(x, weight, bias, target)
    _check_values(weight, target, None, None)
    tile_rows, padded = _row_tile(classes)
    tiles = triton.cdiv(rows, tile_rows)
    counts = torch.empty(tiles, features, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        _accuracy[(tiles,)](
            x.contiguous(), _by_feature(weight), bias if bias is None else bias.contiguous(),
            target.contiguous(), counts, rows, features, classes, tile_rows, padded,
        )  # fmt: skip
    return counts.sum(0)


def prefix_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    probs: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Return the row losses [B] and the log-sum-exp of every prefix [B, D]."""
    (rows, features), classes = x.shape, weight.shape[0]
    if classes > MOST_CLASSES or x.numel() == 0 or classes == 0:
        return _loss_reference(x, weight, bias, target, probs, ignore_index)
    _check_values(weight, target, probs, ignore_index)
    tile_rows, padded = _row_tile(classes)
    wide = accumulate_dtype(x.dtype)
    row_loss = x.new_empty(rows, dtype=wide)
    log_sum_exp = x.new_zeros(x.shape, dtype=wide)
    with torch.cuda.device_of(x):
        _loss[(triton.cdiv(rows, tile_rows),)](
            x.contiguous(), _by_feature(weight), bias if bias is None else bias.contiguous(),
            target.contiguous(), probs.to(wide).contiguous(), row_loss, log_sum_exp,
            rows, features, classes, ignore_index, tile_rows, padded,
        )  # fmt: skip
    return row_loss, log_sum_exp


def prefix_cross_entropy_backward(
    grad_rows: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    probs: Tensor,
    log_sum_exp: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx [B, D], dW [C, D] and db [C]."""
    (rows, features), classes = x.shape, weight.shape[0]
    if x.numel() == 0 or classes == 0:
        return _loss_backward_reference(
            grad_rows, x, weight, bias, target, probs, log_sum_exp, ignore_index
        )
    wide = accumulate_dtype(x.dtype)
    tile_classes = min(GRADIENT_CLASSES, triton.next_power_of_2(classes))
    tile_rows = min(GRADIENT_ROWS, triton.next_power_of_2(rows))
    class_tiles = triton.cdiv(classes, tile_classes)
    groups = max(1, min(FILLING_PROGRAMS // class_tiles, triton.cdiv(rows, tile_rows)))
    programs = class_tiles * groups
    by_x = x.new_empty(class_tiles, rows, features, dtype=wide)
    by_weight = x.new_zeros(groups, features, classes, dtype=wide)
    by_bias = x.new_empty(groups, classes, dtype=wide)
    stored = (programs, max(1, features // CHECKPOINT_STEPS), tile_rows, tile_classes)
    with torch.cuda.device_of(x):
        _loss_gradient[(programs,)](
            grad_rows.contiguous(), x.contiguous(), _by_feature(weight),
            bias if bias is None else bias.contiguous(), target.contiguous(),
            probs.to(wide).contiguous(), log_sum_exp.contiguous(), by_x, by_weight, by_bias,
            x.new_empty(stored, dtype=wide), rows, features, classes, ignore_index, groups,
            tile_rows, tile_classes, CHECKPOINT_STEPS,
        )  # fmt: skip
    return (
        by_x.sum(0).to(x.dtype),
        by_weight.sum(0).T.to(x.dtype).contiguous(),
        by_bias.sum(0).to(x.dtype),
    )


@triton.jit
def _start(bias, c, classes, PADDING: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """Return the logits of no feature [ROWS, classes], ``PADDING`` behind the last class."""
    z = tl.zeros((ROWS, c.shape[0]), WIDE)
    if bias is not None:
        z += tl.load(bias + c, c < classes, other=0.0).to(WIDE)[None, :]
    return tl.where((c < classes)[None, :], z, PADDING)


@triton.jit
def _feature(x, weight, i, c, d, rows, features, classes, WIDE: tl.constexpr):
    """Return x_d [rows] and W_d [classes] of feature d."""
    value = tl.load(x + i.to(tl.int64) * features + d, i < rows, other=0.0).to(WIDE)
    w = tl.load(weight + tl.cast(classes, tl.int64) * d + c, c < classes, other=0.0).to(WIDE)
    return value, w


@triton.jit
def _accuracy(
    x, weight, bias, target, counts, rows, features, classes,
    ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CLASSES)
    y = tl.load(target + i, i < rows, other=0)[:, None]
    z = _start(bias, c, classes, float("-inf"), WIDE, ROWS)
    for d in range(features):
        value, w = _feature(x, weight, i, c, d, rows, features, classes, WIDE)
        z += value[:, None] * w[None, :]
        own = tl.sum(tl.where(c[None, :] == y, z, 0.0), 1)
        level = own[:, None]
        beats = (z > level) | ((z == level) & (c[None, :] < y))
        beaten = tl.max(beats.to(tl.int32), 1)
        right = (beaten == 0) & (own == own) & (i < rows)
        tl.store(counts + tl.program_id(0).to(tl.int64) * features + d,
                 tl.sum(right.to(tl.int32), 0))  # fmt: skip


@triton.jit
def _loss(
    x, weight, bias, target, probs, row_loss, log_sum_exp,
    rows, features, classes, ignore_index,
    ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CLASSES)
    y = tl.load(target + i, i < rows, other=0)
    counts = (i < rows) & (y != ignore_index)
    z = _start(bias, c, classes, float("-inf"), WIDE, ROWS)
    loss = tl.zeros((ROWS,), WIDE)
    for d in range(features):
        value, w = _feature(x, weight, i, c, d, rows, features, classes, WIDE)
        z += value[:, None] * w[None, :]
        probability = tl.load(probs + d)
        if probability > 0:
            largest = tl.max(z, 1)
            shift = largest + tl.log(tl.sum(tl.exp(z - largest[:, None]), 1))
            own = tl.sum(tl.where(c[None, :] == y[:, None], z, 0.0), 1)
            loss += probability * (shift - own)
            tl.store(log_sum_exp + i.to(tl.int64) * features + d, shift, counts)
    tl.store(row_loss + i, tl.where(counts, loss, 0.0), i < rows)


@triton.jit
def _loss_gradient(
    grad_rows, x, weight, bias, target, probs, log_sum_exp, by_x, by_weight, by_bias, stored,
    rows, features, classes, ignore_index, groups,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    tile, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    c = tile * CLASSES + tl.arange(0, CLASSES)
    inside = tl.arange(0, ROWS)[:, None] * CLASSES + tl.arange(0, CLASSES)[None, :]
    checkpoints = (
        stored + tl.program_id(0).to(tl.int64) * (features // STEPS) * ROWS * CLASSES + inside
    )
    bias_sum = tl.zeros((CLASSES,), WIDE)
    for block in range(group, tl.cdiv(rows, ROWS), groups):
        i = block * ROWS + tl.arange(0, ROWS)
        y = tl.load(target + i, i < rows, other=0)
        counts = (i < rows) & (y != ignore_index)
        rho = tl.load(grad_rows + i, counts, other=0.0).to(WIDE)
        counted = counts[:, None] & (c < classes)[None, :]
        z = _start(bias, c, classes, 0.0, WIDE, ROWS)
        for d in range(features):
            value, w = _feature(x, weight, i, c, d, rows, features, classes, WIDE)
            z += value[:, None] * w[None, :]
            if (d + 1) % STEPS == 0:
                tl.store(checkpoints + d // STEPS * ROWS * CLASSES, z)
        tl.debug_barrier()
        gradient = tl.zeros((ROWS, CLASSES), WIDE)
        for step in range(features):
            d = features - 1 - step
            if (d + 1) % STEPS == 0:
                z = tl.load(checkpoints + d // STEPS * ROWS * CLASSES)
            probability = tl.load(probs + d)
            if probability > 0:
                shift = tl.load(log_sum_exp + i.to(tl.int64) * features + d, counts, other=0.0)
                hit = (c[None, :] == y[:, None]).to(WIDE)
                g = (probability * rho)[:, None] * (tl.exp(z - shift[:, None]) - hit)
                gradient += tl.where(counted, g, 0.0)
            value, w = _feature(x, weight, i, c, d, rows, features, classes, WIDE)
            dot = tl.sum(gradient * w[None, :], 1)
            tl.store(by_x + (tile.to(tl.int64) * rows + i) * features + d, dot, i < rows)
            place = by_weight + (group.to(tl.int64) * features + d) * classes + c
            part = tl.sum(value[:, None] * gradient, 0)
            total = tl.load(place, c < classes, other=0.0) + part
            tl.store(place, total, c < classes)
            z -= value[:, None] * w[None, :]
        bias_sum += tl.sum(gradient, 0)
    tl.store(by_bias + group.to(tl.int64) * classes + c, bias_sum, c < classes)
