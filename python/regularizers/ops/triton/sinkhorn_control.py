"""How Sinkhorn's iterations are driven on the device: over-relaxation, annealing and stopping.

One program an item of the batch runs what Relaxation, RoundingFloor and the loop of
ops/_sinkhorn_reference.py do, in float64, on a row of numbers in device memory. Sweeps read from
there whether an item still iterates, with which strength and by which factor. The host only
launches; it may ask, now and then and one question late, whether any item is left.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from regularizers.ops._sinkhorn_reference import Options, RoundingFloor, Verification

# The numbers of an item: [B, SLOTS] float64.
SLOTS = tl.constexpr(32)
ACTIVE = tl.constexpr(0)
CONVERGED = tl.constexpr(1)
ITERATIONS = tl.constexpr(2)
ERROR = tl.constexpr(3)
PLAN_MASS = tl.constexpr(4)
MASS = tl.constexpr(5)  # sum of a
EPSILON = tl.constexpr(6)
NOW = tl.constexpr(7)  # the annealed strength of the next half-iterations: over rows,
NOW_COLUMNS = tl.constexpr(30)  # over columns
FACTOR = tl.constexpr(8)  # eps_init eps_decay^k
DECAY = tl.constexpr(9)
TOL = tl.constexpr(10)
TAU_A = tl.constexpr(11)
TAU_B = tl.constexpr(12)
OMEGA_ROWS = tl.constexpr(13)  # of the next half-iterations
OMEGA_COLUMNS = tl.constexpr(14)
OMEGA = tl.constexpr(15)  # Relaxation
REFERENCE = tl.constexpr(17)
SINCE = tl.constexpr(18)
LOW = tl.constexpr(19)
BEST = tl.constexpr(20)  # RoundingFloor
BEST_SINCE = tl.constexpr(21)
LEVEL = tl.constexpr(22)  # of rounding
CAP = tl.constexpr(31)  # of Relaxation, from the lowest ratio
VERIFIED = tl.constexpr(16)  # Verification: the last exact iteration that was asked for
ERRORS = tl.constexpr(23)  # the last seven, latest last
HISTORY = tl.constexpr(7)
NEAR = tl.constexpr(Verification.NEAR)
PAUSE = tl.constexpr(Verification.PAUSE)

# What sweeps note: of the rows, by program: sum and largest of the errors, mass of the plan; of
# the columns, by block, the same and the lowest ratio of a column's sum to its target.
ROW_STATS = tl.constexpr(3)
COLUMN_STATS = tl.constexpr(4)


def start(options: Options, a: Tensor, epsilon: Tensor, active: Tensor) -> Tensor:
    """Return the state [B, SLOTS] before the first iteration; ``active [B]`` may be all False."""
    state = epsilon.new_zeros(epsilon.shape[0], SLOTS.value)
    numbers: dict[tl.constexpr, Any] = {
        ACTIVE: active,
        CONVERGED: ~active,  # a problem without points has nothing left to do
        MASS: a.sum(-1, dtype=torch.float64),
        EPSILON: epsilon,
        NOW: epsilon * max(options.eps_init, 1.0),
        NOW_COLUMNS: epsilon * max(options.eps_init, 1.0),
        FACTOR: options.eps_init,
        DECAY: options.eps_decay,
        TOL: options.tol,
        TAU_A: options.tau_a,
        TAU_B: options.tau_b,
        OMEGA_ROWS: 1.0,  # the first iteration has no f to relax from
        OMEGA: 1.0 if options.symmetric else options.momentum or 1.0,
        BEST: float("inf"),
        VERIFIED: -Verification.PAUSE,
        LEVEL: RoundingFloor(a.dtype).level,
    }
    for slot, number in numbers.items():
        column = state[:, slot.value]
        column.copy_(number) if isinstance(number, Tensor) else column.fill_(number)
    return state


def step(
    state: Tensor,
    row_stats: Tensor,
    column_stats: Tensor,
    used: Tensor,
    iteration: int,
    options: Options,
) -> None:
    """End an iteration of every active item.

    Args:
        state: of :func:`start`, changed in place.
        row_stats: float64 ``[B, programs, ROW_STATS]``.
        column_stats: float64 ``[B, blocks, COLUMN_STATS]``; read unless symmetric.
        used: int32 ``[B]``, how many programs of an item ran.
        iteration: counted from 0.
        options: of the solver.
    """
    programs, blocks = row_stats.shape[1], column_stats.shape[1]
    _step[(state.shape[0],)](
        state, row_stats, column_stats, used, iteration, programs, blocks,
        options.max_iter, options.min_iter, options.inner_iter, options.tol > 0.0,
        options.linf, options.symmetric, options.momentum == 0.0 and not options.symmetric,
        triton.next_power_of_2(programs), triton.next_power_of_2(blocks), num_warps=1,
    )  # fmt: skip


class Question:
    """Whether any item still iterates, asked without waiting for the answer."""

    def __init__(self, state: Tensor) -> None:
        self._answer = (state[:, ACTIVE.value] > 0).any().to("cpu", non_blocking=True)
        self._asked = torch.cuda.Event() if state.is_cuda else None
        if self._asked is not None:
            self._asked.record()

    def answer(self) -> bool:
        """Wait until the device has come by the question."""
        if self._asked is not None:
            self._asked.synchronize()
        return bool(self._answer)


@triton.jit
def has_ended(state, item):
    """Tell whether an item iterates no more."""
    return tl.load(state + item * SLOTS + ACTIVE) == 0.0


@triton.jit(do_not_specialize=["k", "max_iter", "min_iter", "inner_iter"])
def _step(
    state, row_stats, column_stats, used, k, programs, blocks, max_iter, min_iter, inner_iter,
    STOPS: tl.constexpr, LINF: tl.constexpr, SYMMETRIC: tl.constexpr, ADAPTIVE: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    if has_ended(state, item):
        return
    state += item * SLOTS
    program = tl.arange(0, PROGRAMS)
    ran = program < tl.load(used + item)
    rows = row_stats + (item * programs + program) * ROW_STATS
    total = tl.sum(tl.load(rows, ran, 0.0), 0)
    largest = tl.max(tl.load(rows + 1, ran, 0.0), 0)
    lowest = tl.full((), 1.0, tl.float64)
    if SYMMETRIC:
        plan_mass = tl.sum(tl.load(rows + 2, ran, 0.0), 0)
    else:
        block = tl.arange(0, BLOCKS)
        exists = block < blocks
        columns = column_stats + (item * blocks + block) * COLUMN_STATS
        total += tl.sum(tl.load(columns, exists, 0.0), 0)
        largest = tl.maximum(largest, tl.max(tl.load(columns + 1, exists, 0.0), 0))
        plan_mass = tl.sum(tl.load(columns + 2, exists, 0.0), 0)
        lowest = tl.min(tl.load(columns + 3, exists, float("inf")), 0)
    error = total
    if LINF:  # tl.max passes over NaN, a sum does not
        error = tl.where(total == total, largest, total)
    mass = tl.load(state + MASS)

    epsilon = tl.load(state + EPSILON)
    now = tl.load(state + NOW)
    annealed = now <= epsilon
    good = (error <= tl.load(state + TOL)) & STOPS
    stuck = _stopped_falling(state, error, mass) & STOPS
    enough = good | stuck
    may_stop = (k + 1 >= min_iter) & ((k + 1) % inner_iter == 0) & annealed
    exact = tl.load(state + OMEGA_ROWS) == 1.0
    ends = (k + 1 == max_iter) | (enough & may_stop & exact) | (error != error)
    tl.store(state + NOW_COLUMNS, now)
    tl.store(state + ITERATIONS, (k + 1).to(tl.float64))
    tl.store(state + ERROR, error)
    tl.store(state + PLAN_MASS, plan_mass)
    if ends:
        met = (error <= tl.load(state + TOL)) & annealed
        tl.store(state + CONVERGED, met.to(tl.float64))
        tl.store(state + ACTIVE, 0.0)
    else:
        omega = tl.load(state + OMEGA)
        verified = tl.load(state + VERIFIED)
        if ADAPTIVE:
            if annealed & (verified != k):
                omega = _observe(state, omega, error, mass)
                tl.store(state + OMEGA, omega)
                tl.store(state + CAP, _largest_safe(lowest))
            if omega > 1.0:
                omega = tl.maximum(1.0, tl.minimum(omega, tl.load(state + CAP)))
        factor = tl.load(state + FACTOR) * tl.load(state + DECAY)
        following = epsilon * tl.maximum(factor, 1.0)
        tl.store(state + FACTOR, factor)
        tl.store(state + NOW, following)
        tl.store(state + OMEGA_COLUMNS, tl.where(annealed, omega, 1.0))
        near = (error <= NEAR * tl.load(state + TOL)) & STOPS
        asks = (near | stuck) & (omega != 1.0) & (k + 1 - verified >= PAUSE)
        verifies = asks & (k + 2 >= min_iter) & ((k + 2) % inner_iter == 0)
        tl.store(state + VERIFIED, tl.where(verifies, (k + 1).to(tl.float64), verified))
        plain = verifies | (k + 2 == max_iter) | (following > epsilon)
        tl.store(state + OMEGA_ROWS, tl.where(plain, 1.0, omega))


# RoundingFloor.reached
@triton.jit
def _stopped_falling(state, error, mass):
    best = tl.load(state + BEST)
    fell = error < 0.99 * best
    since = tl.where(fell, 0.0, tl.load(state + BEST_SINCE) + 1.0)
    tl.store(state + BEST, tl.where(fell, error, best))
    tl.store(state + BEST_SINCE, since)
    return (since >= 20.0) & (error < tl.load(state + LEVEL) * mass)


# Relaxation.observe: returns omega. Branches not taken may hold NaN.
@triton.jit
def _observe(state, omega, error, mass):
    errors = state + ERRORS
    before = tl.load(errors + HISTORY - 1)
    earlier = tl.load(errors + HISTORY - 2)
    window_ago = tl.load(errors + 1)
    since = tl.load(state + SINCE) + 1.0
    low = tl.load(state + LOW)
    reference = tl.load(state + REFERENCE)
    for place in tl.static_range(HISTORY - 1):
        tl.store(errors + place, tl.load(errors + place + 1))
    tl.store(errors + HISTORY - 1, error)

    rate = error / before
    steady = tl.abs(rate - before / earlier) < 0.15 * (1.0 - rate) + 0.02
    starts = (omega == 1.0) & (since >= 3.0) & (error < 0.5 * mass)
    starts = starts & (rate > 0.2) & (rate < 1.0) & steady
    at_start = 2.0 / (1.0 + tl.sqrt(tl.maximum(1.0 - rate, 1e-4)))

    adjusts = (omega != 1.0) & (since >= 6.0)
    rate = tl.exp(tl.log(error / window_ago) / 6.0)
    bold = adjusts & (error > 4.0 * reference)
    slow = adjusts & (bold == 0) & (rate > omega - 1.0 + 0.02 * (2.0 - omega))
    shifted = rate + omega - 1.0
    gap = tl.where(rate < 1.0, 1.0 - shifted * shifted / (rate * omega * omega), 0.0)
    now = 2.0 / omega - 1.0
    faster = 2.0 / (1.0 + tl.sqrt(tl.maximum(tl.maximum(gap, now * now / 2.0), 1e-5)))
    fast = adjusts & (bold == 0) & (slow == 0)
    beyond = fast & (low >= 2.0)

    omega = tl.where(bold, 1.0 + 0.5 * (omega - 1.0), omega)
    omega = tl.where(beyond, 1.0 + 0.97 * (omega - 1.0), omega)
    omega = tl.where(slow, faster, tl.where(starts, at_start, omega))
    settles = starts | bold | slow | beyond
    tl.store(state + LOW, tl.where(settles, 0.0, tl.where(fast, low + 1.0, low)))
    tl.store(state + SINCE, tl.where(settles | fast, 0.0, since))
    tl.store(state + REFERENCE, tl.where(settles | fast, error, reference))
    return omega


# The largest omega in [1, 2] with x (1 - x^-omega) - omega log x >= 0.
@triton.jit
def _largest_safe(x):
    log_x = tl.log(tl.where((x > 1e-6) & (x < 1.0), x, 0.5))
    low, high = tl.full((), 1.0, tl.float64), tl.full((), 2.0, tl.float64)
    for _ in range(20):
        middle = 0.5 * (low + high)
        safe = x * (1.0 - tl.exp(-middle * log_x)) - middle * log_x >= 0.0
        low = tl.where(safe, middle, low)
        high = tl.where(safe, high, middle)
    return tl.where(x < 1.0 - 1e-6, tl.where(x > 1e-6, low, 1.0), 2.0)
