"""Solvers of the transport duals, on whole batches: each item has its own step and its own end."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regularizers.ops.sinkhorn import SINKHORN
from regularizers.ops.sparse_ot import DUAL, ENTROPIC, PLAN

# Line search (A. Lewis, M. Overton, 2013): enough decrease, and a slope that has become flatter.
DECREASE, CURVATURE, LONGEST_SEARCH = 1e-4, 0.9, 20
MEMORY = 10
# An item is finished when, so many times in a row, neither its value has fallen by this part of
# itself (rounding, in the type of the kernels) nor its misplaced mass by a tenth.
LEAST_CHANGE, PATIENCE = {torch.float32: 1e-9, torch.float64: 1e-14}, 10
# Values that differ by less than this part of themselves count as one when the iterate is chosen.
SAME_VALUE = 5e-6


@dataclass(frozen=True)
class Problem:
    """A batch of duals; vectors in the type of the kernels' sums."""

    cost: Tensor  # [B, n, m]
    a: Tensor  # [B, m]
    b: Tensor  # [B, n]
    gamma: Tensor
    k: int
    regularizer: int
    dual: bool
    backend: str | None

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return alpha and, of the dual, beta from the solver's variable x [B, m (+ n)]."""
        alpha, beta = x[:, : self.a.shape[1]], x[:, self.a.shape[1] :]
        return alpha.to(self.a.dtype), beta.to(self.a.dtype) if self.dual else None

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return minus the dual value [B] and its gradient, in the type of x."""
        alpha, beta = self.split(x)
        value, by_alpha, by_beta = DUAL.kernel(self.backend)(
            alpha, beta, self.cost, self.a, self.b, self.gamma, self.k, self.regularizer, False
        )
        gradient = torch.cat((by_alpha, by_beta), -1) if self.dual else by_alpha
        return -value.to(x.dtype), -gradient.to(x.dtype)

    def plan(self, x: Tensor) -> Tensor:
        """Return the plan [B, n, m] of the potentials in x."""
        alpha, beta = self.split(x)
        plan: Tensor = PLAN.kernel(self.backend)(
            alpha, beta, self.cost, self.b, self.gamma, self.k, self.regularizer
        )
        return plan

    def of(self, items: Tensor) -> Problem:
        """Return the problem of some items."""
        return dataclasses.replace(self, cost=self.cost[items], a=self.a[items], b=self.b[items])


@dataclass
class State:
    """Where the items of a batch are: x, minus the value, its gradient, and who still runs."""

    x: Tensor
    f: Tensor
    g: Tensor
    running: Tensor  # [B], bool
    iterations: Tensor  # [B]

    @classmethod
    def at(cls, problem: Problem, x: Tensor, tol: float) -> State:
        """Evaluate a start."""
        f, g = problem.evaluate(x)
        return cls(x, f, g, ~(error(g) < tol), torch.zeros_like(f, dtype=torch.int64))


def error(g: Tensor) -> Tensor:
    """Return the largest violation of a marginal [B]."""
    return g.abs().amax(-1)


def _where(condition: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(condition.view(-1, *(1,) * (new.dim() - 1)), new, old)


def _choose(condition: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Return the new tensors of the items that meet the condition, the old ones of the others."""
    if condition.all():  # nearly always, of a single problem
        return new
    return tuple(_where(condition, n, o) for n, o in zip(new, old, strict=True))


