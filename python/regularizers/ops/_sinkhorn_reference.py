"""Sinkhorn's iteration in plain PyTorch, the specification of the solvers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """How to iterate; the names are those of :func:`regularizers.ops.sinkhorn`."""

    tol: float
    max_iter: int
    min_iter: int
    inner_iter: int
    eps_init: float
    eps_decay: float
    momentum: float  # 0: chosen by Relaxation
    tau_a: float
    tau_b: float
    linf: bool
    symmetric: bool

    def epsilon_at(self, iteration: int, epsilon: float) -> float:
        """Return the annealed strength of an iteration."""
        return epsilon * max(self.eps_init * self.eps_decay**iteration, 1.0)

    def tests(self, iteration: int) -> bool:
        """Tell whether an iteration may be the last one before ``max_iter``."""
        return iteration + 1 >= self.min_iter and (iteration + 1) % self.inner_iter == 0


@dataclass
class Solution:
    """Potentials ``f [n]``, ``g [m]`` of one problem and how the iteration ended."""

    f: Tensor
    g: Tensor
    value: Tensor
    iterations: int
    error: float
    converged: bool


class Relaxation:
    r"""Over-relaxation :math:`f \leftarrow f + \omega (F - f)` with a factor that adapts.

    Near the solution alternating updates converge with a rate r, and Young's theory of two-block
    relaxation holds: the best factor is :math:`2 / (1 + \sqrt{1 - r})`, and a rate :math:`\lambda`
    observed under a smaller one tells :math:`r = (\lambda + \omega - 1)^2 / (\lambda \omega^2)`.
    Far from it the factor is capped so that the dual objective cannot fall (Thibault, Chizat,
    Dossal and Papadakis, 2021, arXiv 1711.01851).
    """

    WINDOW = 6

    def __init__(self, momentum: float) -> None:
        self._adaptive = momentum == 0.0
        self._omega = 1.0 if self._adaptive else momentum
        self._cap = 1.0
        self._errors: list[float] = []
        self._reference = 0.0
        self._since = self._low = 0

    @property
    def omega(self) -> float:
        """The factor that the next half-iteration may use."""
        return max(1.0, min(self._omega, self._cap)) if self._adaptive else self._omega

    def observe(self, error: float, mass: float, lowest_ratio: float) -> None:
        """Note the error of an iteration and the lowest ratio of a column's sum to its target."""
        if not self._adaptive:
            return
        self._cap = _largest_safe(lowest_ratio)
        self._errors.append(error)
        self._since += 1
        if self._omega == 1.0:
            self._start(mass)
        elif self._since >= self.WINDOW:
            self._adjust()

    def _start(self, mass: float) -> None:
        if self._since < 3 or not self._errors[-1] < 0.5 * mass:
            return
        rate = _quotient(self._errors[-1], self._errors[-2])
        before = _quotient(self._errors[-2], self._errors[-3])
        if 0.2 < rate < 1.0 and abs(rate - before) < 0.15 * (1.0 - rate) + 0.02:
            self._settle(2.0 / (1.0 + math.sqrt(max(1.0 - rate, 1e-4))))

    def _adjust(self) -> None:
        omega = self._omega
        rate = _quotient(self._errors[-1], self._errors[-1 - self.WINDOW]) ** (1.0 / self.WINDOW)
        if self._errors[-1] > 4.0 * self._reference:
            self._settle(1.0 + 0.5 * (omega - 1.0))  # too bold
        elif rate > omega - 1.0 + 0.02 * (2.0 - omega):
            gap = 1.0 - (rate + omega - 1.0) ** 2 / (rate * omega**2) if rate < 1.0 else 0.0
            now = 2.0 / omega - 1.0  # sqrt(1 - r) for which omega is best
            self._settle(2.0 / (1.0 + math.sqrt(max(gap, now * now / 2.0, 1e-5))))
        elif self._low >= 2:  # beyond the best factor the rate is omega - 1 and tells nothing
            self._settle(1.0 + 0.97 * (omega - 1.0))
        else:
            self._low += 1
            self._reference = self._errors[-1]
            self._since = 0

    def _settle(self, omega: float) -> None:
        self._omega = omega
        self._reference = self._errors[-1]
        self._since = self._low = 0


