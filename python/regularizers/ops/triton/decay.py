"""Triton kernels of the optimizer step over a table of tensors: a program a chunk.

The fallback of csrc/cuda/decay.cu; the table and the formulas are those of csrc/decay_table.h.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from regularizers.ops.decay import TYPES, _through_table
from regularizers.ops.tensor_table import COLUMNS
from regularizers.ops.triton.philox import WORDS_PER_CALL, call_words

STORAGE_TYPES = (tl.float32, tl.float64, tl.bfloat16, tl.float16)
BLOCK = 1024
NUM_COLUMNS = tl.constexpr(len(COLUMNS))


def decoupled_adam_table(
    table: Tensor,
    chunks: Tensor,
    steps: Tensor,
    deltas: Tensor | None,
    partials: Tensor,
    sums: Tensor | None,
    lr: Tensor,
    weight_decay: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    seed: Tensor | None,
    eps: float,
    penalty: int,
    prox: bool,
    decay_first: bool,
    maximize: bool,
    bias_correction: bool,
    type: int,
    chunk_size: int,
) -> None:
    """Step all tensors of a table."""
    with torch.cuda.device_of(table):
        if chunks.numel() > 0:
            _adam[(chunks.numel(),)](
                table,
                chunks,
                steps,
                deltas,
                partials,
                lr,
                weight_decay,
                beta1,
                beta2,
                grad_scale,
                found_inf,
                seed,
                eps,
                penalty,
                prox,
                decay_first,
                maximize,
                bias_correction,
                STORAGE_TYPES[type],
                tl.float64 if TYPES[type] == torch.float64 else tl.float32,
                chunk_size,
                BLOCK,
            )
        if sums is not None and table.shape[0] > 0:
            _sums[(table.shape[0],)](table, partials, sums, found_inf, chunk_size, BLOCK)


decoupled_adam = _through_table(decoupled_adam_table)


@triton.jit
def _address(row, column: tl.constexpr, TYPE: tl.constexpr):
    """Return the address in a column of a row, and whether there is one."""
    address = tl.load(row + column)
    return address.to(tl.pointer_type(TYPE)), address != 0


@triton.jit
def _power(base, exponent):
    """Return base^exponent for 0 <= base < 1 and exponent > 0."""
    return tl.where(base > 0.0, tl.exp2(exponent * tl.log2(tl.where(base > 0.0, base, 1.0))), 0.0)


@triton.jit
def _clip(x, bound):
    """Clip to [-bound, bound]; NaN stays NaN."""
    x = tl.where(x < -bound, -bound, x)
    return tl.where(x > bound, bound, x)


@triton.jit
def _rule(tau, delta, PENALTY: tl.constexpr, PROX: tl.constexpr):
    """Return slope and bound of the decay clip(slope x, -bound, bound)."""
    slope, bound = tau, tau * 0.0
    if PROX:
        slope = tau / (1.0 + tau)
    if PENALTY == 0:
        slope = slope * 0.0
    elif PENALTY == 1:
        bound = bound + float("inf")
    elif PENALTY == 2:
        # The sign of x as a slope that reaches the bound at once, for all but subnormal x.
        slope, bound = tau * 0.0 + (1.0 if PROX else 3.4028234663852886e38), tau
    else:
        bound = tau * delta
    return slope, bound


@triton.jit
def _adam(
    table,
    chunks,
    steps,
    deltas,
    partials,
    lr,
    weight_decay,
    beta1,
    beta2,
    grad_scale,
    found_inf,
    seed,
    eps,
    PENALTY: tl.constexpr,
    PROX: tl.constexpr,
    DECAY_FIRST: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,
    T: tl.constexpr,
    A: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks + chunk)
    row = table + tensor * NUM_COLUMNS
    param, _ = _address(row, 0, T)
    grad, _ = _address(row, 1, T)
    exp_avg, _ = _address(row, 2, A)
    exp_avg_sq, _ = _address(row, 3, A)
    max_exp_avg_sq, has_max = _address(row, 4, A)
    master, has_master = _address(row, 5, A)
    reference, has_reference = _address(row, 6, T)
    mask, has_mask = _address(row, 7, tl.int8)
    numel, first_chunk = tl.load(row + 8), tl.load(row + 9)

    rate, b1, b2 = tl.load(lr), tl.load(beta1), tl.load(beta2)
    step_size, inverse_root = rate, rate * 0.0 + 1.0
    if BIAS_CORRECTION:
        t = tl.load(steps + tensor).to(tl.float64)
        step_size = rate / (1.0 - _power(b1, t))
        inverse_root = 1.0 / tl.sqrt(1.0 - _power(b2, t))
    delta = rate * 0.0
    if deltas is not None:
        delta = tl.load(deltas + tensor)
    slope, bound = _rule(rate * tl.load(weight_decay), delta, PENALTY, PROX)
    factor = rate * 0.0 + (-1.0 if MAXIMIZE else 1.0)
    if grad_scale is not None:
        factor = factor / tl.load(grad_scale).to(tl.float64)
    # The scalars are float64; what meets the elements is of their accumulation type.
    rest1, rest2 = (1.0 - b1).to(A), (1.0 - b2).to(A)
    b1, b2, factor = b1.to(A), b2.to(A), factor.to(A)
    step_size, inverse_root = step_size.to(A), inverse_root.to(A)
    slope, bound = slope.to(A), bound.to(A)

    first = (chunk - first_chunk) * CHUNK
    end = min(first + CHUNK, numel)
    if found_inf is not None:
        end = tl.where(tl.load(found_inf) == 0.0, end, first)
    total = tl.zeros([BLOCK], A)
    for block in range(0, CHUNK, BLOCK):
        e = first + block + tl.arange(0, BLOCK)
        inside = e < end
        g = tl.load(grad + e, inside, 0.0).to(A) * factor
        m = tl.load(exp_avg + e, inside, 0.0) * b1 + g * rest1
        v = tl.load(exp_avg_sq + e, inside, 0.0) * b2 + g * g * rest2
        tl.store(exp_avg + e, m, inside)
        tl.store(exp_avg_sq + e, v, inside)
        before = tl.load(max_exp_avg_sq + e, inside & has_max, 0.0)
        largest = tl.where(has_max & (before > v), before, v)
        tl.store(max_exp_avg_sq + e, largest, inside & has_max)
        root = tl.sqrt(largest) if tl.float64 == A else tl.sqrt_rn(largest)
        update = step_size * m / (root * inverse_root + eps)
        narrow = tl.load(param + e, inside & (has_master == 0), 0.0).to(A)
        x = tl.where(has_master, tl.load(master + e, inside & has_master, 0.0), narrow)
        base = x if DECAY_FIRST else x - update
        pull = tl.load(reference + e, inside & has_reference, 0.0).to(A)
        decay = _clip(slope * (base - pull), bound)
        acts = tl.load(mask + e, inside & has_mask, 0)
        decay = tl.where(has_mask & (acts == 0), 0.0, decay)
        new = (base - decay) - update if DECAY_FIRST else base - decay
        tl.store(master + e, new, inside & has_master)
        rounded = new.to(T)
        if seed is not None:
            rounded = _round(new, tl.load(seed), first + block, tensor, BLOCK)
        tl.store(param + e, rounded, inside)
        total += tl.where(inside, tl.abs(new), 0.0)
    tl.store(partials + chunk, tl.sum(total).to(tl.float64))


# Random bits below the last one that stays, then a cut; what is not finite is rounded to nearest.
@triton.jit
def _round(x, seed, first, stream, BLOCK: tl.constexpr):
    call = first // WORDS_PER_CALL + tl.arange(0, BLOCK // WORDS_PER_CALL)
    word0, word1, word2, word3 = call_words(seed, call, stream)
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    bits = x.to(tl.uint32, bitcast=True)
    cut = ((bits + (words & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, cut, x).to(tl.bfloat16)


# One program a tensor adds up its chunks, in a fixed order.
@triton.jit
def _sums(table, partials, sums, found_inf, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    tensor = tl.program_id(0).to(tl.int64)
    row = table + tensor * NUM_COLUMNS
    count = (tl.load(row + 8) + CHUNK - 1) // CHUNK
    first = tl.load(row + 9)
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, count, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        total += tl.load(partials + first + place, place < count, 0.0)
    found = tl.sum(total)
    if found_inf is not None:
        found = tl.where(tl.load(found_inf) == 0.0, found, tl.load(sums + tensor))
    tl.store(sums + tensor, found)