class _History:
    """The last MEMORY steps s and changes y of the gradient, in rings that all items share.

    The direction comes from the compact form of the inverse BFGS matrix (R. Byrd, J. Nocedal, R.
    Schnabel, 1994): products with the history and one inverse of size MEMORY, for all items at
    once. With S, Y the history, D and R the diagonal and upper triangle (older row, newer column)
    of S Y^T, and h the scale,

        H g = h g + S^T v - h Y^T u,   u = R^-1 S g,   v = R^-T ((D + h Y Y^T) u - h Y g)
    """

    def __init__(self, x: Tensor, scale: Tensor) -> None:
        batch, size = x.shape
        self.pairs = x.new_zeros(batch, 2 * MEMORY, size)  # S, then Y
        self.products = x.new_zeros(batch, MEMORY, MEMORY)  # S Y^T
        self.squares = x.new_zeros(batch, MEMORY, MEMORY)  # Y Y^T
        self.first_scale = self.scale = scale
        self.newest = MEMORY - 1
        age = torch.arange(MEMORY, device=x.device)
        # For each place of the newest pair: whether column j is as new as row i, or newer.
        ages = [(newest - age) % MEMORY for newest in range(MEMORY)]
        self.upper = [(old.unsqueeze(1) >= old).to(x.dtype) for old in ages]

    def push(self, step: Tensor, change: Tensor, wanted: Tensor) -> None:
        """Put a pair in place of the oldest; zeros where it is not wanted or curves the wrong way.

        Zeros take no part in the direction.
        """
        curvature = (step * change).sum(-1)
        wanted = wanted & (curvature > 1e-10 * step.norm(dim=-1) * change.norm(dim=-1))
        pair = torch.stack((step, change), 1)
        if not wanted.all():
            pair *= wanted.view(-1, 1, 1)
        place = self.newest = (self.newest + 1) % MEMORY
        self.pairs[:, place], self.pairs[:, MEMORY + place] = pair[:, 0], pair[:, 1]
        by_step, by_change = self.pairs.bmm(pair.mT).unbind(-1)
        self.products[:, place] = by_step[:, MEMORY:]
        self.products[:, :, place] = by_change[:, :MEMORY]
        self.squares[:, place] = self.squares[:, :, place] = by_change[:, MEMORY:]
        scale = curvature / by_change[:, MEMORY + place]
        self.scale = torch.where(wanted, scale, self.scale)

    def forget(self, which: Tensor) -> None:
        """Drop what some items remember."""
        for kept in (self.pairs, self.products, self.squares):
            kept[which] = 0
        self.scale = torch.where(which, self.first_scale, self.scale)

    def direction(self, g: Tensor) -> Tensor:
        """Return -H g."""
        scale = self.scale.view(-1, 1, 1)
        diagonal = self.products.diagonal(dim1=-2, dim2=-1)
        # A place without a pair gets a unit diagonal, which leaves its zeros alone.
        triangle = self.products * self.upper[self.newest] + torch.diag_embed(
            (diagonal == 0).to(g.dtype)
        )
        inverse = torch.linalg.inv_ex(triangle).inverse
        by_step, by_change = self.pairs.bmm(g.unsqueeze(-1)).split(MEMORY, 1)
        u = inverse.bmm(by_step)
        change = self.squares.bmm(u) - by_change
        v = inverse.mT.bmm(diagonal.unsqueeze(-1) * u + scale * change)
        weights = torch.cat((v, -scale * u), 1)
        return -(scale * g.unsqueeze(-1)).baddbmm(self.pairs.mT, weights).squeeze(-1)


def lbfgs(problem: Problem, x: Tensor, max_iter: int, tol: float) -> State:
    """Minimise minus the dual by L-BFGS; the line search needs no second derivative to exist."""
    state = State.at(problem, x, tol)
    best = _Best(state)
    first_scale = problem.gamma.to(x.dtype).expand(x.shape[0]) / 2
    history = _History(x, first_scale)
    unchanged = torch.zeros_like(state.iterations)
    was_stuck = torch.zeros_like(state.running)
    for _ in range(max_iter):
        if not state.running.any():
            break
        direction = history.direction(state.g)
        uphill = ~((state.g * direction).sum(-1) < 0)
        if uphill.any():
            direction = _where(uphill, -first_scale.unsqueeze(-1) * state.g, direction)
        x, f, g, moved = _line_search(problem, state, direction)
        history.push(x - state.x, g - state.g, moved)
        stuck = state.running & ~moved
        if stuck.any():  # once more along the gradient, then the item is as good as it gets
            history.forget(stuck)
        state.iterations += state.running
        state.x, state.f, state.g = x, f, g
        progress = best.see(state, LEAST_CHANGE[problem.a.dtype])
        unchanged = torch.where(progress, 0, unchanged + 1)
        finished = (error(g) < tol) | (stuck & was_stuck) | (unchanged >= PATIENCE)
        state.running = state.running & ~finished
        was_stuck = stuck
    return best.state