def _quotient(x: float, y: float) -> float:
    return x / y if y != 0.0 else math.nan


def _largest_safe(x: float) -> float:
    """Return the largest omega in [1, 2] with x (1 - x^-omega) - omega log x >= 0."""
    if not x < 1.0 - 1e-6:  # nearer to 1 both terms cancel
        return 2.0
    if not x > 1e-6:
        return 1.0
    log_x, low, high = math.log(x), 1.0, 2.0
    for _ in range(20):
        middle = 0.5 * (low + high)
        if x * (1.0 - math.exp(-middle * log_x)) - middle * log_x >= 0.0:
            low = middle
        else:
            high = middle
    return low


class RoundingFloor:
    """Errors cannot fall for ever: where rounding holds them up, going on is waste."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.level = 1e-13 if dtype == torch.float64 else 1e-5
        self._best = math.inf
        self._since = 0

    def reached(self, error: float, mass: float) -> bool:
        """Note an error; tell whether it has stopped falling at the level of rounding."""
        if error < 0.99 * self._best:
            self._best, self._since = error, 0
            return False
        self._since += 1
        return self._since >= 20 and error < self.level * mass


class Verification:
    """When to try an iteration with an exact update of the rows, which alone can be the last.

    Under over-relaxation the rows carry most of the error: it is tried already near the tolerance,
    but not too often, since it costs some of the momentum.
    """

    NEAR = 20.0
    PAUSE = 6

    def __init__(self) -> None:
        self._last = -self.PAUSE

    def ask(self, iteration: int) -> None:
        """Ask for an exact iteration; granted if the last one is some iterations ago."""
        if iteration - self._last >= self.PAUSE:
            self._last = iteration

    def due(self, iteration: int) -> bool:
        """Tell whether this iteration was granted."""
        return iteration == self._last


class Problem:
    """Row and column updates of one problem, in the log domain; weights 0 mask."""

    def __init__(self, cost: Tensor, a: Tensor, b: Tensor) -> None:
        masked = (a[:, None] <= 0) | (b <= 0)
        self.a, self.b = a, b
        self.cost = torch.where(masked, torch.where(cost.isfinite(), cost, 0), cost)
        self.log_a = torch.where(a > 0, a, 1).log().where(a > 0, -math.inf)
        self.log_b = torch.where(b > 0, b, 1).log().where(b > 0, -math.inf)

    def rows(self, g: Tensor, epsilon: float | Tensor) -> Tensor:
        """Return F_i = -epsilon log sum_j b_j exp((g_j - C_ij) / epsilon)."""
        return -epsilon * torch.logsumexp((g - self.cost) / epsilon + self.log_b, -1)

    def columns(self, f: Tensor, epsilon: float | Tensor) -> Tensor:
        """Return G_j = -epsilon log sum_i a_i exp((f_i - C_ij) / epsilon)."""
        shifted = (f[:, None] - self.cost) / epsilon + self.log_a[:, None]
        return -epsilon * torch.logsumexp(shifted, -2)


def target(weight: Tensor, potential: Tensor, epsilon: float | Tensor, tau: float) -> Tensor:
    """Return what a marginal is to be: the weight, or weight exp(-potential / rho) for tau < 1."""
    if tau == 1.0:
        return weight
    return weight * torch.exp(-potential * (1.0 - tau) / (tau * epsilon))


def value(
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    plan_mass: Tensor,
    epsilon: float | Tensor,
    tau_a: float,
    tau_b: float,
) -> Tensor:
    """Return <P, C> + epsilon KL(P | a b), plus the divergences of the marginals for tau < 1.

    Batch dimensions come first; ``epsilon`` and ``plan_mass`` may have them too.
    """

    def side(weight: Tensor, potential: Tensor, tau: float) -> Tensor:
        if tau < 1.0:
            rho = tau * epsilon / (1.0 - tau)
            rho = rho[..., None] if isinstance(rho, Tensor) else rho
            potential = -rho * torch.expm1(-potential / rho)
        return torch.where(weight > 0, weight * potential, 0).sum(-1)

    masses = a.sum(-1) * b.sum(-1) - plan_mass
    return side(a, f, tau_a) + side(b, g, tau_b) + epsilon * masses


def solve(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    f0: Tensor | None,
    g0: Tensor | None,
    options: Options,
) -> Solution:
    """Solve one problem, ``cost [n, m]``: g first, f last, until the marginals are met."""
    problem = Problem(cost, a, b)
    if options.symmetric:
        return _solve_symmetric(problem, epsilon, f0 if g0 is None else g0, options)
    relaxation, floor = Relaxation(options.momentum), RoundingFloor(cost.dtype)
    mass = a.sum().item()
    f = torch.zeros_like(a) if f0 is None else f0
    start = options.epsilon_at(0, epsilon)
    g = options.tau_b * problem.columns(f, start) if g0 is None else g0
    verification = Verification()
    converged = False
    for k in range(options.max_iter):
        now = options.epsilon_at(k, epsilon)
        annealing, last = now > epsilon, k + 1 == options.max_iter
        verifying = verification.due(k)
        # The first iteration has no f to relax from.
        omega = 1.0 if k == 0 or verifying or last or annealing else relaxation.omega
        F = problem.rows(g, now)
        f = f + omega * (options.tau_a * F - f) if omega != 1.0 else options.tau_a * F
        row_sum = a * torch.exp((f - F) / now)
        row_error = (row_sum - target(a, f, now, options.tau_a))[a > 0].abs()
        G = problem.columns(f, now)
        column_sum = b * torch.exp((g - G) / now)
        column_target = target(b, g, now, options.tau_b)
        column_error = (column_sum - column_target)[b > 0].abs()
        if options.linf:
            error = max(row_error.max().item(), column_error.max().item())
        else:
            error = (row_error.sum() + column_error.sum()).item()
        plan_mass = column_sum[b > 0].sum()
        if math.isnan(error):
            break
        good = options.tol > 0.0 and error <= options.tol
        stuck = options.tol > 0.0 and floor.reached(error, mass)
        may_stop = options.tests(k) and not annealing
        if last or ((good or stuck) and may_stop and omega == 1.0):
            converged = error <= options.tol and not annealing
            break
        if not annealing and not verifying:
            relaxation.observe(error, mass, (column_sum / column_target)[b > 0].min().item())
        near = options.tol > 0.0 and error <= Verification.NEAR * options.tol
        if (near or stuck) and relaxation.omega != 1.0 and options.tests(k + 1):
            verification.ask(k + 1)
        omega = 1.0 if annealing else relaxation.omega
        g = g + omega * (options.tau_b * G - g)
    # Points without mass get the potential that mass there would have.
    f = torch.where(a > 0, f, options.tau_a * problem.rows(g, now))
    g = torch.where(b > 0, g, options.tau_b * problem.columns(f, now))
    found = value(a, b, f, g, plan_mass, now, options.tau_a, options.tau_b)
    return Solution(f, g, found, k + 1, error, converged)


def _solve_symmetric(
    problem: Problem, epsilon: float, f0: Tensor | None, options: Options
) -> Solution:
    """Solve with a symmetric cost and a = b: f <- (f + tau F(f)) / 2.

    Every iteration measures the f that it starts from, so the last update is not done.
    """
    a = problem.a
    floor, mass = RoundingFloor(a.dtype), a.sum().item()
    f = torch.zeros_like(a) if f0 is None else f0
    converged = False
    for k in range(options.max_iter):
        now = options.epsilon_at(k, epsilon)
        annealing, last = now > epsilon, k + 1 == options.max_iter
        F = problem.rows(f, now)
        row_sum = a * torch.exp((f - F) / now)
        errors = (row_sum - target(a, f, now, options.tau_a))[a > 0].abs()
        error = (errors.max() if options.linf else errors.sum()).item()
        if math.isnan(error):
            break
        good = options.tol > 0.0 and error <= options.tol
        stuck = options.tol > 0.0 and floor.reached(error, mass)
        may_stop = options.tests(k) and not annealing
        if last or ((good or stuck) and may_stop):
            converged = error <= options.tol and not annealing
            break
        f = torch.where(a > 0, 0.5 * (f + options.tau_a * F), f)
    f = torch.where(a > 0, f, options.tau_a * F)
    found = value(a, a, f, f, row_sum[a > 0].sum(), now, options.tau_a, options.tau_a)
    return Solution(f, f.clone(), found, k + 1, error, converged)


def unrolled(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    f0: Tensor | None,
    g0: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run all ``max_iter`` plain iterations, differentiably, and return f, g, value, error.

    Nothing depends on values, so that vmap and jvp can pass. ``momentum`` and ``tol`` are not
    used.
    """
    problem = Problem(cost, a, b)
    f = torch.zeros_like(a) if f0 is None else f0
    g = torch.zeros_like(b) if g0 is None else g0
    for k in range(options.max_iter):
        now = epsilon * max(options.eps_init * options.eps_decay**k, 1.0)
        if options.symmetric:
            if k + 1 < options.max_iter:
                f = g = 0.5 * (f + options.tau_a * problem.rows(f, now))
            continue
        if k > 0 or g0 is None:
            g = options.tau_b * problem.columns(f, now)
        f = options.tau_a * problem.rows(g, now)
    column_sum = torch.where(b > 0, b * torch.exp((g - problem.columns(f, now)) / now), 0)
    column_target = torch.where(b > 0, target(b, g, now, options.tau_b), 0)
    errors = (column_sum - column_target).abs()
    found = value(a, b, f, g, column_sum.sum(-1), now, options.tau_a, options.tau_b)
    return f, g, found, errors.amax(-1) if options.linf else errors.sum(-1)


