"""Triton kernels of masked linear cross-entropy: logits, softmax and gradients of a chunk of rows at a time.

The CUDA twin of csrc/cpu/masked_linear_cross_entropy_kernels.h, where the same mathematics stands for the CPU.

    z_e = r (m_e * x_i) W^T + b          e: effective row = (row i, sample s), at place i M + s; r = 1 / (1 - p)
    l_e = sum_c t_ic (lse(z_e) - z_ec)   t: target row
    g_e = (softmax(z_e) sum_c t_ic - t_i) rho_i          rho_i: gradient of the result with respect to one l_e of row i
    dW = r sum_e g_e (m_e * x_i)^T,   dx_i = r sum_s m_e * (g_e W),   db = sum_e g_e

Masks are made in registers where a product reads them; where several tiles of classes would make the same mask, m * x of
the chunk is stored once. The logits of a chunk turn into their gradient in place. Nothing of size rows x samples leaves the
chunk but the losses. No program adds to what another one of its launch wrote: results repeat bit by bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from regularizers.backend import interpreting
from regularizers.ops._operator import accumulate_dtype
from regularizers.ops.masked_linear_cross_entropy import (
    _GRAD_BIAS,
    _GRAD_WEIGHT,
    _GRAD_X,
    _MEAN,
    _NONE,
    _check_values,
)
from regularizers.ops.triton.philox import (
    WORDS_PER_CALL,
    drop_rule,
    keep_calls,
    keep_elements,
    keep_scale,
)

# What a chunk's logits may take, and its stored m * x; one row with all its samples is a chunk also where it takes more.
CHUNK_BYTES = 64 << 20
# "tf32x3" takes three tensor core products for nearly the same result, "tf32" one for three digits.
FLOAT32_PRECISION = "ieee"
# Programs that a large GPU runs at once; a weight gradient of fewer tiles is split over the rows.
FILLING_PROGRAMS = 256
# Steps of the sum over effective rows that make a split worth a gradient of its own.
LEAST_STEPS = 8
# Elements of the tile that the softmax works on at a time.
SOFTMAX_ELEMENTS = 4096


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    p: Tensor,
    label_smoothing: Tensor,
    seed: Tensor,
    num_samples: int,
    ignore_index: int,
    reduction: int,
    gradients: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss and, of a scalar loss, its wanted gradients."""
    call = (x, weight, bias, target, class_weight, p, label_smoothing, seed, num_samples, ignore_index)
    rows = x.new_ones(x.shape[0], dtype=torch.float64)
    if reduction == _NONE:
        losses, *nothing = _run(0, rows, *call)
        return losses.to(accumulate_dtype(x.dtype)), *nothing
    total = _total_weight(target, class_weight, ignore_index) if reduction == _MEAN else 1
    losses, *found = _run(gradients, rows / total, *call)
    return (losses.sum() / total).to(accumulate_dtype(x.dtype)), *found


