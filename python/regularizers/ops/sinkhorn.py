"""Entropic optimal transport on a cost matrix: Sinkhorn's iteration, one sweep a full iteration."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_one_of,
    check_same_device,
    check_tensor,
)
from regularizers.ops._marginal_solve import MARGINAL_SOLVE
from regularizers.ops._operator import Operator, accumulate_dtype, transformed
from regularizers.ops._sinkhorn_reference import Options, solve, unrolled

NORMS = ("l1", "linf")


class SinkhornOutput(NamedTuple):
    r"""Potentials of an entropic transport problem and how the iteration ended.

    The plan is :math:`P_{ij} = a_i b_j \exp((f_i + g_j - C_{ij}) / \varepsilon)`.

    Attributes:
        f: ``[..., n]``, potential of the rows.
        g: ``[..., m]``, potential of the columns.
        value: ``[...]``, :math:`\langle P, C \rangle + \varepsilon \mathrm{KL}(P \| a b^\top)`, for
            an unbalanced problem plus the divergences of the marginals.
        n_iter: ``[...]`` int64, iterations that were run.
        marginal_error: ``[...]``, distance of the plan's column sums from ``b`` (its row sums are
            exact).
        converged: ``[...]`` bool, whether the error is at most ``tol``.
    """

    f: Tensor
    g: Tensor
    value: Tensor
    n_iter: Tensor
    marginal_error: Tensor
    converged: Tensor


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float | Tensor,
    max_iter: int = 2000,
    min_iter: int = 0,
    inner_iter: int = 1,
    tol: float = 1e-3,
    norm_error: Literal["l1", "linf"] = "l1",
    eps_init: float = 1.0,
    eps_decay: float = 1.0,
    symmetric: bool = False,
    momentum: float | Literal["auto"] = "auto",
    tau_a: float = 1.0,
    tau_b: float = 1.0,
    f0: Tensor | None = None,
    g0: Tensor | None = None,
    row_sizes: Tensor | None = None,
    column_sizes: Tensor | None = None,
) -> SinkhornOutput:
    r"""Solve entropic optimal transport between weighted points, given their costs.

    .. math::
        \min_{P \ge 0} \langle P, C \rangle + \varepsilon \, \mathrm{KL}(P \,\|\, a b^\top)
        \quad\text{with}\quad P 1 = a, \; P^\top 1 = b

    Sinkhorn's alternating updates in the log domain, g first and f last,

    .. math::
        g_j \leftarrow -\varepsilon \log \sum_i a_i e^{(f_i - C_{ij}) / \varepsilon}, \qquad
        f_i \leftarrow -\varepsilon \log \sum_j b_j e^{(g_j - C_{ij}) / \varepsilon}.

    One sweep over the matrix does both and measures the error of the marginals. The CPU kernel
    keeps ``exp((f + g - C) / epsilon)`` for the current potentials, which costs no exponential
    until the potentials have moved too far, and is safe at any ``epsilon``.

    ``value`` is differentiable in ``cost``, ``a`` and ``b`` by the envelope theorem (the gradient
    in ``cost`` is the plan), ``f`` and ``g`` by implicit differentiation: a linear system, solved
    by conjugate gradients. Neither goes back through the iterations. Second derivatives work.
    Inside ``torch.func`` transforms and forward-mode differentiation, all ``max_iter`` iterations
    of the plain form run.

    Args:
        cost: ``[..., n, m]``; float32, float64, bfloat16 or float16 (computed in float32). An entry
            may be inf: no mass goes there.
        a: ``[..., n]``, masses of the rows, not negative; 1/n when omitted. A row of mass 0 takes
            no part, whatever its costs are.
        b: ``[..., m]``, masses of the columns, likewise.
        epsilon: entropic strength, in units of ``cost``; a positive number, or a tensor of shape
            ``[...]`` or with no dimensions. Not differentiated through.
        max_iter: largest number of iterations, at least 1.
        min_iter: do not stop before.
        inner_iter: test for convergence every so many iterations. The test is free.
        tol: stop when the error of the marginals is at most this; 0 runs all iterations. Float32
            reaches about 1e-6; an iteration whose error is below 1e-5 and has stopped falling ends.
        norm_error: ``"l1"`` sums absolute errors of the marginals, ``"linf"`` takes the largest.
        eps_init: with ``eps_decay``, anneal: iteration k uses
            ``epsilon * max(eps_init * eps_decay**k, 1)``.
        eps_decay: in (0, 1].
        symmetric: ``cost`` is symmetric and ``a`` equals ``b``; the averaged update
            ``f <- (f + F(f)) / 2`` converges in a few iterations, and ``g`` equals ``f``.
        momentum: over-relaxation ``f <- f + momentum (F - f)``, in (0, 2). ``"auto"`` starts at 1
            and adapts to the observed rate of convergence.
        tau_a: softness of the rows' marginals, ``rho / (rho + epsilon)`` for a penalty
            ``rho KL(P 1 | a)``, in (0, 1]; 1 holds them exactly.
        tau_b: the same for the columns.
        f0: ``[..., n]``, where to start; not differentiated through.
        g0: ``[..., m]``, where to start; if given, the first update is that of f.
        row_sizes: int64 ``[...]``, how many of the n rows each problem has (ragged batches).
            Entries of ``f`` beyond are 0.
        column_sizes: likewise.

    Returns:
        Potentials, value and diagnostics; float32 for half-precision costs.

    Raises:
        TypeError: a tensor or number is of the wrong type.
        ValueError: a shape does not fit, a number is out of range; on a CPU also: masses are
            negative or their sums differ (relative 1e-4) in a balanced problem, or ``cost`` holds
            NaN where there is mass.

    Example:
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> found = sinkhorn(cost, epsilon=1.0)
        >>> found.value
        tensor(0.3799)
        >>> transport_plan(cost, found.f, found.g, epsilon=1.0)
        tensor([[0.3655, 0.1345],
                [0.1345, 0.3655]])

    Source:
        M. Cuturi, "Sinkhorn Distances", 2013, arXiv 1306.0895. Conventions of the Monge gap
        (T. Uscidda and M. Cuturi, 2023, arXiv 2302.04953), whose code uses OTT-JAX: potentials here
        carry the masses outside, OTT's are ``f + epsilon log a``.
    """
    batch, arguments = _arguments(cost, a, b, epsilon, row_sizes, column_sizes)
    options = _options(
        cost, symmetric, tol, max_iter, min_iter, inner_iter, eps_init, eps_decay, momentum,
        tau_a, tau_b, norm_error,
    )  # fmt: skip
    start = tuple(
        _potential(name, potential, cost, size)
        for name, potential, size in (("f0", f0, cost.shape[-2]), ("g0", g0, cost.shape[-1]))
    )
    matrix, row_mass, column_mass, strength, sizes = arguments
    call = (matrix, row_mass, column_mass, strength, *start, *sizes)
    found = _unrolled(*call, options) if transformed() else SINKHORN(*call, *options)
    return SinkhornOutput(*(item.reshape(batch + item.shape[1:]) for item in found))


def transport_plan(
    cost: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float | Tensor,
    row_sizes: Tensor | None = None,
    column_sizes: Tensor | None = None,
) -> Tensor:
    r"""Write out the plan of two potentials, in one pass.

    .. math:: P_{ij} = a_i b_j \exp((f_i + g_j - C_{ij}) / \varepsilon)

    Args:
        cost: ``[..., n, m]``; float32, float64, bfloat16 or float16.
        f: ``[..., n]``, potential of the rows.
        g: ``[..., m]``, potential of the columns.
        a: ``[..., n]``, masses; 1/n when omitted.
        b: ``[..., m]``, masses; 1/m when omitted.
        epsilon: as for :func:`sinkhorn`; not differentiated through.
        row_sizes: as for :func:`sinkhorn`; the plan is 0 beyond.
        column_sizes: likewise.

    Returns:
        ``[..., n, m]``, dtype of ``cost``.

    Raises:
        TypeError: as :func:`sinkhorn`.
        ValueError: likewise.

    Example:
        >>> transport_plan(torch.zeros(2, 3), torch.zeros(2), torch.zeros(3), epsilon=0.1)
        tensor([[0.1667, 0.1667, 0.1667],
                [0.1667, 0.1667, 0.1667]])

    Source:
        The optimality condition of :func:`sinkhorn`.
    """
    batch, arguments = _arguments(cost, a, b, epsilon, row_sizes, column_sizes)
    matrix, row_mass, column_mass, strength, sizes = arguments
    rows = _potential("f", f, cost, cost.shape[-2])
    columns = _potential("g", g, cost, cost.shape[-1])
    unit = row_mass.new_ones(matrix.shape[0])
    call = (matrix, row_mass, column_mass, strength, rows, columns, unit, *sizes)
    plan: Tensor = _plan(*call) if transformed() else TRANSPORT_PLAN(*call)
    return plan.reshape(batch + plan.shape[1:])


# --- Arguments ------------------------------------------------------------------------------------


def _arguments(
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    epsilon: float | Tensor,
    row_sizes: Tensor | None,
    column_sizes: Tensor | None,
) -> tuple[torch.Size, tuple[Any, ...]]:
    """Return the batch shape and cost [B, n, m], masses [B, n] and [B, m], epsilon [B], sizes."""
    check_floating("cost", cost)
    if cost.dim() < 2:
        raise ValueError(f"cost must have shape [..., n, m], got {list(cost.shape)}")
    batch = cost.shape[:-2]
    rows = sizes_of("row_sizes", row_sizes, cost, batch)
    columns = sizes_of("column_sizes", column_sizes, cost, batch)
    return batch, (
        cost.reshape(batch.numel(), *cost.shape[-2:]),
        masses("a", a, cost, batch, cost.shape[-2], rows),
        masses("b", b, cost, batch, cost.shape[-1], columns),
        strengths("epsilon", epsilon, cost, batch),
        (rows, columns),
    )


def _flat_batch(tensor: Tensor, batch: torch.Size) -> Tensor:
    """Return ``[..., k]`` broadcast to the batch and with one batch dimension."""
    return tensor.expand(*batch, tensor.shape[-1]).reshape(batch.numel(), tensor.shape[-1])


def masses(
    name: str,
    given: Tensor | None,
    like: Tensor,
    batch: torch.Size,
    count: int,
    sizes: Tensor | None,
) -> Tensor:
    """Return masses [B, count] in the accumulation type; uniform ones when none are given."""
    dtype = accumulate_dtype(like.dtype)
    if given is None:
        if sizes is None:
            return torch.full(
                (batch.numel(), count), 1 / max(count, 1), dtype=dtype, device=like.device
            )
        inside = torch.arange(count, device=like.device) < sizes[:, None]
        return torch.where(inside, 1 / sizes.clamp(min=1)[:, None].to(dtype), 0)
    check_floating(name, given)
    check_same_device(name, given, "cost", like)
    fits = given.dim() >= 1 and given.shape[-1] == count and given.dim() - 1 <= len(batch)
    if not fits or any(
        have not in (1, want)
        for have, want in zip(reversed(given.shape[:-1]), reversed(batch), strict=False)
    ):
        raise ValueError(
            f"{name} must have shape {[*batch, count]} or broadcast to it, got {list(given.shape)}"
        )
    return _flat_batch(given.to(dtype), batch)


def strengths(name: str, given: float | Tensor, like: Tensor, batch: torch.Size) -> Tensor:
    """Return float64 [B], one entropic strength a problem."""
    if isinstance(given, Tensor):
        if not given.is_floating_point() or given.shape not in ((), batch):
            raise ValueError(
                f"{name} must be a number or a floating-point tensor of shape [] or {list(batch)}, "
                f"got {given.dtype} of shape {list(given.shape)}"
            )
        check_same_device(name, given, "cost", like)
        return given.detach().double().expand(batch).reshape(-1)
    if isinstance(given, bool) or not isinstance(given, (int, float, torch.SymFloat)):
        raise TypeError(f"{name} must be a number or a tensor, got {type(given).__name__}")
    if not 0.0 < given < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {given}")
    return torch.full((batch.numel(),), given, dtype=torch.float64, device=like.device)


def sizes_of(name: str, given: Tensor | None, like: Tensor, batch: torch.Size) -> Tensor | None:
    """Return int64 [B] or None."""
    if given is None:
        return None
    check_tensor(name, given)
    if given.dtype != torch.int64 or given.shape != batch:
        raise ValueError(
            f"{name} must be int64 of shape {list(batch)}, got {given.dtype} of shape "
            f"{list(given.shape)}"
        )
    check_same_device(name, given, "cost", like)
    return given.reshape(-1)


def _potential(name: str, given: Tensor | None, cost: Tensor, count: int) -> Tensor | None:
    if given is None:
        return None
    check_floating(name, given)
    check_same_device(name, given, "cost", cost)
    batch = cost.shape[:-2]
    if given.shape[-1:] != (count,) or given.shape[:-1] not in ((), batch):
        raise ValueError(f"{name} must have shape {[*batch, count]}, got {list(given.shape)}")
    return _flat_batch(given.to(accumulate_dtype(cost.dtype)), batch)


def _options(cost: Tensor, symmetric: bool, *numbers: Any) -> tuple[Any, ...]:
    if symmetric and cost.shape[-1] != cost.shape[-2]:
        raise ValueError(f"cost must be square where symmetric, got {list(cost.shape)}")
    return check_options(symmetric, *numbers)


def check_options(
    symmetric: bool,
    tol: float,
    max_iter: int,
    min_iter: int,
    inner_iter: int,
    eps_init: float,
    eps_decay: float,
    momentum: float | str,
    tau_a: float,
    tau_b: float,
    norm_error: str,
) -> tuple[Any, ...]:
    """Return the options in the order of the operators, checked; see :class:`Options`."""
    check_at_least("max_iter", max_iter, 1)
    check_at_least("min_iter", min_iter, 0)
    check_at_least("inner_iter", inner_iter, 1)
    check_one_of("norm_error", norm_error, NORMS)
    if not tol >= 0.0:
        raise ValueError(f"tol must not be negative, got {tol}")
    if not eps_init >= 1.0:
        raise ValueError(f"eps_init must be at least 1, got {eps_init}")
    for name, number in (("eps_decay", eps_decay), ("tau_a", tau_a), ("tau_b", tau_b)):
        if not 0.0 < number <= 1.0:
            raise ValueError(f"{name} must lie in (0, 1], got {number}")
    if momentum == "auto":
        factor = 0.0
    elif isinstance(momentum, str) or not 0.0 < momentum < 2.0:
        raise ValueError(f"momentum must be 'auto' or lie in (0, 2), got {momentum!r}")
    else:
        factor = float(momentum)
    if symmetric and tau_a != tau_b:
        raise ValueError(f"tau_b must equal tau_a = {tau_a} where symmetric, got {tau_b}")
    numbers = (float(tol), max_iter, min_iter, inner_iter, float(eps_init), float(eps_decay))
    return (*numbers, factor, float(tau_a), float(tau_b), norm_error == "linf", bool(symmetric))


# --- The solver -----------------------------------------------------------------------------------


def within(weight: Tensor, sizes: Tensor | None) -> Tensor:
    """Return masses [B, k] with 0 beyond each problem's size."""
    if sizes is None:
        return weight
    inside = torch.arange(weight.shape[-1], device=weight.device) < sizes[:, None]
    return torch.where(inside, weight, 0)


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
    if balanced and bool(apart.any()):
        item = int(apart.nonzero()[0])
        raise ValueError(
            f"a and b must have equal sums in a balanced problem, got {rows[item].item():g} and "
            f"{columns[item].item():g} for item {item}"
        )