# --- Batches --------------------------------------------------------------------------------------


def within(weight: Tensor, sizes: Tensor | None) -> Tensor:
    """Return masses [B, k] with 0 beyond each problem's size."""
    if sizes is None:
        return weight
    inside = torch.arange(weight.shape[-1], device=weight.device) < sizes[:, None]
    return torch.where(inside, weight, 0)


def check_sizes(name: str, sizes: Tensor | None, largest: int) -> None:
    """Check sizes where that costs no synchronisation."""
    if sizes is None or sizes.device.type != "cpu":
        return
    for item, size in enumerate(sizes.tolist()):
        if not 0 <= size <= largest:
            raise ValueError(f"{name} must lie in [0, {largest}], got {size} for item {item}")


def check_values(a: Tensor, b: Tensor, epsilon: Tensor, balanced: bool) -> None:
    """Check values where that costs no synchronisation."""
    if a.device.type != "cpu":
        return
    for strength in epsilon.tolist():
        if not 0.0 < strength < float("inf"):
            raise ValueError(f"epsilon must be positive and finite, got {strength}")
    for name, weight in (("a", a), ("b", b)):
        if bool((~((weight >= 0) & weight.isfinite())).any()):
            raise ValueError(f"{name} must be finite and not negative")
    rows, columns = a.sum(-1), b.sum(-1)
    apart = (rows - columns).abs() > 1e-4 * torch.maximum(rows, columns)
    has_points = a.shape[-1] > 0 and b.shape[-1] > 0  # else there is no mass to balance
    if balanced and has_points and bool(apart.any()):
        item = int(apart.nonzero()[0])
        raise ValueError(
            f"a and b must have equal sums in a balanced problem, got {rows[item].item():g} and "
            f"{columns[item].item():g} for item {item}"
        )


