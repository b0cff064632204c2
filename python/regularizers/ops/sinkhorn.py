"""Entropic optimal transport on a cost matrix: Sinkhorn's iteration, one sweep a full iteration."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from regularizers._shared.checks import check_floating
from regularizers.ops._marginal_solve import MARGINAL_SOLVE
from regularizers.ops._operator import Operator, transformed
from regularizers.ops._sinkhorn_arguments import (
    check_options,
    masses,
    potential,
    sizes_of,
    strengths,
)
from regularizers.ops._sinkhorn_reference import (
    by_masses,
    ratio,
    solve_reference,
    unrolled_batch,
    within,
)


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
    unroll: bool = False,
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
    With ``unroll``, and inside ``torch.func`` transforms and forward-mode differentiation, all
    ``max_iter`` iterations of the plain form run, each of them differentiated.

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
        unroll: differentiate through the iterations themselves, in plain PyTorch; the memory of
            ``max_iter`` matrices. ``tol`` and ``momentum`` are not used.

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
    if symmetric and cost.shape[-1] != cost.shape[-2]:
        raise ValueError(f"cost must be square where symmetric, got {list(cost.shape)}")
    options = check_options(
        symmetric, tol, max_iter, min_iter, inner_iter, eps_init, eps_decay, momentum,
        tau_a, tau_b, norm_error,
    )  # fmt: skip
    start = (
        potential("f0", f0, cost, batch, cost.shape[-2]),
        potential("g0", g0, cost, batch, cost.shape[-1]),
    )
    matrix, row_mass, column_mass, strength, sizes = arguments
    call = (matrix, row_mass, column_mass, strength, *start, *sizes)
    found = (unrolled_batch if unroll or transformed() else SINKHORN)(*call, *options)
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
    rows = potential("f", f, cost, batch, cost.shape[-2])
    columns = potential("g", g, cost, batch, cost.shape[-1])
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


# --- The solver -----------------------------------------------------------------------------------


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
            add(1, ratio(-strength * (unit * columns[:, None, :]).sum(-1), a))
        if wants_b:
            add(2, ratio(-strength * (unit * rows[:, :, None]).sum(-2), b))
    return (*found, *(None,) * 16)


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
        ratio(rows, a),
        ratio(columns, b),
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
    reference=functools.partial(solve_reference, "cost"),
    triton="sinkhorn:sinkhorn",
    setup_context=_context,
    backward=_backward,
)
TRANSPORT_PLAN = Operator(
    "transport_plan",
    f"({_MASSES}, Tensor f, Tensor g, Tensor weight, Tensor? row_sizes, Tensor? column_sizes) "
    "-> Tensor",
    fake=_plan_fake,
    reference=_plan,
    triton="sinkhorn:transport_plan",
    setup_context=_plan_context,
    backward=_plan_backward,
)