class _Best:
    """The iterate to return.

    Where scores tie at the k-th place the dual has kinks: along the way to its maximum the value
    creeps up while the marginals jump about. Of the iterates with practically the best value, the
    one with the least misplaced mass is kept.
    """

    def __init__(self, state: State) -> None:
        self.state = dataclasses.replace(state)
        self.least = state.f
        self.misplaced = self.least_misplaced = state.g.abs().sum(-1)

    def see(self, new: State, change: float = 0.0) -> Tensor:
        """Compare with a further iterate, item by item; tell whose value or marginals improved."""
        old, misplaced = self.state, new.g.abs().sum(-1)
        progress = new.f < self.least - change * self.least.abs()
        progress |= misplaced < 0.9 * self.least_misplaced
        self.least_misplaced = torch.minimum(misplaced, self.least_misplaced)
        self.least = torch.where(new.f < self.least, new.f, self.least)
        bound = self.least + SAME_VALUE * self.least.abs()
        better = (new.f <= bound) & ((misplaced < self.misplaced) | (old.f > bound))
        self.misplaced = torch.where(better, misplaced, self.misplaced)
        x, f, g = _choose(better, (new.x, new.f, new.g), (old.x, old.f, old.g))
        self.state = State(x, f, g, new.running, new.iterations)
        return progress