def solve_reference(
    name: str,
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    f0: Tensor | None,
    g0: Tensor | None,
    row_sizes: Tensor | None,
    column_sizes: Tensor | None,
    *numbers: Any,
) -> tuple[Tensor, ...]:
    """Solve a batch, ``cost [B, n, m]``; ``name`` says in errors what the costs come from."""
    options = Options(*numbers)
    check_sizes("row_sizes", row_sizes, a.shape[1])
    check_sizes("column_sizes", column_sizes, b.shape[1])
    a, b = within(a, row_sizes), within(b, column_sizes)
    check_values(a, b, epsilon, options.tau_a == options.tau_b == 1.0)
    count, n, m = cost.shape
    results = (
        a.new_zeros(count, n),
        a.new_zeros(count, m),
        a.new_zeros(count),
        torch.zeros_like(epsilon, dtype=torch.int64),
        a.new_zeros(count),
        torch.zeros_like(epsilon, dtype=torch.bool),
    )
    wide = cost.to(a.dtype)
    for i in range(count):
        n = cost.shape[1] if row_sizes is None else int(row_sizes[i])
        m = cost.shape[2] if column_sizes is None else int(column_sizes[i])
        if n == 0 or m == 0:
            results[5][i] = True
            continue
        starts = (None if f0 is None else f0[i, :n], None if g0 is None else g0[i, :m])
        found = solve(wide[i, :n, :m], a[i, :n], b[i, :m], epsilon[i].item(), *starts, options)
        if found.iterations == 1 and found.error != found.error and cost.device.type == "cpu":
            raise ValueError(
                f"{name} must be finite where both weights are positive, which item {i} is not "
                "(NaN, -inf, or a row or column without a finite entry)"
            )
        results[0][i, :n], results[1][i, :m] = found.f, found.g
        results[2][i], results[3][i] = found.value, found.iterations
        results[4][i], results[5][i] = found.error, found.converged
    return results


