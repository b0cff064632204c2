"""Triton kernels of gathered attention, and the words of a batch's streams.

The GPU twin of csrc/cpu/subsampled_attention_kernels.h. A program of the forward pass owns a block
of queries and walks over the keys of their list, loading keys and values by their index, with the
softmax running along. In the backward pass one kernel owns blocks of queries (their gradient, that
of the bias and of the own keys), the other blocks of listed keys: every number has one writer, so
there are no atomics and results repeat bit by bit. Logits are in powers of two.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from regularizers.backend import interpreting
from regularizers.ops.philox import WORDS_PER_CALL
from regularizers.ops.subsampled_attention import (
    _attention,
    _backward_fake,
    _backward_reference,
    _fake,
    _scale,
)

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
# tl.dot takes no smaller side.
LEAST_TILE = 16
# More features do not fit the registers of one program: the reference serves them.
MOST_FEATURES = 256
# Three tensor core products for nearly the digits of float32; "tf32" would leave three digits.
FLOAT32_PRECISION = tl.constexpr("tf32x3")
# The interpreter has no products of bfloat16; rounding the operands is the same there.
INTERPRETED = tl.constexpr(interpreting())
CALLS = 256


def gathered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_index: Tensor,
    query_index: Tensor | None,
    own: Tensor | None,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Return the result and its log-sum-exp."""
    out, lse = _fake(q, k, v)
    if max(q.shape[3], v.shape[3]) > MOST_FEATURES or min(*q.shape, v.shape[3]) == 0:
        arguments = (q, k, v, bias, key_index, query_index, own, causal, scale)
        values = _attention(*arguments)
        return out.copy_(values[0]), lse.copy_(values[1])
    call = _Call(q, k, v, bias, key_index, query_index, own, causal, scale)
    with torch.cuda.device_of(q):
        _forward[(call.items * triton.cdiv(call.queries, call.tile),)](
            *call.inputs, _strided(out), lse, *call.sizes, **call.options
        )
    return out, lse


def gathered_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_index: Tensor,
    query_index: Tensor | None,
    own: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float | None,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``q``, ``k``, ``v`` and, for every head, the bias."""
    if max(q.shape[3], v.shape[3]) > MOST_FEATURES or min(*q.shape, *k.shape, v.shape[3]) == 0:
        return _backward_reference(
            grad, q, k, v, bias, key_index, query_index, own, out, lse, causal, scale, wants_bias
        )
    call = _Call(q, k, v, bias, key_index, query_index, own, causal, scale)
    grad = _unit_stride(grad)
    found = _backward_fake(grad, q, k, v, bias, wants_bias)
    grad_q, grad_k, grad_v, grad_bias = found
    for tensor in (grad_k, grad_v, grad_bias):
        tensor.zero_()
    # In the accumulation type: what the weights multiply is a difference.
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    rows = (*call.inputs, _strided(grad), lse.contiguous(), delta)
    outputs = tuple(map(_strided, (grad_q, grad_k, grad_v)))
    to_bias = _strided(grad_bias) if wants_bias else None
    with torch.cuda.device_of(q):
        _backward_queries[(call.items * triton.cdiv(call.queries, call.tile),)](
            *rows, *outputs, to_bias, *call.sizes, **call.options
        )
        if call.keys > 0:
            _backward_keys[(call.items * triton.cdiv(call.keys, call.tile),)](
                *rows, *outputs[1:], *call.sizes, **call.options
            )
    return found


def philox_sample_words(seed: Tensor, samples: int, elements: int, step: int) -> Tensor:
    """Return the words of elements 0, 1, ... of streams 0, 1, ..."""
    out = seed.new_empty(samples, elements)
    if out.numel() > 0:
        blocks = triton.cdiv(elements, CALLS * WORDS_PER_CALL)
        with torch.cuda.device_of(seed):
            _sample_words[(samples * blocks,)](seed, out, elements, blocks, step, CALLS)
    return out


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _strided(tensor: Tensor) -> tuple[Tensor, int, int, int]:
    """Return a tensor [B, H, tokens, features] as the kernels take it; 0 strides broadcast."""
    sizes, strides = tensor.shape, tensor.stride()
    batch, head = (0 if sizes[d] == 1 else strides[d] for d in (0, 1))
    return tensor, batch, head, strides[2]


class _Call:
    """What both passes hand to the kernels."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        key_index: Tensor,
        query_index: Tensor | None,
        own: Tensor | None,
        causal: bool,
        scale: float | None,
    ) -> None:
        batch, heads, self.queries, features = q.shape
        lists, self.keys = key_index.shape[1:]
        if query_index is not None:
            self.queries = query_index.shape[2]
        self.items = batch * heads * lists
        widest = max(features, v.shape[3])
        row_bytes = widest * q.element_size()
        # Rows of five tensors in shared memory, of which a program has 160 KB on 8.0.
        self.tile = 64 if row_bytes <= 128 else 32 if row_bytes <= 512 else 16

        def batched(tensor: Tensor | None) -> tuple[Tensor, int] | None:
            if tensor is None:
                return None
            tensor = tensor.contiguous()
            return tensor, 0 if tensor.shape[0] == 1 else tensor.stride(0)

        bias_rows = None
        if bias is not None:
            bias_rows = (*_strided(bias), bias.stride(3))
        self.inputs = (
            *(_strided(_unit_stride(tensor)) for tensor in (q, k, v)),
            bias_rows, batched(key_index), batched(query_index), batched(own),
        )  # fmt: skip
        self.sizes = (
            heads, lists, q.shape[2], self.queries, self.keys, features, v.shape[3],
            _scale(scale, q),
        )  # fmt: skip
        self.options = {
            "CAUSAL": causal,
            "E": max(LEAST_TILE, triton.next_power_of_2(features)),
            "V": max(LEAST_TILE, triton.next_power_of_2(v.shape[3])),
            "TILE": self.tile,
            "num_warps": 4 if widest <= 64 else 8,
            "num_stages": 2 if row_bytes <= 128 else 1,
        }


