"""Triton kernels of pairwise_logsumexp: tiles of scores with a running maximum, never all pairs.

Forward, a program takes a tile of rows past all columns. Backward, a program takes a tile of points
past all points of the other side, makes the scores again and adds up the gradient of its own
points: once by rows for x, once by columns for y; where y is x, once for both at a time, since a
distance is that of (i, j) and of (j, i). No sum is shared between programs, so none is atomic.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from regularizers.ops._operator import accumulate_dtype
from regularizers.ops.pairwise import _DIST, _DOT, _FALSE_LINEAR, _SQDIST, _centred

# "tf32" would put an error of |x| |y| / 2048 into every score, "tf32x3" nearly none.
FLOAT32_PRECISION = tl.constexpr("tf32x3")
# tl.dot takes no smaller side.
LEAST_TILE = 16
# Own and other points of a tile, on eight warps, chosen by counting registers (ptxas, 8.0 and 9.0):
# forward, float32 does not spill; backward, 32 to 208 bytes a thread do, with 64 others up to 688.
# MOST_FEATURES of a gradient are added up by one program (half in float64), more by several, which
# repeat the scores.
TILE_OWN = 64
TILE_OTHER = 32
MOST_FEATURES = 128
WARPS = 8
DEPTH = tl.constexpr(32)
# Of kinds and rules, as the kernels name them.
SQDIST, DIST = tl.constexpr(_SQDIST), tl.constexpr(_DIST)
SAME, OTHER, WINDOW = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
FALSE_EXP, FALSE_LINEAR = tl.constexpr(4), tl.constexpr(_FALSE_LINEAR)


def pairwise_logsumexp(
    x: Tensor, y: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce the scores of all pairs by rows; arguments as the operator's."""
    points, rule, kinds = _prepared(x, y, *arguments)
    rows, columns = points[0], points[1]
    top = rows.new_empty(rows.shape[0])
    total, summed = torch.empty_like(top), torch.empty_like(top)
    count = torch.empty_like(top, dtype=torch.int64)
    own, other = _tile(rows, columns)
    if rows.shape[0]:
        with torch.cuda.device_of(rows):
            _forward[(triton.cdiv(rows.shape[0], own),)](
                *points, rule, top, summed, total, count, rows.shape[1], *kinds,
                own, other, num_warps=WARPS,
            )  # fmt: skip
    found = top + summed.log() + _weight_logarithm(rule, kinds)
    found = torch.where((top == -torch.inf) & ~summed.isnan(), -torch.inf, found)
    return found, total, count


