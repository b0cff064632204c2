"""Triton kernels of masked linear cross-entropy: logits, softmax and gradients, chunk by chunk.

The CUDA twin of csrc/cpu/masked_linear_cross_entropy_kernels.h. Effective row e is sample s of row
i, at place i M + s; t_i is its target row, rho_i the gradient of the result with respect to l_e.

    z_e = r (m_e * x_i) W^T + b,   r = 1 / (1 - p)
    l_e = sum_c t_ic (lse(z_e) - z_ec)
    g_e = (softmax(z_e) sum_c t_ic - t_i) rho_i
    dW = r sum_e g_e (m_e * x_i)^T,   dx_i = r sum_s m_e * (g_e W),   db = sum_e g_e

Masks are made in registers where a product reads them; if several tiles of classes would make the
same mask, m * x of the chunk is stored once. The logits of a chunk turn into their gradient in
place. Nothing of size rows x samples leaves the chunk but the losses. No two programs of a launch
add to the same number: results repeat bit by bit.
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
    backward_by,
)
from regularizers.ops.triton.philox import (
    WORDS_PER_CALL,
    drop_rule,
    keep_calls,
    keep_elements,
    keep_scale,
)

# What a chunk's logits may take, and its stored m * x: within the second-level cache of a large
# GPU, and so little that memory does not grow with M. A chunk is at least one row, all its samples.
CHUNK_BYTES = 32 << 20
# "tf32x3" takes three tensor core products for nearly the same digits, "tf32" one for three digits.
FLOAT32_PRECISION = "ieee"
# tl.dot takes no smaller side.
LEAST_TILE = 16
# Programs that a large GPU runs at once; a weight gradient of fewer tiles is split over the rows.
FILLING_PROGRAMS = 256
# Steps of the sum over effective rows that make a split worth a gradient of its own.
LEAST_STEPS = 8
# Elements of the tile that the softmax works on at a time, eight a thread.
SOFTMAX_ELEMENTS = 1024
# Rows of z are padded to what Triton needs to know for 16-byte accesses; the padding of g is zero.
CLASS_ALIGNMENT = 16


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
    if reduction == _NONE:
        gradients = 0  # found in the backward pass, when the weights of the rows are known
    total = _total_weight(target, class_weight, ignore_index) if reduction == _MEAN else 1
    rows = x.new_ones(x.shape[0], dtype=torch.float64) / total
    data = (x, weight, bias, target, class_weight, p, label_smoothing, seed)
    losses, *found = _run(gradients, rows, *data, num_samples, ignore_index)
    loss = losses if reduction == _NONE else losses.sum() / total
    grad_x, grad_weight, grad_bias = found
    return loss.to(accumulate_dtype(x.dtype)), grad_x, grad_weight, grad_bias


def _total_weight(target: Tensor, class_weight: Tensor | None, ignore_index: int) -> Tensor:
    """Return the denominator of the mean: the class weights of the rows that count, added up."""
    counts = target != ignore_index
    if class_weight is None:
        return counts.sum()
    omega_y = class_weight[torch.where(counts, target, 0)]
    return torch.where(counts, omega_y, 0).sum(dtype=torch.float64)


class _Plan(NamedTuple):
    """Sizes of tiles and chunks.

    A product keeps two sides of the tile rows x classes x features and sums over the third.
    """

    rows: int
    classes: int
    features: int
    depth: int  # of one step of a sum
    warps: int
    softmax_rows: int
    softmax_classes: int
    padded: int  # length of a row of z
    chunk_rows: int
    stores_operand: bool
    splits: int  # of a chunk's rows, for the weight gradient


def _plan(x: Tensor, weight: Tensor, num_samples: int) -> _Plan:
    (rows, features), classes = x.shape, weight.shape[0]
    wide_bytes = accumulate_dtype(x.dtype).itemsize
    # As large as the registers hold: the input gradient keeps two sums of rows x features, and a
    # float64 takes two registers.
    most, warps = ((64, 64, 32), 4) if wide_bytes == 8 else ((128, 128, 64), 8)
    tile_rows, tile_classes, tile_features = (
        min(largest, max(LEAST_TILE, triton.next_power_of_2(size)))
        for largest, size in zip(most, (rows * num_samples, classes, features), strict=True)
    )
    depth = 32 if x.dtype.itemsize == 2 else 16
    padded = triton.cdiv(classes, CLASS_ALIGNMENT) * CLASS_ALIGNMENT
    # A mask takes about twenty integer instructions an element, several times as long as the tensor
    # cores take to multiply that element into a tile of classes: a second tile loads it instead.
    stores_operand = classes > tile_classes
    operand_bytes = features * x.dtype.itemsize if stores_operand else 0
    row_bytes = num_samples * max(padded * wide_bytes, operand_bytes)
    chunk_rows = max(1, min(rows, CHUNK_BYTES // row_bytes))
    tiles = max(1, triton.cdiv(classes, tile_classes) * triton.cdiv(features, tile_features))
    steps = chunk_rows * num_samples // depth
    softmax_classes = min(SOFTMAX_ELEMENTS, triton.next_power_of_2(padded))
    return _Plan(
        rows=tile_rows,
        classes=tile_classes,
        features=tile_features,
        depth=depth,
        warps=warps,
        softmax_rows=SOFTMAX_ELEMENTS // softmax_classes,
        softmax_classes=softmax_classes,
        padded=padded,
        chunk_rows=chunk_rows,
        stores_operand=stores_operand,
        splits=max(1, min(FILLING_PROGRAMS // tiles, steps // LEAST_STEPS)),
    )


def _operand_types(dtype: torch.dtype) -> tuple[tl.dtype, tl.dtype, str]:
    """Return the operand type of z, that of dW and dx, and the precision of float32 products."""
    if dtype == torch.bfloat16 and interpreting():
        # The interpreter keeps bfloat16 as bits, which it cannot multiply.
        return tl.float32, tl.float32, "ieee"
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
    """Return the row losses [B] in float64 and the wanted gradients, given those of the losses."""
    _check_values(weight, target, p, label_smoothing, ignore_index)
    x, weight, target = x.contiguous(), weight.contiguous(), target.contiguous()
    bias, class_weight = (None if v is None else v.contiguous() for v in (bias, class_weight))
    (rows, features), classes = x.shape, weight.shape[0]
    wide = accumulate_dtype(x.dtype)
    plan = _plan(x, weight, num_samples)
    mask = whole_call_mask if features % WORDS_PER_CALL.value == 0 else any_place_mask
    operand, gradient_operand, precision = _operand_types(x.dtype)
    class_tiles = triton.cdiv(classes, plan.classes)
    feature_tiles = triton.cdiv(features, plan.features)

    chunk = plan.chunk_rows * num_samples
    row_scale = (row_gradient / num_samples).to(wide).contiguous()
    losses = x.new_empty((rows, num_samples), dtype=wide)
    z = x.new_empty((chunk, plan.padded), dtype=wide)
    stored = x.new_empty((chunk, features) if plan.stores_operand else 0)
    split_shape = (plan.splits, *weight.shape) if gradients & _GRAD_WEIGHT else (1, 0)
    grad_x = x.new_empty(x.shape if gradients & _GRAD_X else 0, dtype=wide)
    grad_weight = x.new_zeros(split_shape, dtype=wide)
    grad_bias = x.new_zeros(classes if gradients & _GRAD_BIAS else 0, dtype=wide)

    with torch.cuda.device_of(x):
        for first in range(0, rows, plan.chunk_rows):
            here = min(plan.chunk_rows, rows - first)
            count = here * num_samples
            row_tiles = triton.cdiv(count, plan.rows)
            source = (x, first, num_samples, mask)
            if plan.stores_operand:
                _masked_operand[(row_tiles * feature_tiles,)](
                    *source, stored, p, seed, count, features,
                    plan.rows, plan.features, num_warps=plan.warps,
                )  # fmt: skip
                source = (stored, 0, 1, no_mask)
            _logits[(row_tiles * class_tiles,)](
                *source, weight, bias, z, p, seed, count, features, classes, plan.padded,
                operand, precision, plan.rows, plan.classes, plan.depth, num_warps=plan.warps,
            )  # fmt: skip
            _softmax_rows[(triton.cdiv(count, plan.softmax_rows),)](
                z, losses, target, class_weight, label_smoothing, row_scale, first, count,
                classes, plan.padded, num_samples, ignore_index,
                gradients != 0, plan.softmax_rows, plan.softmax_classes,
            )  # fmt: skip
            if gradients & _GRAD_WEIGHT:
                _weight_gradient[(class_tiles * feature_tiles, plan.splits)](
                    *source, z, grad_weight, p, seed, count, features, classes, plan.padded,
                    gradient_operand, precision, plan.depth, plan.classes, plan.features,
                    num_warps=plan.warps,
                )  # fmt: skip
            if gradients & _GRAD_BIAS:
                grad_bias += z[:count, :classes].sum(0)
            if gradients & _GRAD_X:
                _input_gradient[(triton.cdiv(here, plan.rows) * feature_tiles,)](
                    z, weight, grad_x, p, seed, first, here, features, classes, plan.padded,
                    num_samples, mask, gradient_operand, precision,
                    plan.rows, plan.depth, plan.features, num_warps=plan.warps,
                )  # fmt: skip
    grad_weight = grad_weight[0] if plan.splits == 1 else grad_weight.sum(0)
    return losses.mean(1, dtype=torch.float64), grad_x, grad_weight, grad_bias


backward = backward_by(lambda *call: _run(*call)[1:])


# Masks: mask(draw, row, sample, first, features, BLOCK) gives m [rows, BLOCK] for the features from
# `first` on of rows [rows, 1] (int64); the sample is [rows, 1] or one number. Kernels take the
# function as an argument, so another kind of mask is another function.
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
    source, MASK: tl.constexpr, draw, e, count, first, features, BLOCK: tl.constexpr
):
    """Return m_e * x_i [e, BLOCK], features from ``first`` on.

    Dropped elements are selected out, never multiplied: a NaN under one stays there.
    """
    x, first_row, num_samples = source
    row, sample = first_row + (e // num_samples).to(tl.int64), e % num_samples
    d = first + tl.arange(0, BLOCK)[None, :]
    # The mask is no condition of the load, which would then be made element by element.
    values = tl.load(x + row * features + d, (e < count) & (d < features), 0.0)
    return tl.where(MASK(draw, row, sample, first, features, BLOCK), values, 0.0)


# h_e = m_e * x_i
@triton.jit(do_not_specialize=["first_row", "count"])
def _masked_operand(
    x, first_row, num_samples, MASK: tl.constexpr, h, p, seed, count, features,
    ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    feature_tiles = tl.cdiv(features, FEATURES)
    e = (tl.program_id(0) // feature_tiles * ROWS + tl.arange(0, ROWS))[:, None]
    first = tl.program_id(0) % feature_tiles * FEATURES
    d = first + tl.arange(0, FEATURES)[None, :]
    draw = tl.load(seed), drop_rule(p)
    source = x, first_row, num_samples
    values = _masked_features(source, MASK, draw, e, count, first, features, FEATURES)
    tl.store(h + e.to(tl.int64) * features + d, values, (e < count) & (d < features))


@triton.jit
def _add_product(total, left, right, PRECISION: tl.constexpr):
    return tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)


# z_e = r (m_e * x_i) W^T + b
@triton.jit(do_not_specialize=["first_row", "count"])
def _logits(
    x, first_row, num_samples, MASK: tl.constexpr, weight, bias, z, p, seed,
    count, features, classes, padded, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    class_tiles = tl.cdiv(classes, CLASSES)
    e = (tl.program_id(0) // class_tiles * ROWS + tl.arange(0, ROWS))[:, None]
    c = (tl.program_id(0) % class_tiles * CLASSES + tl.arange(0, CLASSES))[None, :]
    source, draw = (x, first_row, num_samples), (tl.load(seed), drop_rule(p))
    total = tl.zeros((ROWS, CLASSES), z.dtype.element_ty)
    for first in range(0, features, DEPTH):
        h = _masked_features(source, MASK, draw, e, count, first, features, DEPTH)
        d = first + tl.arange(0, DEPTH)[:, None]
        w = tl.load(weight + c.to(tl.int64) * features + d, (c < classes) & (d < features), 0.0)
        total = _add_product(total, h.to(OPERAND), w.to(OPERAND), PRECISION)
    total *= keep_scale(p).to(total.dtype)
    if bias is not None:
        total += tl.load(bias + c, c < classes, 0.0).to(total.dtype)
    tl.store(z + e.to(tl.int64) * padded + c, total, (e < count) & (c < padded))


# t_ic = (1 - eps) omega_y [c = y] + eps omega_c / C, zero on an ignored row
@triton.jit
def _target_rows(y, c, class_weight, epsilon, ignore_index, classes):
    omega = (c < classes).to(epsilon.dtype)
    if class_weight is not None:
        omega = tl.load(class_weight + c, c < classes, 0.0).to(epsilon.dtype)
    t = tl.where(c == y, (1.0 - epsilon) * omega, 0.0) + epsilon * omega / classes
    return tl.where(y != ignore_index, t, 0.0)


# l_e = sum_c t_ic (lse(z_e) - z_ec);   z_e <- g_e = (softmax(z_e) sum_c t_ic - t_i) rho_i
@triton.jit(do_not_specialize=["first_row", "count", "ignore_index"])
def _softmax_rows(
    z, losses, target, class_weight, label_smoothing, row_scale, first_row, count,
    classes, padded, num_samples, ignore_index,
    GRADIENTS: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = z.dtype.element_ty
    e = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = e < count
    row = first_row + (e // num_samples).to(tl.int64)
    y = tl.load(target + row, exists, ignore_index)[:, None]
    epsilon = tl.load(label_smoothing).to(ACC)
    z += e.to(tl.int64)[:, None] * padded

    largest = tl.full((ROWS,), float("-inf"), ACC)
    sum_exp = tl.zeros((ROWS,), ACC)
    sum_t = tl.zeros((ROWS,), ACC)
    for first in range(0, classes, CLASSES):
        c = first + tl.arange(0, CLASSES)[None, :]
        logits = tl.load(z + c, exists[:, None] & (c < padded), 0.0)
        logits = tl.where(c < classes, logits, float("-inf"))
        higher = tl.maximum(largest, tl.max(logits, 1))
        # While all logits are -inf, their distance to the largest is none: it is taken to 0.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        sum_exp = sum_exp * tl.exp(largest - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        sum_t += tl.sum(_target_rows(y, c, class_weight, epsilon, ignore_index, classes), 1)
        largest = higher
    lse = (largest + tl.log(sum_exp))[:, None]

    loss = tl.zeros((ROWS,), ACC)
    rho = tl.load(row_scale + row, exists, 0.0)[:, None]
    # Over the padding too: it must be zero where a row of NaN has left NaN there.
    for first in range(0, padded, CLASSES):
        c = first + tl.arange(0, CLASSES)[None, :]
        inside = exists[:, None] & (c < padded)
        logits = tl.load(z + c, inside, 0.0)
        t = _target_rows(y, c, class_weight, epsilon, ignore_index, classes)
        # A class outside the target row may have the logit -inf.
        loss += tl.sum(tl.where(t != 0.0, t * (lse - logits), 0.0), 1)
        if GRADIENTS:
            gradient = (tl.exp(logits - lse) * sum_t[:, None] - t) * rho
            tl.store(z + c, tl.where((y != ignore_index) & (c < classes), gradient, 0.0), inside)
    # Row i, sample s of all is at i M + s too.
    place = tl.cast(first_row, tl.int64) * num_samples + e
    tl.store(losses + place, loss, exists)


# dW += r sum_e g_e (m_e * x_i)^T: a split takes every splits-th step over e and has its own dW
@triton.jit(do_not_specialize=["first_row", "count"])
def _weight_gradient(
    x, first_row, num_samples, MASK: tl.constexpr, g, grad_weight, p, seed,
    count, features, classes, padded, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    DEPTH: tl.constexpr, CLASSES: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    feature_tiles = tl.cdiv(features, FEATURES)
    first_feature = tl.program_id(0) % feature_tiles * FEATURES
    c = (tl.program_id(0) // feature_tiles * CLASSES + tl.arange(0, CLASSES))[:, None]
    source, draw = (x, first_row, num_samples), (tl.load(seed), drop_rule(p))
    total = tl.zeros((CLASSES, FEATURES), g.dtype.element_ty)
    for first in range(tl.program_id(1) * DEPTH, count, tl.num_programs(1) * DEPTH):
        e = first + tl.arange(0, DEPTH)
        place = e.to(tl.int64)[None, :] * padded + c
        g_t = tl.load(g + place, (e < count)[None, :] & (c < padded), 0.0)
        e = e[:, None]
        h = _masked_features(source, MASK, draw, e, count, first_feature, features, FEATURES)
        total = _add_product(total, g_t.to(OPERAND), h.to(OPERAND), PRECISION)
    d = first_feature + tl.arange(0, FEATURES)[None, :]
    inside = (c < classes) & (d < features)
    out = grad_weight + (tl.program_id(1) * tl.cast(classes, tl.int64) + c) * features + d
    tl.store(out, tl.load(out, inside) + total * keep_scale(p).to(total.dtype), inside)


# dx_i = r sum_s m_e * (g_e W)
@triton.jit(do_not_specialize=["first_row", "rows"])
def _input_gradient(
    g, weight, grad_x, p, seed, first_row, rows, features, classes, padded, num_samples,
    MASK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
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
            g_e = tl.load(g + e * padded + c[None, :], (i < rows) & (c < padded)[None, :], 0.0)
            c = c.to(tl.int64)[:, None]
            w = tl.load(weight + c * features + d, (c < classes) & (d < features), 0.0)
            product = _add_product(product, g_e.to(OPERAND), w.to(OPERAND), PRECISION)
        total += tl.where(MASK(draw, row, sample, first_feature, features, FEATURES), product, 0.0)
    total *= keep_scale(p).to(total.dtype)
    tl.store(grad_x + row * features + d, total, (i < rows) & (d < features))
