"""Triton kernels of Sinkhorn's iterations, whatever the costs come from: a matrix or points.

The specification is ops/_sinkhorn_reference.py. In base 2, with t = log2(e) / epsilon, a program
takes a stripe of rows,

    z_ij = t (g_j - C_ij) + log2 b_j,   L_i = log2 sum_j 2^z_ij,   F_i = -L_i / t,

moves f_i towards F_i, and from the same exponents adds up what the stripe contributes to the sums
of the columns of the plan, w_i 2^(z_ij - L_i) with w_i = a_i exp((f_i - F_i) / epsilon). These are
probabilities times w_i: they need no maximum of their own, and are at once the error of the
marginals and the update G_j = g_j + epsilon log(b_j / sum_j). Only a column whose sum is lost to
underflow is computed again, in the log domain.

A stripe that fits into registers is read and exponentiated once, the columns' sums stay there too
until a program has done its last stripe. A longer one is gone through twice. Every program has its
own sums of the columns, added up in order: results repeat bit by bit.

An iteration is four launches (two where symmetric: three): sweep, measure, step, move. Items that
have converged return at once. The host waits for nothing within the first 2 ASK_EVERY iterations;
beyond, it reads every ASK_EVERY iterations an answer that is as many iterations old. With tol = 0
and while a CUDA graph is captured it never asks, and launches all max_iter iterations.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from regularizers.ops._sinkhorn_reference import Options, value, within
from regularizers.ops.triton import sinkhorn_control as control
from regularizers.ops.triton.sinkhorn_control import (
    COLUMN_STATS,
    NOW,
    NOW_COLUMNS,
    OMEGA_COLUMNS,
    OMEGA_ROWS,
    ROW_STATS,
    SLOTS,
    TAU_A,
    TAU_B,
    has_ended,
)

LOG2E = tl.constexpr(1.4426950408889634)
# Programs of one launch over the rows, about twice the multiprocessors of a large GPU. Each has its
# own sums of the columns.
FILLING_PROGRAMS = 256
# Columns that a program merges.
MERGED_COLUMNS = 256
# Iterations from one question to the device to the next.
ASK_EVERY = 16
# Which columns a launch computes in the log domain.
ALL, LOST, MASKED = (tl.constexpr(mode) for mode in range(3))


class Costs(NamedTuple):
    """Where costs come from.

    ``tile(source, item, i, j, rows, columns, ACC)`` gives costs [I, J] for places ``i [I, 1]`` and
    ``j [1, J]``, anything finite beyond ``rows`` and ``columns``.
    """

    tile: Any
    source: tuple[Any, ...]
    rows: int  # of a tile of the sweep
    columns: int
    warps: int
    column_tile: tuple[int, int, int]  # the same where columns are computed exactly


def solve(
    costs: Costs,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    f0: Tensor | None,
    g0: Tensor | None,
    row_sizes: Tensor | None,
    column_sizes: Tensor | None,
    options: Options,
) -> tuple[Tensor, ...]:
    """Solve a batch with masses ``a [B, n]``, ``b [B, m]``; the results of ``ops.sinkhorn``."""
    count, n, m = *a.shape, b.shape[1]
    rows, columns = _sizes(row_sizes, n, a), _sizes(column_sizes, m, a)
    a, b = (within(w, s).contiguous() for w, s in ((a, row_sizes), (b, column_sizes)))
    f, g = (
        torch.zeros_like(weight) if given is None else within(given, sizes).clone()
        for weight, given, sizes in ((a, f0, row_sizes), (b, g0, column_sizes))
    )
    present = (rows > 0) & (columns > 0)
    state = control.start(options, a, epsilon, present)
    if count > 0 and n > 0 and m > 0:
        with torch.cuda.device_of(a):
            solver = _Solver(costs, a, b, f, g, rows, columns, state, options)
            solver.run(starts_with_columns=g0 is None)
    if options.symmetric:
        g = f.clone()
    mass, now = state[:, control.PLAN_MASS.value], state[:, NOW.value]
    found = value(
        a.double(), b.double(), f.double(), g.double(), mass, now, options.tau_a, options.tau_b
    )
    return (
        f,
        g,
        torch.where(present, found, 0).to(a.dtype),
        state[:, control.ITERATIONS.value].to(torch.int64),
        state[:, control.ERROR.value].to(a.dtype),
        state[:, control.CONVERGED.value] > 0,
    )


def _sizes(given: Tensor | None, largest: int, like: Tensor) -> Tensor:
    if given is not None:
        return given.to(torch.int32)
    return torch.full((like.shape[0],), largest, dtype=torch.int32, device=like.device)


class _Solver:
    """The buffers of a solve and the launches of an iteration."""

    def __init__(
        self,
        costs: Costs,
        a: Tensor,
        b: Tensor,
        f: Tensor,
        g: Tensor,
        rows: Tensor,
        columns: Tensor,
        state: Tensor,
        options: Options,
    ) -> None:
        self._costs, self._options, self._state = costs, options, state
        self._a, self._b, self._f, self._g = a, b, f, g
        self._rows, self._columns = rows, columns
        count, n = a.shape
        m = b.shape[1]
        stripes = triton.cdiv(n, costs.rows)
        self._programs = min(stripes, max(1, FILLING_PROGRAMS // count))
        self._used = ((rows + costs.rows - 1) // costs.rows).clamp(max=self._programs)
        self._F: Tensor | None = None
        self._partial: Tensor | None = None
        self._sums: Tensor | None = None
        self._row_stats = state.new_empty(count, self._programs, ROW_STATS.value)
        if options.symmetric:
            self._F = torch.zeros_like(f)
            self._column_stats = state.new_empty(count, 1, COLUMN_STATS.value)
        else:
            self._partial = b.new_empty(count, self._programs, m)
            self._sums = torch.empty_like(b)
            blocks = triton.cdiv(m, MERGED_COLUMNS)
            self._column_stats = state.new_empty(count, blocks, COLUMN_STATS.value)

    def run(self, *, starts_with_columns: bool) -> None:
        options, state = self._options, self._state
        iterate = self._iterate_symmetric if options.symmetric else self._iterate
        if starts_with_columns and not options.symmetric:
            self._update_columns(ALL)
        asks = options.tol > 0.0 and not _capturing(state)
        question = None
        for k in range(options.max_iter):
            iterate(k)
            if asks and (k + 1) % ASK_EVERY == 0 and k + 1 < options.max_iter:
                if question is not None and not question.answer():
                    break
                question = control.Question(state)
        if self._F is not None:  # points without mass get the potential that mass there would have
            F = self._options.tau_a * self._F
            self._f.copy_(torch.where(self._a > 0, self._f, F))
        else:
            self._update_columns(MASKED)

    def _iterate(self, k: int) -> None:
        self._sweep()
        count, m = self._b.shape
        _measure[(count, triton.cdiv(m, MERGED_COLUMNS))](
            self._partial, self._sums, self._column_stats, self._b, self._g, self._columns,
            self._used, self._state, self._programs, m, MERGED_COLUMNS,
        )  # fmt: skip
        self._step(k)
        self._update_columns(LOST)

    def _iterate_symmetric(self, k: int) -> None:
        self._sweep()
        self._step(k)
        count, n = self._a.shape
        _average[(count, triton.cdiv(n, MERGED_COLUMNS))](
            self._f, self._F, self._a, self._state, n, MERGED_COLUMNS
        )

    def _sweep(self) -> None:
        costs, (count, n), m = self._costs, self._a.shape, self._b.shape[1]
        symmetric = self._options.symmetric
        _sweep[(count, self._programs)](
            costs.tile, costs.source, self._a, self._b, self._f, self._f if symmetric else self._g,
            self._F, self._partial, self._row_stats, self._rows, self._columns, self._state, n, m,
            costs.rows, costs.columns, m <= costs.columns, symmetric, num_warps=costs.warps,
        )  # fmt: skip

    def _step(self, k: int) -> None:
        control.step(self._state, self._row_stats, self._column_stats, self._used, k, self._options)

    def _update_columns(self, mode: tl.constexpr) -> None:
        costs, (count, m), n = self._costs, self._b.shape, self._a.shape[1]
        tile_rows, tile_columns, warps = costs.column_tile
        _update_columns[(count, triton.cdiv(m, tile_columns))](
            costs.tile, costs.source, self._a, self._b, self._f, self._g, self._sums, self._rows,
            self._columns, self._state, n, m, mode.value, tile_rows, tile_columns,
            num_warps=warps,
        )  # fmt: skip


def _capturing(state: Tensor) -> bool:
    return state.is_cuda and torch.cuda.is_current_stream_capturing()


def fewer_rows(rows: int, least: int, n: int, count: int) -> int:
    """Return how many rows a tile should have that may have ``rows``, to keep a GPU filled."""
    while rows > least and triton.cdiv(n, rows) * count < FILLING_PROGRAMS // 2:
        rows //= 2
    return rows


# t (potential_j - C_ij) + log2 weight_j along the axis that is summed over; -inf without mass there
@triton.jit
def _exponents(costs, potential, weight, t):
    z = (potential - costs) * t + tl.log2(tl.where(weight > 0.0, weight, 1.0))
    return tl.where(weight > 0.0, z, float("-inf"))


# A point without mass may hold anything: infinite and NaN costs count as 0 there.
@triton.jit
def _tame(costs, weight):
    return tl.where((weight > 0.0) | (tl.abs(costs) < float("inf")), costs, 0.0)


# What is to be subtracted from exponents: their largest, or 0 while all are -inf.
@triton.jit
def _base(top):
    return tl.where(top == float("-inf"), 0.0, top)


# What a marginal is to be: weight exp(-potential / rho) with epsilon / rho = (1 - tau) / tau
@triton.jit
def _target(weight, potential, t, tau):
    return weight * tl.exp2(-potential * t * ((1.0 - tau) / tau))


@triton.jit
def _relaxed(old, new, omega):
    return tl.where(omega == 1.0, new, old + omega * (new - old))


# log2(e) / epsilon
@triton.jit
def _steepness(state, item, SLOT: tl.constexpr, ACC: tl.constexpr):
    return (1.0 / tl.load(state + item * SLOTS + SLOT) * LOG2E).to(ACC)


@triton.jit
def _number(state, item, SLOT: tl.constexpr, ACC: tl.constexpr):
    return tl.load(state + item * SLOTS + SLOT).to(ACC)


@triton.jit
def _row_exponents(
    TILE: tl.constexpr, source, b, g, item, i, a_i, first, rows, columns, m, t,
    COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    j = first + tl.arange(0, COLUMNS)[None, :]
    place = item.to(tl.int64) * m + j
    costs = _tame(TILE(source, item, i, j, rows, columns, ACC), a_i)
    b_j = tl.load(b + place, j < columns, 0.0)
    return _exponents(costs, tl.load(g + place, j < columns, 0.0), b_j, t)


# A stripe's f (where symmetric: F, its f being g), errors, and the stripe's part of the columns.
@triton.jit
def _sweep(
    TILE: tl.constexpr, source, a, b, f, g, F_out, partial, row_stats, row_sizes, column_sizes,
    state, n, m, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):  # fmt: skip
    item, program = tl.program_id(0), tl.program_id(1)
    rows, columns = tl.load(row_sizes + item), tl.load(column_sizes + item)
    if has_ended(state, item) | (program * ROWS >= rows):
        return
    ACC: tl.constexpr = a.dtype.element_ty
    t = _steepness(state, item, NOW, ACC)
    tau = _number(state, item, TAU_A, ACC)
    omega = _number(state, item, OMEGA_ROWS, ACC)
    programs = tl.num_programs(1)
    slot = (item * programs + program).to(tl.int64)
    if not SYMMETRIC:
        partial += slot * m
    error_sum = tl.zeros((ROWS,), tl.float64)
    error_max = tl.zeros((ROWS,), tl.float64)
    plan_mass = tl.zeros((ROWS,), tl.float64)
    sums = tl.zeros((ROWS, COLUMNS), ACC)
    for row in range(program * ROWS, rows, programs * ROWS):
        i = row + tl.arange(0, ROWS)
        place = item.to(tl.int64) * n + i
        a_i = tl.load(a + place, i < rows, 0.0)
        i, a_rows = i[:, None], a_i[:, None]
        if WHOLE:
            z = _row_exponents(
                TILE, source, b, g, item, i, a_rows, 0, rows, columns, m, t, COLUMNS, ACC
            )
            top = _base(tl.max(z, 1))
            powers = tl.exp2(z - top[:, None])
            total = tl.sum(powers, 1)
        else:
            top = tl.full((ROWS,), float("-inf"), ACC)
            total = tl.zeros((ROWS,), ACC)
            for first in range(0, columns, COLUMNS):
                z = _row_exponents(
                    TILE, source, b, g, item, i, a_rows, first, rows, columns, m, t, COLUMNS, ACC
                )
                higher = tl.maximum(top, tl.max(z, 1))
                base = _base(higher)
                total = total * tl.exp2(top - base) + tl.sum(tl.exp2(z - base[:, None]), 1)
                top = higher
            top = _base(top)
        F = -(top + tl.log2(total)) / t
        i = row + tl.arange(0, ROWS)
        old = tl.load(f + place, i < rows, 0.0)
        if SYMMETRIC:
            new = old
            tl.store(F_out + place, F, i < rows)
        else:
            new = _relaxed(old, tau * F, tl.where(a_i > 0.0, omega, 1.0))
            tl.store(f + place, new, i < rows)
        row_sum = tl.where(a_i > 0.0, a_i * tl.exp2((new - F) * t), 0.0)
        error = tl.abs(row_sum - tl.where(a_i > 0.0, _target(a_i, new, t, tau), 0.0))
        error_sum += error.to(tl.float64)
        error_max = tl.maximum(error_max, error.to(tl.float64))
        plan_mass += row_sum.to(tl.float64)
        if not SYMMETRIC:
            share = tl.where(a_i > 0.0, row_sum / total, 0.0)[:, None]
            if WHOLE:
                sums += powers * share
            else:
                # The sums that another warp has stored for the stripe before are read here.
                tl.debug_barrier()
                for first in range(0, columns, COLUMNS):
                    z = _row_exponents(
                        TILE, source, b, g, item, i[:, None], a_rows, first, rows, columns, m, t,
                        COLUMNS, ACC,
                    )  # fmt: skip
                    part = tl.sum(tl.exp2(z - top[:, None]) * share, 0)
                    j = first + tl.arange(0, COLUMNS)
                    later = (j < columns) & (row != program * ROWS)
                    tl.store(partial + j, tl.load(partial + j, later, 0.0) + part, j < columns)
    if (not SYMMETRIC) and WHOLE:
        j = tl.arange(0, COLUMNS)
        tl.store(partial + j, tl.sum(sums, 0), j < columns)
    row_stats += slot * ROW_STATS
    tl.store(row_stats, tl.sum(error_sum, 0))
    tl.store(row_stats + 1, tl.max(error_max, 0))
    tl.store(row_stats + 2, tl.sum(plan_mass, 0))


# sum_j = sum over programs of partial_j, and how far these are from what they are to be
@triton.jit
def _measure(
    partial, sums, stats, b, g, column_sizes, used, state, programs, m, BLOCK: tl.constexpr
):
    item, block = tl.program_id(0), tl.program_id(1)
    if has_ended(state, item):
        return
    ACC: tl.constexpr = b.dtype.element_ty
    j = block * BLOCK + tl.arange(0, BLOCK)
    exists = j < tl.load(column_sizes + item)
    partial += (item * programs).to(tl.int64) * m
    total = tl.zeros((BLOCK,), ACC)
    for program in range(tl.load(used + item)):
        total += tl.load(partial + tl.cast(program, tl.int64) * m + j, exists, 0.0)
    place = item.to(tl.int64) * m + j
    b_j = tl.load(b + place, exists, 0.0)
    g_j = tl.load(g + place, exists, 0.0)
    counts = b_j > 0.0
    tl.store(sums + place, total, exists)
    target = _target(b_j, g_j, _steepness(state, item, NOW, ACC), _number(state, item, TAU_B, ACC))
    error = tl.where(counts, tl.abs(total.to(tl.float64) - target), 0.0)
    ratio = tl.where(counts, total / tl.where(counts, target, 1.0), float("inf"))
    stats += (item * tl.num_programs(1) + block) * COLUMN_STATS
    tl.store(stats, tl.sum(error, 0))
    tl.store(stats + 1, tl.max(error, 0))
    tl.store(stats + 2, tl.sum(tl.where(counts, total.to(tl.float64), 0.0), 0))
    tl.store(stats + 3, tl.min(ratio, 0).to(tl.float64))


# Sums outside are taken for lost: terms far below them may have underflowed.
@triton.jit
def _is_lost(total, ACC: tl.constexpr):
    least = 1e-290 if ACC.primitive_bitwidth == 64 else 1e-30
    most = 1e290 if ACC.primitive_bitwidth == 64 else 1e30
    return ((total > least) & (total < most)) == 0


# g <- g + omega (tau G - g) from the sums of the columns, G_j = -log2(sum_i a_i 2^z_ij) / t with
# z_ij = t (f_i - C_ij) where they are lost; ALL: g <- tau G; MASKED: g <- tau G without mass.
@triton.jit
def _update_columns(
    TILE: tl.constexpr, source, a, b, f, g, sums, row_sizes, column_sizes, state, n, m,
    MODE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    rows, columns = tl.load(row_sizes + item), tl.load(column_sizes + item)
    if (rows == 0) | (tl.program_id(1) * COLUMNS >= columns):
        return
    if MODE == LOST and has_ended(state, item):
        return
    ACC: tl.constexpr = b.dtype.element_ty
    t = _steepness(state, item, NOW_COLUMNS, ACC)
    tau = _number(state, item, TAU_B, ACC)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = j < columns
    place = item.to(tl.int64) * m + j
    b_j = tl.load(b + place, exists, 0.0)
    g_j = tl.load(g + place, exists, 0.0)
    G = tl.zeros((COLUMNS,), ACC)
    wanted = exists
    if MODE == MASKED:
        wanted = exists & (b_j <= 0.0)
    if MODE == LOST:
        total = tl.load(sums + place, exists, 1.0)
        counts = b_j > 0.0
        wanted = counts & _is_lost(total, ACC)
        known = counts & (wanted == 0)
        moved = tl.log2(tl.where(known, b_j, 1.0)) - tl.log2(tl.where(known, total, 1.0))
        G = g_j + moved / t
    if tl.max(wanted.to(tl.int32), 0) > 0:
        top = tl.full((COLUMNS,), float("-inf"), ACC)
        total = tl.zeros((COLUMNS,), ACC)
        for first in range(0, rows, ROWS):
            i = first + tl.arange(0, ROWS)[:, None]
            at = item.to(tl.int64) * n + i
            a_i = tl.load(a + at, i < rows, 0.0)
            costs = TILE(source, item, i, j[None, :], rows, columns, ACC)
            costs = _tame(costs, b_j[None, :])
            z = _exponents(costs, tl.load(f + at, i < rows, 0.0), a_i, t)
            higher = tl.maximum(top, tl.max(z, 0))
            base = _base(higher)
            total = total * tl.exp2(top - base) + tl.sum(tl.exp2(z - base[None, :]), 0)
            top = higher
        G = tl.where(wanted, -(_base(top) + tl.log2(total)) / t, G)
    if MODE == LOST:
        omega = _number(state, item, OMEGA_COLUMNS, ACC)
        new = _relaxed(g_j, tau * G, tl.where(b_j > 0.0, omega, 1.0))
        tl.store(g + place, new, exists & (b_j > 0.0))
    else:
        tl.store(g + place, tau * G, wanted)


# f <- (f + tau F) / 2 where there is mass
@triton.jit
def _average(f, F, a, state, n, BLOCK: tl.constexpr):
    item = tl.program_id(0)
    if has_ended(state, item):
        return
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = item.to(tl.int64) * n + i
    inside = tl.load(a + place, i < n, 0.0) > 0.0
    old = tl.load(f + place, inside, 0.0)
    moved = _number(state, item, TAU_A, old.dtype) * tl.load(F + place, inside, 0.0)
    tl.store(f + place, 0.5 * (old + moved), inside)