@triton.jit
def _dot(left, right, total):
    if INTERPRETED:
        left, right = left.to(total.dtype), right.to(total.dtype)
    precision: tl.constexpr = "ieee" if total.dtype == tl.float64 else FLOAT32_PRECISION
    return tl.dot(left, right, total, input_precision=precision, out_dtype=total.dtype)


# Where a program stands: (sample, head, list, first entry of its block).
@triton.jit
def _place(heads, lists, count, TILE: tl.constexpr):
    blocks = tl.cdiv(count, TILE)
    item = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * TILE
    of_heads = item // lists
    return of_heads // heads, of_heads % heads, item % lists, first


@triton.jit
def _rows_of(x, sample, head):
    return x[0] + sample.to(tl.int64) * x[1] + head.to(tl.int64) * x[2]


@triton.jit
def _entries(index, sample, list_, count, c):
    """Entries c of a list; -1 past its end, and c itself where there is no index."""
    entry = tl.where(c < count, c, -1).to(tl.int64)
    if index is not None:
        base = index[0] + sample.to(tl.int64) * index[1] + list_.to(tl.int64) * count
        entry = tl.load(base + c, c < count, -1)
    return entry


# Rows [entries, FEATURES] of a tensor, zeros where the entry is -1.
@triton.jit
def _gather(base, stride, entry, features, FEATURES: tl.constexpr):
    d = tl.arange(0, FEATURES)[None, :]
    inside = (entry >= 0)[:, None] & (d < features)
    return tl.load(base + entry[:, None] * stride + d, inside, 0.0)


@triton.jit
def _scatter(base, stride, entry, features, values, FEATURES: tl.constexpr):
    d = tl.arange(0, FEATURES)[None, :]
    inside = (entry >= 0)[:, None] & (d < features)
    tl.store(base + entry[:, None] * stride + d, values.to(base.dtype.element_ty), inside)


@triton.jit
def _tile_logits(queries, keys, bias, sample, head, i, j, scale, like, CAUSAL: tl.constexpr):
    """Logits of a tile in powers of two, -inf where a key is not seen."""
    seen = (i >= 0)[:, None] & (j >= 0)[None, :]
    if CAUSAL:
        seen = seen & (j[None, :] <= i[:, None])
    s = _dot(queries, tl.trans(keys), tl.zeros((i.shape[0], j.shape[0]), like.dtype))
    s = s * (scale * LOG2E)
    if bias is not None:
        base = _rows_of(bias, sample, head)
        cell = i[:, None] * bias[3] + j[None, :] * bias[4]
        s += tl.load(base + cell, seen, 0.0).to(like.dtype) * LOG2E
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _own_logits(own, queries, k, bias, sample, head, i, features, scale, like, E: tl.constexpr):
    """Which queries see their own key, these keys as entries, and their logits."""
    sees = tl.load(own[0] + sample.to(tl.int64) * own[1] + i, i >= 0, 0) != 0
    mine = tl.where(sees, i, -1)
    keys = _gather(_rows_of(k, sample, head), k[3], mine, features, E)
    s = tl.sum(queries.to(like.dtype) * keys.to(like.dtype), 1) * (scale * LOG2E)
    if bias is not None:
        base = _rows_of(bias, sample, head)
        s += tl.load(base + i * (bias[3] + bias[4]), sees, 0.0).to(like.dtype) * LOG2E
    return mine, keys, tl.where(sees, s, float("-inf"))