def _reference(
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
    options = Options(*numbers)
    a, b = within(a, row_sizes), within(b, column_sizes)
    check_values(a, b, epsilon, options.tau_a == options.tau_b == 1.0)
    results = _fake(cost, a, b)
    for item in results:
        item.zero_()
    wide = cost.to(a.dtype)
    for i in range(cost.shape[0]):
        n = cost.shape[1] if row_sizes is None else int(row_sizes[i])
        m = cost.shape[2] if column_sizes is None else int(column_sizes[i])
        if n == 0 or m == 0:
            results[5][i] = True
            continue
        starts = (None if f0 is None else f0[i, :n], None if g0 is None else g0[i, :m])
        found = solve(wide[i, :n, :m], a[i, :n], b[i, :m], epsilon[i].item(), *starts, options)
        if found.iterations == 1 and found.error != found.error and cost.device.type == "cpu":
            raise ValueError(
                f"cost must be finite where both weights are positive, which item {i} is not "
                "(NaN, -inf, or a row or column without a finite entry)"
            )
        results[0][i, :n], results[1][i, :m] = found.f, found.g
        results[2][i], results[3][i] = found.value, found.iterations
        results[4][i], results[5][i] = found.error, found.converged
    return results


def _unrolled(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    f0: Tensor | None,
    g0: Tensor | None,
    row_sizes: Tensor | None,
    column_sizes: Tensor | None,
    numbers: tuple[Any, ...],
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


def _fake(cost: Tensor, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, ...]:
    batch, n, m = cost.shape
    scalar = a.new_empty(batch)
    return (
        a.new_empty(batch, n),
        b.new_empty(batch, m),
        scalar,
        torch.empty_like(scalar, dtype=torch.int64),
        torch.empty_like(scalar),
        torch.empty_like(scalar, dtype=torch.bool),
    )


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cost, a, b, epsilon, _, _, *rest = inputs
    f, g, _, *diagnostics = output
    ctx.mark_non_differentiable(*diagnostics)
    ctx.set_materialize_grads(False)  # f and g that nobody used need no linear system
    ctx.save_for_backward(cost, a, b, epsilon, f, g, *rest[:2])
    ctx.taus = rest[-4:-2]


def _backward(
    backend: str | None,
    ctx: Any,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    grad_value: Tensor | None,
    *_: Any,
) -> tuple[Tensor | None, ...]:
    cost, a, b, epsilon, f, g, *sizes = ctx.saved_tensors
    tau_a, tau_b = ctx.taus
    plan = TRANSPORT_PLAN.kernel(backend)
    wants_cost, wants_a, wants_b, *_rest = ctx.needs_input_grad
    found: list[Tensor | None] = [None, None, None]

    def add(position: int, gradient: Tensor) -> None:
        have = found[position]
        found[position] = gradient if have is None else have + gradient

    if grad_value is not None:
        if wants_cost:
            add(0, plan(cost, a, b, epsilon, f, g, grad_value, *sizes))
        by_a, by_b = by_masses(a, b, epsilon, f, g, tau_a, tau_b)
        if wants_a:
            add(1, within(grad_value[:, None] * by_a, sizes[0]))
        if wants_b:
            add(2, within(grad_value[:, None] * by_b, sizes[1]))
    if grad_f is not None or grad_g is not None:
        grad_f = torch.zeros_like(f) if grad_f is None else grad_f
        grad_g = torch.zeros_like(g) if grad_g is None else grad_g
        wide = cost.to(a.dtype)
        unit = plan(wide, a, b, epsilon, f, g, a.new_ones(a.shape[0]), *sizes)
        rows, columns = MARGINAL_SOLVE.kernel(backend)(unit, grad_f, grad_g, tau_a, tau_b)
        if wants_cost:
            add(0, (unit * (rows[:, :, None] + columns[:, None, :])).to(cost.dtype))
        strength = epsilon.to(a.dtype)[:, None]
        if wants_a:
            add(1, _ratio(-strength * (unit @ columns[..., None])[..., 0], a))
        if wants_b:
            add(2, _ratio(-strength * (rows[:, None, :] @ unit)[:, 0], b))
    return (*found, *(None,) * 16)


def _ratio(numerator: Tensor, weight: Tensor) -> Tensor:
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


# --- The plan -------------------------------------------------------------------------------------


def _plan(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    f: Tensor,
    g: Tensor,
    weight: Tensor,
    row_sizes: Tensor | None,
    column_sizes: Tensor | None,
) -> Tensor:
    """Compute weight_B a_i b_j exp((f_i + g_j - C_ij) / epsilon) in plain PyTorch."""
    mass = within(a, row_sizes)[:, :, None] * within(b, column_sizes)[:, None, :]
    strength = epsilon.to(a.dtype)[:, None, None]
    exponent = (f[:, :, None] + g[:, None, :] - cost.to(a.dtype)) / strength
    plan = mass * torch.exp(torch.where(mass > 0, exponent, 0))
    return (weight[:, None, None] * plan).to(cost.dtype)


def _plan_fake(cost: Tensor, *_: Any) -> Tensor:
    return cost.new_empty(cost.shape)


def _plan_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _plan_backward(backend: str | None, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cost, a, b, epsilon, f, g, weight, *sizes = ctx.saved_tensors
    unit = TRANSPORT_PLAN.kernel(backend)(
        cost, a, b, epsilon, f, g, torch.ones_like(weight), *sizes
    )
    by_weight = grad.to(a.dtype) * unit.to(a.dtype)
    moved = weight[:, None, None] * by_weight
    strength = epsilon.to(a.dtype)[:, None]
    rows, columns = moved.sum(-1), moved.sum(-2)
    return (
        (-moved / strength[:, :, None]).to(cost.dtype),
        _ratio(rows, a),
        _ratio(columns, b),
        None,
        rows / strength,
        columns / strength,
        by_weight.sum((-2, -1)),
        None,
        None,
    )


_MASSES = "Tensor cost, Tensor a, Tensor b, Tensor epsilon"
OPTIONS_SCHEMA = (
    "float tol, int max_iter, int min_iter, int inner_iter, float eps_init, float eps_decay, "
    "float momentum, float tau_a, float tau_b, bool linf, bool symmetric"
)
RESULT_SCHEMA = (
    "(Tensor f, Tensor g, Tensor value, Tensor n_iter, Tensor marginal_error, Tensor converged)"
)
SINKHORN = Operator(
    "sinkhorn",
    f"({_MASSES}, Tensor? f0, Tensor? g0, Tensor? row_sizes, Tensor? column_sizes, "
    f"{OPTIONS_SCHEMA}) -> {RESULT_SCHEMA}",
    fake=_fake,
    reference=_reference,
    setup_context=_context,
    backward=_backward,
)
TRANSPORT_PLAN = Operator(
    "transport_plan",
    f"({_MASSES}, Tensor f, Tensor g, Tensor weight, Tensor? row_sizes, Tensor? column_sizes) "
    "-> Tensor",
    fake=_plan_fake,
    reference=_plan,
    setup_context=_plan_context,
    backward=_plan_backward,
)