def pairwise_logsumexp_backward(
    logsumexp: Tensor,
    grad_logsumexp: Tensor | None,
    grad_total: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the gradients; arguments as the operator's."""
    *call, wants_x, wants_y, wants_bias = arguments
    points, rule, kinds = _prepared(x, y, *call)
    scale, kind = call[5:7]
    empty = logsumexp == -torch.inf
    nothing = torch.zeros_like(logsumexp)
    by_row = (
        torch.where(empty, torch.inf, logsumexp - _weight_logarithm(rule, kinds)),
        nothing if grad_logsumexp is None else torch.where(empty, 0, grad_logsumexp),
        nothing if grad_total is None else grad_total.contiguous(),
    )
    grad_x, grad_y, grad_bias = (x.new_empty(0) for _ in range(3))
    if y is None:
        grad_x, grad_bias = _gradient(points, rule, by_row, kinds, scale, kind, True, True)
    else:
        if wants_x:
            grad_x, _ = _gradient(points, rule, by_row, kinds, scale, kind, True, False)
        if wants_y or wants_bias:
            swapped = (points[1], points[0], points[3], points[2])
            grad_y, grad_bias = _gradient(swapped, rule, by_row, kinds, scale, kind, False, True)
    return (
        grad_x.to(x.dtype) if wants_x else x.new_empty(0),
        grad_y.to(x.dtype) if wants_y else x.new_empty(0),
        grad_bias if wants_bias else x.new_empty(0),
    )


def _gradient(
    points: tuple[Tensor, ...],
    rule: tuple[Any, ...],
    by_row: tuple[Tensor, ...],
    kinds: tuple[Any, ...],
    scale: Tensor,
    kind: int,
    as_rows: bool,
    as_columns: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the first of the points and of their bias."""
    own, other, *_ = points
    count, features = own.shape
    product, bias = torch.zeros_like(own), own.new_zeros(count)
    weight = torch.zeros_like(bias)
    tile_own, tile_other = _tile(own, other)
    chunk = min(MOST_FEATURES, max(LEAST_TILE, triton.next_power_of_2(max(1, features))))
    if own.dtype == torch.float64:
        chunk = max(LEAST_TILE, chunk // 2)
    if count and other.shape[0]:
        grid = (triton.cdiv(count, tile_own), max(1, triton.cdiv(features, chunk)))
        with torch.cuda.device_of(own):
            _backward[grid](
                *points, rule, *by_row, product, weight, bias, count, other.shape[0], features,
                *kinds, as_rows, as_columns, tile_own, tile_other, chunk, num_warps=WARPS,
            )  # fmt: skip
    if kind != _DOT:
        product = weight[:, None] * own - product
    factor = scale.to(own.dtype) * (2 if kind == _SQDIST else 1)
    return product * factor, bias


def _prepared(
    x: Tensor,
    y: Tensor | None,
    column_bias: Tensor | None,
    labels: Tensor | None,
    column_labels: Tensor | None,
    targets: Tensor | None,
    predictions: Tensor | None,
    scale: Tensor,
    kind: int,
    rule: int,
    window: float,
    push: float,
    exclude_self: bool,
) -> tuple[tuple[Tensor, ...], tuple[Any, ...], tuple[Any, ...]]:
    """Return points with squared norms, what the rule reads, and the constants of the kernels."""
    dtype = accumulate_dtype(x.dtype)
    rows, columns = x.to(dtype), x.to(dtype) if y is None else y.to(dtype)
    if kind != _DOT:
        rows, columns = _centred(rows, None if y is None else columns)
    rows, columns = rows.contiguous(), columns.contiguous()
    numbers = torch.stack([scale.to(dtype), *(rows.new_full((), v) for v in (window, push))])
    bias = rows.new_zeros(columns.shape[0]) if column_bias is None else column_bias.contiguous()
    marks = [
        bias if mark is None else mark.contiguous()
        for mark in (
            labels,
            labels if column_labels is None else column_labels,
            targets,
            predictions,
        )
    ]
    values = 1 if targets is None else targets.shape[1]
    norms = (rows.square().sum(1), columns.square().sum(1))
    points = (rows, columns, *norms)
    described = (numbers, bias, *marks, rows.shape[0], columns.shape[0], values)
    return points, described, (kind, rule, exclude_self, y is None and kind != _DOT)


def _weight_logarithm(rule: tuple[Any, ...], kinds: tuple[Any, ...]) -> Any:
    """Return the logarithm of what all weights have in common."""
    return rule[0][2].log() if kinds[1] == _FALSE_LINEAR else 0


def _tile(own: Tensor, other: Tensor) -> tuple[int, int]:
    return (
        min(TILE_OWN, max(LEAST_TILE, triton.next_power_of_2(max(1, own.shape[0])))),
        min(TILE_OTHER, max(LEAST_TILE, triton.next_power_of_2(max(1, other.shape[0])))),
    )


@triton.jit
def _product(left, right, total, ACC: tl.constexpr):
    PRECISION: tl.constexpr = "ieee" if ACC.primitive_bitwidth == 64 else FLOAT32_PRECISION
    return tl.dot(left, right, total, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _distances(
    own, other, own_norm, other_norm, a, b, own_count, other_count, features,
    KIND: tl.constexpr, ITSELF: tl.constexpr,
):  # fmt: skip
    """Return d of the points ``a`` [A, 1] and ``b`` [1, B]."""
    ACC: tl.constexpr = own.dtype.element_ty
    total = tl.zeros((a.shape[0], b.shape[1]), ACC)
    for first in range(0, features, DEPTH):
        d = first + tl.arange(0, DEPTH)[None, :]
        inside = (a < own_count) & (d < features)
        left = tl.load(own + a.to(tl.int64) * features + d, inside, 0.0)
        d = first + tl.arange(0, DEPTH)[:, None]
        inside = (b < other_count) & (d < features)
        right = tl.load(other + b.to(tl.int64) * features + d, inside, 0.0)
        total = _product(left, right, total, ACC)
    if KIND >= SQDIST:
        norms = tl.load(own_norm + a, a < own_count, 0.0)
        total = norms + tl.load(other_norm + b, b < other_count, 0.0) - 2.0 * total
        total = tl.where(total < 0.0, 0.0, total)  # NaN stays
    if KIND == DIST:
        total = tl.sqrt(total)
    if ITSELF:  # no rounding between a point and itself; NaN stays
        total = tl.where(a == b, total - total, total)
    return total


@triton.jit
def _difference(target, row, column, n, m, values, like):
    """Return mean absolute differences of targets [points, values]."""
    total = tl.zeros_like(like)
    for place in range(values):
        left = tl.load(target + row.to(tl.int64) * values + place, row < n, 0.0)
        right = tl.load(target + column.to(tl.int64) * values + place, column < m, 0.0)
        total += tl.abs(left - right)
    return total / values


@triton.jit
def _row_label(rule, row):
    return tl.load(rule[2] + row, row < rule[6], 0)


@triton.jit
def _column_label(rule, column):
    return tl.load(rule[3] + column, column < rule[7], 0)


@triton.jit
def _weigh(distance, row, column, rule, RULE: tl.constexpr, EXCLUDE: tl.constexpr):
    """Return which pairs count, scores, scores with logarithmic weights, and linear weights."""
    numbers, bias, _, _, target, prediction, n, m, values = rule
    allowed = (row < n) & (column < m)
    score = distance * tl.load(numbers) + tl.load(bias + column, column < m, 0.0)
    exponent = score
    factor = score
    if RULE == SAME:
        allowed &= _row_label(rule, row) == _column_label(rule, column)
    if RULE == OTHER:
        allowed &= _row_label(rule, row) != _column_label(rule, column)
    if RULE >= WINDOW:
        window, push = tl.load(numbers + 1), tl.load(numbers + 2)
        far = _difference(target, row, column, n, m, values, distance)
        if RULE == WINDOW:
            allowed = allowed & (far <= window)
        else:
            near = _difference(prediction, row, column, n, m, values, distance)
            allowed = allowed & (far > window) & (near <= window)
        if RULE == FALSE_EXP:
            exponent = score + push * far
        factor = tl.where(allowed, far, 0.0)
    if EXCLUDE:
        allowed = allowed & (row != column)
    return allowed, score, tl.where(allowed, exponent, float("-inf")), factor


@triton.jit
def _forward(
    x, y, x_norm, y_norm, rule, top, summed, total, count, features,
    KIND: tl.constexpr, RULE: tl.constexpr, EXCLUDE: tl.constexpr, ITSELF: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = x.dtype.element_ty
    n, m = rule[6], rule[7]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    best = tl.full((ROWS,), float("-inf"), ACC)
    powers, scores = tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC)
    pairs = tl.zeros((ROWS,), tl.int32)
    for first in range(0, m, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        distance = _distances(
            x, y, x_norm, y_norm, row[:, None], column, n, m, features, KIND, ITSELF
        )
        allowed, score, exponent, factor = _weigh(
            distance, row[:, None], column, rule, RULE, EXCLUDE
        )
        largest = tl.maximum(best, tl.max(exponent, 1))
        anchor = tl.where(largest > float("-inf"), largest, 0.0)
        power = tl.exp(exponent - anchor[:, None])
        if RULE == FALSE_LINEAR:
            power *= factor
        powers = powers * tl.exp(best - anchor) + tl.sum(power, 1)
        best = largest
        scores += tl.sum(tl.where(allowed, score, 0.0), 1)
        pairs += tl.sum(allowed.to(tl.int32), 1)
    tl.store(top + row, best, row < n)
    tl.store(summed + row, powers, row < n)
    tl.store(total + row, scores, row < n)
    tl.store(count + row, pairs.to(tl.int64), row < n)


@triton.jit
def _slope(
    distance, row, column, rule, logsumexp, grad_logsumexp, grad_total,
    RULE: tl.constexpr, EXCLUDE: tl.constexpr,
):  # fmt: skip
    """Return the derivative of the results in the scores of pairs (row, column)."""
    allowed, _, exponent, factor = _weigh(distance, row, column, rule, RULE, EXCLUDE)
    n = rule[6]
    power = tl.exp(exponent - tl.load(logsumexp + row, row < n, 0.0))
    if RULE == FALSE_LINEAR:
        power *= factor
    slope = power * tl.load(grad_logsumexp + row, row < n, 0.0)
    slope += tl.load(grad_total + row, row < n, 0.0)
    return tl.where(allowed, slope, 0.0)


@triton.jit
def _backward(
    own, other, own_norm, other_norm, rule, logsumexp, grad_logsumexp, grad_total,
    product, weight, bias, own_count, other_count, features,
    KIND: tl.constexpr, RULE: tl.constexpr, EXCLUDE: tl.constexpr, ITSELF: tl.constexpr,
    AS_ROWS: tl.constexpr, AS_COLUMNS: tl.constexpr,
    OWN: tl.constexpr, OTHERS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = own.dtype.element_ty
    a = tl.program_id(0) * OWN + tl.arange(0, OWN)[:, None]
    f = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)[None, :]
    gradient = tl.zeros((OWN, FEATURES), ACC)
    weights, biases = tl.zeros((OWN,), ACC), tl.zeros((OWN,), ACC)
    for first in range(0, other_count, OTHERS):
        b = first + tl.arange(0, OTHERS)[None, :]
        distance = _distances(
            own, other, own_norm, other_norm, a, b, own_count, other_count, features, KIND, ITSELF
        )
        slope = tl.zeros_like(distance)
        if AS_ROWS:
            slope += _slope(
                distance, a, b, rule, logsumexp, grad_logsumexp, grad_total, RULE, EXCLUDE
            )
        if AS_COLUMNS:
            back = _slope(
                distance, b, a, rule, logsumexp, grad_logsumexp, grad_total, RULE, EXCLUDE
            )
            biases += tl.sum(back, 1)
            slope += back
        if KIND == DIST:
            apart = distance != 0.0  # NaN is
            slope = tl.where(apart, slope / tl.where(apart, distance, 1.0), 0.0)
        weights += tl.sum(slope, 1)
        b = first + tl.arange(0, OTHERS)[:, None]
        inside = (b < other_count) & (f < features)
        values = tl.load(other + b.to(tl.int64) * features + f, inside, 0.0)
        gradient = _product(slope, values, gradient, ACC)
    at = a.to(tl.int64) * features + f
    tl.store(product + at, gradient, (a < own_count) & (f < features))
    a = tl.program_id(0) * OWN + tl.arange(0, OWN)
    once = (a < own_count) & (tl.program_id(1) == 0)
    tl.store(weight + a, weights, once)
    tl.store(bias + a, biases, once)