@triton.jit
def _forward(
    q, k, v, bias, key_index, query_index, own, out, lse,
    heads, lists, all_queries, count, n, features, value_features, scale,
    CAUSAL: tl.constexpr, E: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    sample, head, list_, first = _place(heads, lists, count, TILE)
    i = _entries(query_index, sample, list_, count, first + tl.arange(0, TILE))
    queries = _gather(_rows_of(q, sample, head), q[3], i, features, E)
    like = tl.zeros((1,), lse.dtype.element_ty)
    largest = tl.full((TILE,), float("-inf"), like.dtype)
    total = tl.zeros((TILE,), like.dtype)
    result = tl.zeros((TILE, V), like.dtype)
    if own is not None:
        mine, _, largest = _own_logits(
            own, queries, k, bias, sample, head, i, features, scale, like, E
        )  # fmt: skip
        # A logit of -inf hides the key; a NaN or an infinity is to show.
        total = tl.where(largest == float("-inf"), 0.0, 1.0 + (largest - largest))
        mine = tl.where(largest == float("-inf"), -1, mine)
        result = _gather(_rows_of(v, sample, head), v[3], mine, value_features, V).to(like.dtype)
    for start in range(0, n, TILE):
        j = _entries(key_index, sample, list_, n, start + tl.arange(0, TILE))
        keys = _gather(_rows_of(k, sample, head), k[3], j, features, E)
        s = _tile_logits(queries, keys, bias, sample, head, i, j, scale, like, CAUSAL)
        new_largest = tl.maximum(largest, tl.max(s, 1))
        # While nothing was seen: 2^(-inf - 0) is 0, and 2^(-inf + inf) would be NaN.
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(s - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, 1)
        values = _gather(_rows_of(v, sample, head), v[3], j, value_features, V)
        result = _dot(weights.to(values.dtype), values, result * shrink[:, None])
        largest = new_largest
    empty = total == 0.0
    result = result / tl.where(empty, 1.0, total)[:, None]
    _scatter(_rows_of(out, sample, head), out[3], i, value_features, result, V)
    natural = largest * LN2 + tl.log(tl.where(empty, 1.0, total))
    row = (sample.to(tl.int64) * heads + head) * all_queries
    tl.store(lse + row + i, natural, i >= 0)


# What a block of queries needs in the backward pass: log-sum-exp in powers of two, delta, dO.
@triton.jit
def _row_terms(
    grad, lse, delta, sample, head, heads, all_queries, i, value_features, V: tl.constexpr
):  # fmt: skip
    row = (sample.to(tl.int64) * heads + head) * all_queries
    natural = tl.load(lse + row + i, i >= 0, float("-inf"))
    # 2^(s - inf) is 0 for a query that sees nothing.
    power = tl.where(natural == float("-inf"), float("inf"), natural * LOG2E)
    cotangent = _gather(_rows_of(grad, sample, head), grad[3], i, value_features, V)
    return power, tl.load(delta + row + i, i >= 0, 0.0), cotangent


@triton.jit
def _backward_queries(
    q, k, v, bias, key_index, query_index, own, grad, lse, delta,
    grad_q, grad_k, grad_v, grad_bias,
    heads, lists, all_queries, count, n, features, value_features, scale,
    CAUSAL: tl.constexpr, E: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    sample, head, list_, first = _place(heads, lists, count, TILE)
    i = _entries(query_index, sample, list_, count, first + tl.arange(0, TILE))
    queries = _gather(_rows_of(q, sample, head), q[3], i, features, E)
    like = tl.zeros((1,), lse.dtype.element_ty)
    power, slope, cotangent = _row_terms(
        grad, lse, delta, sample, head, heads, all_queries, i, value_features, V
    )
    total = tl.zeros((TILE, E), like.dtype)
    if own is not None:
        mine, own_keys, own_s = _own_logits(
            own, queries, k, bias, sample, head, i, features, scale, like, E
        )  # fmt: skip
        weight = tl.exp2(own_s - power)
        own_values = _gather(_rows_of(v, sample, head), v[3], mine, value_features, V)
        wide = cotangent.to(like.dtype)
        change = weight * (tl.sum(wide * own_values.to(like.dtype), 1) - slope)
        total = change[:, None] * own_keys.to(like.dtype)
        # An own key stands in no list: nobody else writes its row.
        to_keys = change[:, None] * scale * queries.to(like.dtype)
        _scatter(_rows_of(grad_k, sample, head), grad_k[3], mine, features, to_keys, E)
        to_values = weight[:, None] * wide
        _scatter(_rows_of(grad_v, sample, head), grad_v[3], mine, value_features, to_values, V)
        if grad_bias is not None:
            to = _rows_of(grad_bias, sample, head)
            tl.store(to + i * (grad_bias[3] + 1), change.to(to.dtype.element_ty), mine >= 0)
    for start in range(0, n, TILE):
        j = _entries(key_index, sample, list_, n, start + tl.arange(0, TILE))
        keys = _gather(_rows_of(k, sample, head), k[3], j, features, E)
        s = _tile_logits(queries, keys, bias, sample, head, i, j, scale, like, CAUSAL)
        weights = tl.exp2(s - power[:, None])
        values = _gather(_rows_of(v, sample, head), v[3], j, value_features, V)
        products = _dot(cotangent, tl.trans(values), tl.zeros((TILE, TILE), like.dtype))
        changes = weights * (products - slope[:, None])
        total = _dot(changes.to(keys.dtype), keys, total)
        if grad_bias is not None:
            to = _rows_of(grad_bias, sample, head)
            cell = i[:, None] * grad_bias[3] + j[None, :]
            seen = (i >= 0)[:, None] & (j >= 0)[None, :]
            tl.store(to + cell, changes.to(to.dtype.element_ty), seen)
    _scatter(_rows_of(grad_q, sample, head), grad_q[3], i, features, total * scale, E)


@triton.jit
def _backward_keys(
    q, k, v, bias, key_index, query_index, own, grad, lse, delta, grad_k, grad_v,
    heads, lists, all_queries, count, n, features, value_features, scale,
    CAUSAL: tl.constexpr, E: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    sample, head, list_, first = _place(heads, lists, n, TILE)
    j = _entries(key_index, sample, list_, n, first + tl.arange(0, TILE))
    keys = _gather(_rows_of(k, sample, head), k[3], j, features, E)
    values = _gather(_rows_of(v, sample, head), v[3], j, value_features, V)
    like = tl.zeros((1,), lse.dtype.element_ty)
    to_keys, to_values = tl.zeros((TILE, E), like.dtype), tl.zeros((TILE, V), like.dtype)
    for start in range(0, count, TILE):
        i = _entries(query_index, sample, list_, count, start + tl.arange(0, TILE))
        queries = _gather(_rows_of(q, sample, head), q[3], i, features, E)
        power, slope, cotangent = _row_terms(
            grad, lse, delta, sample, head, heads, all_queries, i, value_features, V
        )
        s = _tile_logits(queries, keys, bias, sample, head, i, j, scale, like, CAUSAL)
        weights = tl.exp2(s - power[:, None])
        to_values = _dot(tl.trans(weights).to(cotangent.dtype), cotangent, to_values)
        products = _dot(cotangent, tl.trans(values), tl.zeros((TILE, TILE), like.dtype))
        changes = weights * (products - slope[:, None])
        to_keys = _dot(tl.trans(changes).to(queries.dtype), queries, to_keys)
    _scatter(_rows_of(grad_k, sample, head), grad_k[3], j, features, to_keys * scale, E)
    _scatter(_rows_of(grad_v, sample, head), grad_v[3], j, value_features, to_values, V)


@triton.jit
def _sample_words(seed, out, elements, blocks, step, CALLS: tl.constexpr):
    sample, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    call = block * CALLS + tl.arange(0, CALLS)
    word0, word1, word2, word3 = tl.philox(
        tl.load(seed), call.to(tl.uint32), (call * 0).to(tl.uint32),
        tl.cast(sample, tl.uint32), tl.cast(step, tl.uint32),
    )  # fmt: skip
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    element = block * (4 * CALLS) + tl.arange(0, 4 * CALLS)
    row = out + sample.to(tl.int64) * elements
    tl.store(row + element, words.to(tl.int64), element < elements)