def _line_search(
    problem: Problem, state: State, direction: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Search each running item's ray; return x, f, g and who moved. The others stay."""
    f0, slope0 = state.f, (state.g * direction).sum(-1)
    step = torch.ones_like(f0)
    low, high = torch.zeros_like(f0), torch.full_like(f0, torch.inf)
    slope_low, slope_high = slope0, torch.full_like(f0, torch.nan)
    searching = state.running.clone()
    x, f, g = state.x, state.f, state.g
    noise = 4 * torch.finfo(problem.a.dtype).eps * f0.abs()
    for _ in range(LONGEST_SEARCH):
        there = torch.where(searching.unsqueeze(-1), state.x + step.unsqueeze(-1) * direction, x)
        f_there, g_there = problem.evaluate(there)
        slope = (g_there * direction).sum(-1)
        # Close to the optimum the value is noise; then a slope that has not turned round decides
        # (W. Hager, H. Zhang, 2005).
        lower = f_there <= f0 + DECREASE * step * slope0
        lower |= (f_there <= f0 + noise) & (slope <= (2 * DECREASE - 1) * slope0)
        flatter = slope >= CURVATURE * slope0
        better = searching & lower
        x, f, g = _choose(better, (there, f_there, g_there), (x, f, g))
        searching = searching & ~(lower & flatter)
        if not searching.any():
            break
        low, slope_low = torch.where(better, step, low), torch.where(better, slope, slope_low)
        over = searching & ~lower
        high, slope_high = torch.where(over, step, high), torch.where(over, slope, slope_high)
        step = torch.where(searching, _next_step(low, high, slope_low, slope_high, slope0), step)
    return x, f, g, (x != state.x).any(-1)


def _next_step(
    low: Tensor, high: Tensor, slope_low: Tensor, slope_high: Tensor, slope0: Tensor
) -> Tensor:
    """Return the zero of the slope by linear interpolation, kept well inside the bracket."""
    part = slope_low / (slope_low - slope_high)
    part = torch.where(part.isnan() | (slope_high < 0), 0.5, part).clamp(0.1, 0.9)
    growth = slope0 / (slope0 - slope_low)  # where a straight slope from 0 through low ends
    growth = torch.where(growth > 0, growth, torch.inf).clamp(2.0, 10.0)
    inside = low + part * (high - low)
    return torch.where(high.isinf(), low * growth, inside)


def newton(problem: Problem, x: Tensor, max_iter: int, tol: float) -> State:
    """Minimise minus the semi-dual by semi-smooth Newton steps; L-BFGS goes on where they fail.

    The system is damped by the misplaced mass, which fades at the optimum and bounds the step of a
    row that no column serves yet.
    """
    assert not problem.dual
    state = State.at(problem, x, tol)
    best = _Best(state)
    handed_over = torch.zeros_like(state.running)
    for _ in range(max_iter):
        if not state.running.any():
            break
        weights = curvature_weights(problem.plan(state.x), problem.regularizer).to(x.dtype)
        residual = -(state.g - state.g.mean(-1, keepdim=True))
        damping = state.g.abs().sum(-1).clamp(max=1e-2) + 1e-10
        direction = problem.gamma.to(x.dtype) * solve_hessian(weights, residual, damping, 1e-3)
        new, moved = _armijo(problem, state, direction)
        new.iterations = state.iterations + state.running
        handed_over |= state.running & ~moved
        new.running = state.running & moved & ~(error(new.g) < tol)
        state = new
        best.see(state)
    handed_over |= state.running  # out of iterations: none are left for L-BFGS either
    left = max_iter - int(state.iterations.max()) if state.iterations.numel() else 0
    found = best.state
    if left > 0 and bool(handed_over.any()):
        items = handed_over.nonzero().squeeze(-1)
        rest = lbfgs(problem.of(items), found.x[items], left, tol)
        found.x = found.x.index_copy(0, items, rest.x)
        found.iterations = found.iterations.index_add(0, items, rest.iterations)
    return found


def _armijo(problem: Problem, state: State, direction: Tensor) -> tuple[State, Tensor]:
    """Halve the step until the value has decreased enough, 20 times at most; tell who moved."""
    slope = (state.g * direction).sum(-1)
    noise = 4 * torch.finfo(problem.a.dtype).eps * state.f.abs()
    step = torch.ones_like(slope)
    searching = state.running & (slope < 0)
    x, f, g = state.x, state.f, state.g
    for _ in range(20):
        if not searching.any():
            break
        there = torch.where(searching.unsqueeze(-1), state.x + step.unsqueeze(-1) * direction, x)
        f_there, g_there = problem.evaluate(there)
        enough = f_there <= state.f + DECREASE * step * slope
        enough |= (f_there <= state.f + noise) & (error(g_there) < error(state.g))
        taken = searching & enough
        x, f, g = (_where(taken, new, old) for new, old in ((there, x), (f_there, f), (g_there, g)))
        searching = searching & ~taken
        step = torch.where(searching, step / 2, step)
    return State(x, f, g, state.running, state.iterations), (x != state.x).any(-1)


def curvature_weights(plan: Tensor, regularizer: int) -> Tensor:
    r"""Return W [B, n, m], gamma times the derivative of the plan in its scores.

    With D1, D2 its row and column sums, the dual's second derivative is minus
    :math:`\begin{pmatrix} D_1 & W \\ W^T & D_2 \end{pmatrix} / \gamma`, and the semi-dual's minus
    :math:`(D_1 - W D_2^{-1} W^T) / \gamma`.
    """
    return plan if regularizer == ENTROPIC else (plan > 0).to(plan.dtype)


def solve_hessian(
    weights: Tensor, right: Tensor, damping: Tensor | None, tolerance: float
) -> Tensor:
    """Solve (D1 - W D2^-1 W^T + damping) x = right by preconditioned conjugate gradients.

    Started at zero, it stays in the range of the matrix: constants, and whatever else the support
    leaves open, get no part of a consistent right side.
    """
    columns = weights.sum(-1)
    inverse_columns = torch.where(columns > 0, 1 / columns, 0)
    diagonal = weights.sum(-2)
    if damping is not None:
        diagonal = diagonal + damping.unsqueeze(-1)
    preconditioner = torch.where(diagonal > 0, 1 / diagonal, 0)

    def product(x: Tensor) -> Tensor:
        by_column = inverse_columns * (weights @ x.unsqueeze(-1)).squeeze(-1)
        return diagonal * x - (weights.mT @ by_column.unsqueeze(-1)).squeeze(-1)

    x = torch.zeros_like(right)
    residual = right
    z = preconditioner * residual
    p = z
    rz = (residual * z).sum(-1)
    goal = tolerance**2 * rz
    for _ in range(10 * right.shape[-1]):
        going = rz > goal
        if not going.any():
            break
        q = product(p)
        pq = (p * q).sum(-1)
        going &= pq > 0
        step = torch.where(going, rz / pq, 0).unsqueeze(-1)
        x = x + step * p
        residual = residual - step * q
        z = preconditioner * residual
        rz_next = torch.where(going, (residual * z).sum(-1), 0)
        p = z + torch.where(going, rz_next / rz, 0).unsqueeze(-1) * p
        rz = rz_next
    return x


def adam(problem: Problem, x: Tensor, max_iter: int, tol: float, lr: float) -> State:
    """Minimise minus the dual by Adam on subgradients; the step decays to zero along a cosine."""
    state = State.at(problem, x, tol)
    best = _Best(state)
    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, max_iter + 1):
        if not state.running.any():
            break
        rate = lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / max_iter))
        mean = 0.9 * mean + 0.1 * state.g
        square = 0.999 * square + 0.001 * state.g.square()
        root = (square / (1 - 0.999**step)).sqrt() + torch.finfo(x.dtype).tiny
        moved = state.x - rate * (mean / (1 - 0.9**step)) / root
        new_x = _where(state.running, moved, state.x)
        f, g = problem.evaluate(new_x)
        running = state.running & ~(error(g) < tol)
        state = State(new_x, f, g, running, state.iterations + state.running)
        best.see(state)
    return best.state