def unrolled_batch(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    f0: Tensor | None,
    g0: Tensor | None,
    row_sizes: Tensor | None,
    column_sizes: Tensor | None,
    *numbers: Any,
) -> tuple[Tensor, ...]:
    """Run the plain, differentiable iteration, for functorch and forward-mode differentiation."""
    options = Options(*numbers)
    a, b = within(a, row_sizes), within(b, column_sizes)
    wide = cost.to(a.dtype)
    items = []
    for i in range(cost.shape[0]):
        starts = (None if f0 is None else f0[i], None if g0 is None else g0[i])
        f, g, found, error = unrolled(wide[i], a[i], b[i], epsilon[i].to(a.dtype), *starts, options)
        count = torch.full_like(error, options.max_iter, dtype=torch.int64)
        items.append((f, g, found, count, error.detach(), error <= options.tol))
    f, g, *rest = (torch.stack(column) for column in zip(*items, strict=True))
    unit_a, unit_b = (within(torch.ones_like(x), s) for x, s in ((f, row_sizes), (g, column_sizes)))
    return torch.where(unit_a > 0, f, 0), torch.where(unit_b > 0, g, 0), *rest


# --- Derivatives ----------------------------------------------------------------------------------


def ratio(numerator: Tensor, weight: Tensor) -> Tensor:
    """Return numerator / weight, 0 where the weight is 0."""
    return torch.where(weight > 0, numerator / torch.where(weight > 0, weight, 1), 0)


def by_masses(
    a: Tensor, b: Tensor, epsilon: Tensor, f: Tensor, g: Tensor, tau_a: float, tau_b: float
) -> tuple[Tensor, Tensor]:
    """Return the derivatives of the value in the masses; for a balanced problem f and g, centred.

    A balanced problem fixes them up to a constant: only directions that keep the total mass count.
    """
    strength = epsilon.to(a.dtype)[:, None]

    def side(weight: Tensor, other: Tensor, potential: Tensor, tau: float) -> Tensor:
        if tau_a == tau_b == 1.0:
            total = weight.sum(-1, keepdim=True)
            centre = (weight * potential).sum(-1, keepdim=True) / total
            return torch.where(weight > 0, potential - centre, 0)
        rate = other.sum(-1, keepdim=True)
        if tau == 1.0:
            moved = potential + strength * (rate - 1)
        else:
            rho = tau * strength / (1 - tau)
            share = torch.exp(-potential / rho)  # the plan's row sum over a
            moved = rho * (1 - share) + strength * (rate - share)
        return torch.where(weight > 0, moved, 0)

    return side(a, b, f, tau_a), side(b, a, g, tau_b)
