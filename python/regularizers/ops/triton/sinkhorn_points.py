"""Triton kernels of sinkhorn_points and its apply: costs are made from points, tile by tile.

Points are brought to a form in which every cost is |x - y|^2 or |x - y|: the common mean of the
points with mass is subtracted (the cost does not depend on it, rounding does) and the scale put
into the coordinates. For the cosine cost s (1 - <x, y> / |x| |y|) they are the directions times
sqrt(s / 2), with s / 2 for the squared norm of each, also of a zero vector.

With up to NEAR_FEATURES features squares of differences are added up; beyond, the product x . y is
made on the tensor cores, |x|^2 + |y|^2 - 2 x . y.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from regularizers.ops._sinkhorn_reference import Options, check_values, within
from regularizers.ops.transport_apply import _COSINE, _EUCLIDEAN, _solve_marginals, _unit
from regularizers.ops.triton import sinkhorn_iteration as iteration
from regularizers.ops.triton.sinkhorn_iteration import LOG2E

# The linear system behind the derivatives calls sinkhorn_points_apply.
marginal_solve = _solve_marginals

# tl.dot takes no smaller side; below half of it, differences cost less.
NEAR_FEATURES = 8
LEAST_TILE = 16
# The largest tile, on eight warps: with more a thread, registers spill (ptxas, 9.0). float64 takes
# two.
TILE_ROWS = 64
TILE_COLUMNS = 64
WARP_REGISTERS = 512
DEPTH = tl.constexpr(16)
# "tf32x3" takes three tensor core products for nearly the digits of float32. "tf32" would put an
# error of |x| |y| / 2048 epsilon into every exponent.
PRECISION = tl.constexpr("tf32x3")
# Columns of v that a program multiplies; more are spread over programs, which repeat the plan.
MOST_VALUES = 64


def sinkhorn_points(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    f0: Tensor | None,
    g0: Tensor | None,
    row_sizes: Tensor | None,
    column_sizes: Tensor | None,
    cost: int,
    scale: float,
    *numbers: Any,
) -> tuple[Tensor, ...]:
    """Solve a batch of points ``x [B, n, d]``, ``y [B, m, d]``; memory grows with n + m."""
    options = Options(*numbers)
    inside = (within(a, row_sizes), within(b, column_sizes))
    check_values(*inside, epsilon, options.tau_a == options.tau_b == 1.0)
    tile, source = _costs(x, y, *inside, cost, scale)
    shape = _tile(x, y)
    costs = iteration.Costs(tile, source, *shape, shape)
    return iteration.solve(costs, a, b, epsilon, f0, g0, row_sizes, column_sizes, options)


def sinkhorn_points_apply(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    f: Tensor,
    g: Tensor,
    v: Tensor,
    row_sizes: Tensor | None,
    column_sizes: Tensor | None,
    cost: int,
    scale: float,
    over_distance: bool,
) -> tuple[Tensor, Tensor]:
    """Return (P v [B, n, k], P 1 [B, n]); ``over_distance`` divides P_ij by |x_i - y_j|."""
    count, n, m, width = *a.shape, b.shape[1], v.shape[2]
    product, sums = a.new_zeros(count, n, width), a.new_zeros(count, n)
    if 0 in (count, n, m):
        return product, sums
    a, b = within(a, row_sizes), within(b, column_sizes)
    tile, source = _costs(x, y, a, b, cost, scale)
    rows, columns, warps = _tile(x, y)
    values = min(MOST_VALUES, max(LEAST_TILE, triton.next_power_of_2(width)))
    vectors = (tensor.contiguous() for tensor in (a, b, epsilon, f, g, v))
    with torch.cuda.device_of(x):
        _apply[(count, triton.cdiv(n, rows), max(1, triton.cdiv(width, values)))](
            tile, source, *vectors, product, sums, n, m, width, over_distance, width == 1,
            rows, columns, values, num_warps=warps,
        )  # fmt: skip
    if over_distance:  # the costs are distances times the scale
        product, sums = product * scale, sums * scale
    return product, sums


def _tile(x: Tensor, y: Tensor) -> tuple[int, int, int]:
    """Return rows, columns and warps of a tile."""
    count, n, _ = x.shape
    size = 2 if x.dtype == torch.float64 else 1  # registers
    rows = iteration.fewer_rows(TILE_ROWS, LEAST_TILE, n, count)
    columns = min(TILE_COLUMNS // size, triton.next_power_of_2(max(1, y.shape[1])))
    columns = max(LEAST_TILE, columns)
    return rows, columns, max(4, rows * columns * size // WARP_REGISTERS)


def _costs(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, cost: int, scale: float
) -> tuple[Any, tuple[Any, ...]]:
    """Return the function that makes a tile of costs, and the points it reads."""
    x, y = x.to(a.dtype), y.to(b.dtype)
    if cost == _COSINE:
        x, y = (math.sqrt(scale / 2) * _unit(side) for side in (x, y))
        norms = [side.new_full(side.shape[:-1], scale / 2) for side in (x, y)]
    else:
        factor = scale if cost == _EUCLIDEAN else math.sqrt(scale)
        with_mass = [torch.where(mass[..., None] > 0, side, 0) for side, mass in ((x, a), (y, b))]
        number = (a > 0).sum(1) + (b > 0).sum(1)
        total = with_mass[0].sum(1) + with_mass[1].sum(1)
        centre = (total / number.clamp(min=1)[:, None])[:, None]
        x, y = ((side - centre) * factor for side in (x, y))
        norms = [side.square().sum(-1) for side in (x, y)]
    near = cost != _COSINE and x.shape[2] <= NEAR_FEATURES
    if cost == _EUCLIDEAN:
        tile = near_distances if near else far_distances
    else:
        tile = near_squares if near else far_squares
    return tile, (x.contiguous(), y.contiguous(), *norms, x.shape[1], y.shape[1], x.shape[2])


# Costs [I, J] between points i of x [B, n, d] and j of y [B, m, d].
@triton.jit
def near_squares(source, item, i, j, rows, columns, ACC: tl.constexpr):
    """Return |x_i - y_j|^2 from differences."""
    x, y, _, _, n, m, features = source
    x += (item.to(tl.int64) * n + i) * features
    y += (item.to(tl.int64) * m + j) * features
    square = tl.zeros((i.shape[0], j.shape[1]), ACC)
    for d in range(features):
        difference = tl.load(x + d, i < rows, 0.0) - tl.load(y + d, j < columns, 0.0)
        square += difference * difference
    return square


@triton.jit
def far_squares(source, item, i, j, rows, columns, ACC: tl.constexpr):
    """Return |x_i|^2 + |y_j|^2 - 2 x_i . y_j, not negative."""
    x, y, x_norm, y_norm, n, m, features = source
    row, column = item.to(tl.int64) * n + i, item.to(tl.int64) * m + j
    product = tl.zeros((i.shape[0], j.shape[1]), ACC)
    for first in range(0, features, DEPTH):
        d = first + tl.arange(0, DEPTH)[None, :]
        left = tl.load(x + row * features + d, (i < rows) & (d < features), 0.0)
        d = first + tl.arange(0, DEPTH)[:, None]
        right = tl.load(y + column * features + d, (j < columns) & (d < features), 0.0)
        product = _add_product(product, left, right, ACC)
    norms = tl.load(x_norm + row, i < rows, 0.0) + tl.load(y_norm + column, j < columns, 0.0)
    square = norms - 2.0 * product
    return tl.where(square < 0.0, 0.0, square)  # NaN stays


@triton.jit
def near_distances(source, item, i, j, rows, columns, ACC: tl.constexpr):
    """Return |x_i - y_j| from differences."""
    return tl.sqrt(near_squares(source, item, i, j, rows, columns, ACC))


@triton.jit
def far_distances(source, item, i, j, rows, columns, ACC: tl.constexpr):
    """Return |x_i - y_j| from products."""
    return tl.sqrt(far_squares(source, item, i, j, rows, columns, ACC))


@triton.jit
def _add_product(total, left, right, ACC: tl.constexpr):
    precision: tl.constexpr = "ieee" if ACC.primitive_bitwidth == 64 else PRECISION
    return tl.dot(left, right, total, input_precision=precision, out_dtype=ACC)


# product_i = sum_j P_ij v_j, sums_i = sum_j P_ij, P_ij = a_i b_j 2^(t (f_i + g_j - C_ij)) [/ C_ij]
@triton.jit
def _apply(
    TILE: tl.constexpr, source, a, b, epsilon, f, g, v, product, sums, n, m, width,
    OVER_DISTANCE: tl.constexpr, ONE_VALUE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = a.dtype.element_ty
    item = tl.program_id(0)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.program_id(2) * VALUES + tl.arange(0, VALUES)[None, :]
    row = item.to(tl.int64) * n + i
    a_i, f_i = tl.load(a + row, i < n, 0.0), tl.load(f + row, i < n, 0.0)
    t = (1.0 / tl.load(epsilon + item) * LOG2E).to(ACC)
    row_sum = tl.zeros((ROWS,), ACC)
    total = tl.zeros((ROWS,) if ONE_VALUE else (ROWS, VALUES), ACC)
    for first in range(0, m, COLUMNS):
        j = first + tl.arange(0, COLUMNS)[None, :]
        column = item.to(tl.int64) * m + j
        b_j = tl.load(b + column, j < m, 0.0)
        mass = a_i * b_j
        costs = TILE(source, item, i, j, n, m, ACC)
        exponent = (f_i + tl.load(g + column, j < m, 0.0) - costs) * t
        plan = mass * tl.exp2(tl.where(mass > 0.0, exponent, 0.0))
        if OVER_DISTANCE:
            plan = tl.where(costs > 0.0, plan / tl.where(costs > 0.0, costs, 1.0), 0.0)
        row_sum += tl.sum(plan, 1)
        # Where there is no mass v may hold anything.
        if ONE_VALUE:
            total += tl.sum(plan * tl.load(v + column, (j < m) & (b_j > 0.0), 0.0), 1)
        else:
            j = first + tl.arange(0, COLUMNS)[:, None]
            column = item.to(tl.int64) * m + j
            counts = tl.load(b + column, j < m, 0.0) > 0.0
            values = tl.load(v + column * width + k, counts & (k < width), 0.0)
            total = _add_product(total, plan, values, ACC)
    i, row = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.reshape(row, (ROWS,))
    if ONE_VALUE:
        tl.store(product + row, total, i < n)
    else:
        inside = (i < n)[:, None] & (k < width)
        tl.store(product + row[:, None] * width + k, total, inside)
    tl.store(sums + row, row_sum, (i < n) & (tl.program_id(2) == 0))