def block_coordinates(problem: Problem, alpha: Tensor, max_iter: int, tol: float) -> State:
    """Solve the columns for beta, then the rows for alpha, exactly and in turn.

    Both are multipliers of a semi-dual: of the problem, and of the transposed one. For the entropic
    regularizer this is Sinkhorn's algorithm, which has an operator of its own.
    """
    if problem.regularizer == ENTROPIC:
        return _sinkhorn(problem, alpha, max_iter, tol)
    semi = dataclasses.replace(problem, dual=False)
    rows = dataclasses.replace(
        semi, cost=problem.cost.mT.contiguous(), a=problem.b, b=problem.a, k=problem.b.shape[1]
    )
    beta, state = _solve_side(semi, alpha)
    for _ in range(max_iter):
        state.running = state.running & ~(error(state.g) < tol)
        if not state.running.any():
            break
        new_alpha, _ = _solve_side(rows, beta)
        alpha = _where(state.running, new_alpha, alpha)
        iterations = state.iterations + state.running
        running = state.running
        beta, state = _solve_side(semi, alpha)
        state.running, state.iterations = running, iterations
    return state


def _sinkhorn(problem: Problem, alpha: Tensor, max_iter: int, tol: float) -> State:
    """Run the shared solver, whose masses stand outside of the potentials: alpha = g + gamma log a.

    Its rows, exact at the end, are the columns of the plan here.
    """
    semi = dataclasses.replace(problem, dual=False)
    inside = (
        problem.gamma.to(problem.a.dtype)
        * problem.a.clamp(min=torch.finfo(problem.a.dtype).tiny).log()
    )
    options = (tol, max_iter, 0, 1, 1.0, 1.0, 0.0, 1.0, 1.0, True, False)
    found = SINKHORN.kernel(problem.backend)(
        problem.cost,
        problem.b,
        problem.a,
        problem.gamma.double().expand(problem.cost.shape[0]),
        None,
        alpha.to(problem.a.dtype) - inside,
        None,
        None,
        *options,
    )
    _, state = _solve_side(semi, (found[1] + inside).to(alpha.dtype))
    state.iterations = found[3]
    state.running = ~(error(state.g) < tol)
    return state


def _solve_side(semi: Problem, x: Tensor) -> tuple[Tensor, State]:
    """Return the exact potentials of the other side, and where the semi-dual stands."""
    call = (semi.cost, semi.a, semi.b, semi.gamma, semi.k, semi.regularizer, False)
    value, gradient, other = DUAL.kernel(semi.backend)(x.to(semi.a.dtype), None, *call)
    running = torch.ones_like(value, dtype=torch.bool)
    iterations = torch.zeros_like(value, dtype=torch.int64)
    return other.to(x.dtype), State(x, -value, -gradient.to(x.dtype), running, iterations)