def backward(
    grad_loss: Tensor,
    unit_grad_x: Tensor,
    unit_grad_weight: Tensor,
    unit_grad_bias: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    p: Tensor,
    label_smoothing: Tensor,
    seed: Tensor,
    num_samples: int,
    ignore_index: int,
    reduction: int,
    gradients: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the wanted gradients: those of the forward pass times ``grad_loss``, or computed now for row-wise losses."""
    if reduction == _NONE:
        call = (x, weight, bias, target, class_weight, p, label_smoothing, seed, num_samples, ignore_index)
        _, *found = _run(gradients, grad_loss, *call)
    else:
        found = [unit_grad_x * grad_loss, unit_grad_weight * grad_loss, unit_grad_bias * grad_loss]
    grad_x, grad_weight, grad_bias = (gradient.to(x.dtype) for gradient in found)
    return grad_x, grad_weight, grad_bias


def _total_weight(target: Tensor, class_weight: Tensor | None, ignore_index: int) -> Tensor:
    """Return the denominator of the mean: the class weights of the rows that count, added up."""
    counts = target != ignore_index
    if class_weight is None:
        return counts.sum()
    return torch.where(counts, class_weight[torch.where(counts, target, 0)], 0).sum(dtype=torch.float64)


class _Plan(NamedTuple):
    """Sizes of tiles and chunks. Each product keeps two sides of a tile rows x classes x features and sums over the third."""

    rows: int
    classes: int
    features: int
    depth: int  # of one step of a sum
    warps: int
    softmax_rows: int
    softmax_classes: int
    chunk_rows: int
    stores_operand: bool
    splits: int  # of a chunk's rows, for the weight gradient


def _plan(x: Tensor, weight: Tensor, num_samples: int) -> _Plan:
    (rows, features), classes = x.shape, weight.shape[0]
    wide_bytes = accumulate_dtype(x.dtype).itemsize
    # As large as the registers hold: the input gradient has two sums of rows x features, float64 takes two registers.
    most, warps = ((64, 64, 32), 4) if wide_bytes == 8 else ((128, 128, 64), 8)
    tile_rows, tile_classes, tile_features = (
        min(largest, max(16, triton.next_power_of_2(size)))  # tl.dot begins at 16
        for largest, size in zip(most, (rows * num_samples, classes, features), strict=True)
    )
    depth = 32 if x.dtype.itemsize == 2 else 16
    # A mask costs about twenty integer instructions an element, a tile of 128 classes as many tensor core cycles as eight
    # such instructions, a load less than one: a second tile of classes should load what the first one had to make.
    stores_operand = classes > tile_classes
    row_bytes = num_samples * max(classes * wide_bytes, features * x.dtype.itemsize * stores_operand)
    chunk_rows = max(1, min(rows, CHUNK_BYTES // row_bytes))
    tiles = triton.cdiv(classes, tile_classes) * triton.cdiv(features, tile_features)
    steps = chunk_rows * num_samples // depth
    splits = max(1, min(FILLING_PROGRAMS // max(1, tiles), steps // LEAST_STEPS))
    softmax_classes = min(SOFTMAX_ELEMENTS, triton.next_power_of_2(classes))
    softmax_rows = SOFTMAX_ELEMENTS // softmax_classes
    return _Plan(
        tile_rows, tile_classes, tile_features, depth, warps, softmax_rows, softmax_classes, chunk_rows, stores_operand, splits
    )  # fmt: skip


def _operand_types(dtype: torch.dtype) -> tuple[tl.dtype, tl.dtype, str]:
    """Return the operand type of the logits, that of the gradients, and the precision of float32 products."""
    if dtype == torch.bfloat16 and interpreting():
        return tl.float32, tl.float32, "ieee"  # the interpreter keeps bfloat16 as bits and cannot multiply them
    return {
        torch.float64: (tl.float64, tl.float64, "ieee"),
        torch.float32: (tl.float32, tl.float32, FLOAT32_PRECISION),
        torch.bfloat16: (tl.bfloat16, tl.bfloat16, "ieee"),
        # g is often below the least float16. tf32 has the range of float32 and holds every float16.
        torch.float16: (tl.float16, tl.float32, "tf32"),
    }[dtype]


def _run(
    gradients: int,
    row_gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    p: Tensor,
    label_smoothing: Tensor,
    seed: Tensor,
    num_samples: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return row losses [B], float64, and the wanted gradients, given that of the result with respect to the row losses."""
    _check_values(weight, target, p, label_smoothing, ignore_index)
    x, weight, target = x.contiguous(), weight.contiguous(), target.contiguous()
    bias, class_weight = (None if v is None else v.contiguous() for v in (bias, class_weight))
    (rows, features), classes = x.shape, weight.shape[0]
    wide = accumulate_dtype(x.dtype)
    plan = _plan(x, weight, num_samples)
    masked_rows = plan.chunk_rows * num_samples
    class_tiles, feature_tiles = triton.cdiv(classes, plan.classes), triton.cdiv(features, plan.features)
    mask = whole_call_mask if features % WORDS_PER_CALL.value == 0 else any_place_mask
    operand, gradient_operand, precision = _operand_types(x.dtype)

    row_scale = (row_gradient / num_samples).to(wide).contiguous()
    losses = x.new_empty((rows, num_samples), dtype=wide)
    z = x.new_empty((masked_rows, classes), dtype=wide)
    stored = x.new_empty((masked_rows, features) if plan.stores_operand else 0)
    grad_x = x.new_empty(x.shape if gradients & _GRAD_X else 0, dtype=wide)
    weight_shape = (plan.splits, *weight.shape) if gradients & _GRAD_WEIGHT else (1, 0)
    grad_weight = x.new_zeros(weight_shape, dtype=wide)
    grad_bias = x.new_zeros(classes if gradients & _GRAD_BIAS else 0, dtype=wide)

    with torch.cuda.device_of(x):
        for first in range(0, rows, plan.chunk_rows):
            here = min(plan.chunk_rows, rows - first)
            count = here * num_samples
            row_tiles = triton.cdiv(count, plan.rows)
            source = (x, first, num_samples, mask)
            if plan.stores_operand:
                _masked_operand[(row_tiles * feature_tiles,)](
                    *source, stored, p, seed, count, features, plan.rows, plan.features, num_warps=plan.warps
                )
                source = (stored, 0, 1, no_mask)
            _logits[(row_tiles * class_tiles,)](
                *source, weight, bias, z, p, seed, count, features, classes,
                operand, precision, plan.rows, plan.classes, plan.depth, num_warps=plan.warps,
            )
            _softmax_rows[(triton.cdiv(count, plan.softmax_rows),)](
                z, losses, target, class_weight, label_smoothing, row_scale, first, count, classes, num_samples,
                ignore_index, gradients != 0, plan.softmax_rows, plan.softmax_classes,
            )
            if gradients & _GRAD_WEIGHT:
                _weight_gradient[(class_tiles * feature_tiles, plan.splits)](
                    *source, z, grad_weight, p, seed, count, features, classes,
                    gradient_operand, precision, plan.depth, plan.classes, plan.features, num_warps=plan.warps,
                )
            if gradients & _GRAD_BIAS:
                grad_bias += z[:count].sum(0)
            if gradients & _GRAD_X:
                _input_gradient[(triton.cdiv(here, plan.rows) * feature_tiles,)](
                    z, weight, grad_x, p, seed, first, here, features, classes, num_samples,
                    mask, gradient_operand, precision, plan.rows, plan.depth, plan.features, num_warps=plan.warps,
                )  # fmt: skip
    grad_weight = grad_weight[0] if plan.splits == 1 else grad_weight.sum(0)
    return losses.mean(1, dtype=torch.float64), grad_x, grad_weight, grad_bias


# Masks. mask(draw, row, sample, first, features, BLOCK) gives m [rows, BLOCK] for features first, first + 1, ... of rows
# [rows, 1] (int64); the sample is [rows, 1] or one number. Kernels take the function, so another kind of mask is one more.
@triton.jit
def whole_call_mask(draw, row, sample, first, features, BLOCK: tl.constexpr):
    """Make a Bernoulli mask where rows begin with a Philox call: features % 4 = 0."""
    bits, rule = draw
    call = (row * features + first) // WORDS_PER_CALL
    call += tl.arange(0, BLOCK // WORDS_PER_CALL)[None, :]
    return keep_calls(bits, rule, call, sample)


@triton.jit
def any_place_mask(draw, row, sample, first, features, BLOCK: tl.constexpr):
    """Make a Bernoulli mask where rows begin anywhere."""
    bits, rule = draw
    return keep_elements(bits, rule, row * features + first + tl.arange(0, BLOCK)[None, :], sample)


@triton.jit
def no_mask(draw, row, sample, first, features, BLOCK: tl.constexpr):
    """Keep everything."""
    return tl.full((row.shape[0], BLOCK), 1, tl.int1)


@triton.jit
def _masked_features(
    x, first_row, num_samples, MASK: tl.constexpr, draw, e, count, first, features, BLOCK: tl.constexpr
):
    """Return m_e * x_i [e, BLOCK] of features first, first + 1, ...: selected, so that a NaN under a dropped element stays there."""
    row, sample = first_row + (e // num_samples).to(tl.int64), e % num_samples
    d = first + tl.arange(0, BLOCK)[None, :]
    # The mask is no condition of the load, which would then be made element by element.
    values = tl.load(x + row * features + d, (e < count) & (d < features), 0.0)
    return tl.where(MASK(draw, row, sample, first, features, BLOCK), values, 0.0)


# h_e = m_e * x_i
@triton.jit
def _masked_operand(
    x, first_row, num_samples, MASK: tl.constexpr, h, p, seed, count, features,
    ROWS: tl.constexpr, FEATURES: tl.constexpr,
):
    feature_tiles = tl.cdiv(features, FEATURES)
    e = (tl.program_id(0) // feature_tiles * ROWS + tl.arange(0, ROWS))[:, None]
    first = tl.program_id(0) % feature_tiles * FEATURES
    d = first + tl.arange(0, FEATURES)[None, :]
    draw = tl.load(seed), drop_rule(p)
    values = _masked_features(x, first_row, num_samples, MASK, draw, e, count, first, features, FEATURES)
    tl.store(h + e.to(tl.int64) * features + d, values, (e < count) & (d < features))


# z_e = r (m_e * x_i) W^T + b
@triton.jit
def _logits(
    x, first_row, num_samples, MASK: tl.constexpr, weight, bias, z, p, seed, count, features, classes,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, DEPTH: tl.constexpr,
):
    class_tiles = tl.cdiv(classes, CLASSES)
    e = (tl.program_id(0) // class_tiles * ROWS + tl.arange(0, ROWS))[:, None]
    c = (tl.program_id(0) % class_tiles * CLASSES + tl.arange(0, CLASSES))[None, :]
    draw = tl.load(seed), drop_rule(p)
    total = tl.zeros((ROWS, CLASSES), z.dtype.element_ty)
    for first in range(0, features, DEPTH):
        h = _masked_features(x, first_row, num_samples, MASK, draw, e, count, first, features, DEPTH)
        d = first + tl.arange(0, DEPTH)[:, None]
        w = tl.load(weight + c.to(tl.int64) * features + d, (c < classes) & (d < features), 0.0)
        total = tl.dot(h.to(OPERAND), w.to(OPERAND), total, input_precision=PRECISION, out_dtype=total.dtype)
    total *= keep_scale(p).to(total.dtype)
    if bias is not None:
        total += tl.load(bias + c, c < classes, 0.0).to(total.dtype)
    tl.store(z + e.to(tl.int64) * classes + c, total, (e < count) & (c < classes))


# t_ic = (1 - eps) omega_y [c = y] + eps omega_c / C, zero on an ignored row
@triton.jit
def _target_rows(y, c, class_weight, epsilon, ignore_index, classes):
    omega = (c < classes).to(epsilon.dtype)
    if class_weight is not None:
        omega = tl.load(class_weight + c, c < classes, 0.0).to(epsilon.dtype)
    t = tl.where(c == y, (1.0 - epsilon) * omega, 0.0) + epsilon * omega / classes
    return tl.where(y != ignore_index, t, 0.0)


# l_e = sum_c t_ic (lse(z_e) - z_ec);   z_e <- g_e = (softmax(z_e) sum_c t_ic - t_i) rho_i
@triton.jit
def _softmax_rows(
    z, losses, target, class_weight, label_smoothing, row_scale, first_row, rows, classes, num_samples, ignore_index,
    GRADIENTS: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):
    ACC: tl.constexpr = z.dtype.element_ty
    e = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = (e < rows)[:, None]
    row = first_row + (e // num_samples).to(tl.int64)
    y = tl.load(target + row, e < rows, ignore_index)[:, None]
    epsilon = tl.load(label_smoothing).to(ACC)
    z += e.to(tl.int64)[:, None] * classes

    largest = tl.full((ROWS,), float("-inf"), ACC)
    sum_exp = tl.zeros((ROWS,), ACC)
    sum_t = tl.zeros((ROWS,), ACC)
    for first in range(0, classes, CLASSES):
        c = first + tl.arange(0, CLASSES)[None, :]
        logits = tl.load(z + c, exists & (c < classes), 0.0)
        logits = tl.where(c < classes, logits, float("-inf"))
        higher = tl.maximum(largest, tl.max(logits, 1))
        # While all logits are -inf their distance to the largest is not a number, so it is taken to 0.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        sum_exp = sum_exp * tl.exp(largest - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        sum_t += tl.sum(_target_rows(y, c, class_weight, epsilon, ignore_index, classes), 1)
        largest = higher
    lse = (largest + tl.log(sum_exp))[:, None]

    loss = tl.zeros((ROWS,), ACC)
    rho = tl.load(row_scale + row, e < rows, 0.0)[:, None]
    for first in range(0, classes, CLASSES):
        c = first + tl.arange(0, CLASSES)[None, :]
        inside = exists & (c < classes)
        logits = tl.load(z + c, inside, 0.0)
        t = _target_rows(y, c, class_weight, epsilon, ignore_index, classes)
        # A class outside the target row may have the logit -inf.
        loss += tl.sum(tl.where(t != 0.0, t * (lse - logits), 0.0), 1)
        if GRADIENTS:
            gradient = (tl.exp(logits - lse) * sum_t[:, None] - t) * rho
            tl.store(z + c, tl.where(y != ignore_index, gradient, 0.0), inside)
    # Row i, sample s of all is at i M + s too.
    first_row = tl.cast(first_row, tl.int64)
    tl.store(losses + first_row * num_samples + e, loss, e < rows)


# dW += r sum_e g_e (m_e * x_i)^T: every splits-th step over the effective rows, into the gradient of this split
@triton.jit
def _weight_gradient(
    x, first_row, num_samples, MASK: tl.constexpr, g, grad_weight, p, seed, count, features, classes,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, DEPTH: tl.constexpr, CLASSES: tl.constexpr, FEATURES: tl.constexpr,
):
    feature_tiles = tl.cdiv(features, FEATURES)
    first_feature = tl.program_id(0) % feature_tiles * FEATURES
    c = (tl.program_id(0) // feature_tiles * CLASSES + tl.arange(0, CLASSES))[:, None]
    draw = tl.load(seed), drop_rule(p)
    total = tl.zeros((CLASSES, FEATURES), g.dtype.element_ty)
    for first in range(tl.program_id(1) * DEPTH, count, tl.num_programs(1) * DEPTH):
        e = first + tl.arange(0, DEPTH)
        place = e.to(tl.int64)[None, :] * classes + c
        g_t = tl.load(g + place, (e < count)[None, :] & (c < classes), 0.0)
        h = _masked_features(
            x, first_row, num_samples, MASK, draw, e[:, None], count, first_feature, features, FEATURES
        )
        total = tl.dot(g_t.to(OPERAND), h.to(OPERAND), total, input_precision=PRECISION, out_dtype=total.dtype)
    d = first_feature + tl.arange(0, FEATURES)[None, :]
    inside = (c < classes) & (d < features)
    out = grad_weight + (tl.program_id(1) * tl.cast(classes, tl.int64) + c) * features + d
    tl.store(out, tl.load(out, inside) + total * keep_scale(p).to(total.dtype), inside)


# dx_i = r sum_s m_e * (g_e W)
@triton.jit
def _input_gradient(
    g, weight, grad_x, p, seed, first_row, rows, features, classes, num_samples,
    MASK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, FEATURES: tl.constexpr,
):
    feature_tiles = tl.cdiv(features, FEATURES)
    first_feature = tl.program_id(0) % feature_tiles * FEATURES
    i = (tl.program_id(0) // feature_tiles * ROWS + tl.arange(0, ROWS))[:, None]
    d = first_feature + tl.arange(0, FEATURES)[None, :]
    row = first_row + i.to(tl.int64)
    draw = tl.load(seed), drop_rule(p)
    total = tl.zeros((ROWS, FEATURES), g.dtype.element_ty)
    for sample in range(num_samples):
        e = i.to(tl.int64) * num_samples + sample
        product = tl.zeros((ROWS, FEATURES), g.dtype.element_ty)
        for first in range(0, classes, DEPTH):
            c = first + tl.arange(0, DEPTH)
            g_e = tl.load(g + e * classes + c[None, :], (i < rows) & (c < classes)[None, :], 0.0)
            c = c.to(tl.int64)[:, None]
            w = tl.load(weight + c * features + d, (c < classes) & (d < features), 0.0)
            product = tl.dot(g_e.to(OPERAND), w.to(OPERAND), product, input_precision=PRECISION, out_dtype=product.dtype)
        total += tl.where(MASK(draw, row, sample, first_feature, features, FEATURES), product, 0.0)
    total *= keep_scale(p).to(total.dtype)
    tl.store(grad_x + row * features + d, total, (i < rows) & (d < features))
