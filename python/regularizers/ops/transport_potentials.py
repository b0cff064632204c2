"""Optimal potentials of regularized transport, as one operator with an implicit derivative."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from regularizers.ops import _transport_solvers as solvers
from regularizers.ops._operator import LIBRARY
from regularizers.ops.sparse_ot import DUAL, ENTROPIC, PLAN

SOLVERS = ("lbfgs", "newton", "adam", "bcd")
# Of what a scaled mass may differ between the two sides.
MASS_TOLERANCE = 1e-4


def solve(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    gamma: Tensor,
    alpha0: Tensor | None,
    beta0: Tensor | None,
    k: int,
    regularizer: int,
    dual: bool,
    solver: str,
    max_iter: int,
    tol: float,
    lr: float,
    strict: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return alpha [B, m], beta [B, n] and the iterations [B] of every item.

    Solvers work in float64 (where there is one) on vectors; the kernels see the type of the cost.
    Beta of a semi-dual is that of its multipliers.
    """
    _check_values(cost, a, b, gamma, k, strict)
    wide = torch.float32 if cost.device.type == "mps" else torch.float64
    alpha = torch.zeros_like(a) if alpha0 is None else alpha0
    beta = torch.zeros_like(b) if beta0 is None else beta0
    if regularizer == ENTROPIC:
        # exp underflows to the exact zero that belongs there.
        lowest = -1e4 * (gamma + torch.where(cost.isfinite(), cost, 0).abs().amax()).to(a.dtype)
        alpha, beta = torch.where(a > 0, alpha, lowest), torch.where(b > 0, beta, lowest)
    # Newton's system and the block updates are those of the semi-dual, whose multipliers beta make
    # a solution of the dual with the same plan.
    full = dual and solver in ("lbfgs", "adam")
    problem = solvers.Problem(cost, a, b, gamma, k, regularizer, full, backend)
    x = (torch.cat((alpha, beta), -1) if full else alpha).to(wide)
    if solver == "lbfgs":
        state = solvers.lbfgs(problem, x, max_iter, tol)
    elif solver == "newton":
        state = solvers.newton(problem, x, max_iter, tol)
    elif solver == "adam":
        state = solvers.adam(problem, x, max_iter, tol, lr)
    else:
        state = solvers.block_coordinates(problem, x, max_iter, tol)
    alpha, found_beta = problem.split(state.x)
    if found_beta is None:
        call = (cost, a, b, gamma, k, regularizer, False)
        found_beta = DUAL.kernel(backend)(alpha, None, *call)[2]
    return alpha.contiguous(), found_beta.contiguous(), state.iterations


def _check_values(cost: Tensor, a: Tensor, b: Tensor, gamma: Tensor, k: int, strict: bool) -> None:
    """Check values: a solver reads its state at every step, so that this costs little more."""
    if not gamma.item() > 0:
        raise ValueError(f"gamma must be positive, got {gamma.item()}")
    for name, mass in (("a", a), ("b", b)):
        if not bool((mass >= 0).all()) or not bool(mass.isfinite().all()):
            raise ValueError(f"{name} must be finite and at least 0 everywhere")
    sums = a.sum(-1, dtype=torch.float32), b.sum(-1, dtype=torch.float32)
    if bool(((sums[0] - sums[1]).abs() > MASS_TOLERANCE * torch.maximum(*sums)).any()):
        raise ValueError(
            "a and b must have equal sums, got "
            f"{sums[0].flatten()[:4].tolist()} and {sums[1].flatten()[:4].tolist()}"
        )
    if bool(cost.isnan().any()):
        raise ValueError("C must not contain NaN")
    places = k * cost.shape[1]
    rows = int((a > 0).sum(-1).max()) if a.numel() else 0
    if places < rows:
        message = f"k must be at least {-(-rows // max(cost.shape[1], 1))}: {k} nonzeros in each of"
        message += f" {cost.shape[1]} columns cannot serve all {rows} rows"
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)


def _fake(cost: Tensor, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape), a.new_empty(a.shape[0], dtype=torch.int64)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cost, _, b, gamma, _, _, k, regularizer, dual, *_, backend = inputs
    alpha, beta, iterations = output
    ctx.mark_non_differentiable(iterations)
    ctx.set_materialize_grads(False)  # the envelope theorem sends nothing here
    ctx.save_for_backward(alpha, beta, cost, b, gamma)
    ctx.options = (k, regularizer, dual, backend)


def _rule(
    ctx: Any, grad_alpha: Tensor | None, grad_beta: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    if grad_alpha is None and grad_beta is None:
        return (None,) * 15
    alpha, beta, *_ = ctx.saved_tensors
    grad_alpha = torch.zeros_like(alpha) if grad_alpha is None else grad_alpha
    grad_beta = torch.zeros_like(beta) if grad_beta is None else grad_beta
    by_cost, by_a, by_b = torch.ops.regularizers.transport_potentials_backward(
        grad_alpha, grad_beta, *ctx.saved_tensors, *ctx.options
    )
    return by_cost, by_a, by_b, *(None,) * 12


def implicit_vjp(
    grad_alpha: Tensor,
    grad_beta: Tensor,
    alpha: Tensor,
    beta: Tensor,
    cost: Tensor,
    b: Tensor,
    gamma: Tensor,
    k: int,
    regularizer: int,
    dual: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Pull cotangents of the potentials back through the optimality conditions.

    At the optimum :math:`\sum_j t_j = a` and :math:`1^T t_j = b_j`. With W, D1, D2 of
    :func:`~regularizers.ops._transport_solvers.curvature_weights`, solve

    .. math:: \begin{pmatrix} D_1 & W \\ W^T & D_2 \end{pmatrix} \lambda
        = \gamma \begin{pmatrix} \bar\alpha \\ \bar\beta \end{pmatrix}

    by eliminating the second block; then :math:`\bar a, \bar b = \lambda` and
    :math:`\bar C_{ij} = W_{ij} (\lambda_i + \lambda_j) / \gamma`.
    """
    plan = PLAN.kernel(backend)(alpha, beta if dual else None, cost, b, gamma, k, regularizer)
    weights = solvers.curvature_weights(plan, regularizer).to(alpha.dtype)
    columns = weights.sum(-1)
    inverse_columns = torch.where(columns > 0, 1 / columns, 0)
    strength = gamma.to(alpha.dtype)
    by_beta = inverse_columns * grad_beta
    right = strength * (grad_alpha - (weights.mT @ by_beta.unsqueeze(-1)).squeeze(-1))
    tolerance = 1e-12 if alpha.dtype == torch.float64 else 1e-6
    right = right - right.mean(-1, keepdim=True)
    rows = solvers.solve_hessian(weights, right, None, tolerance)
    moved = (weights @ rows.unsqueeze(-1)).squeeze(-1)
    other = strength * by_beta - inverse_columns * moved
    by_cost = weights * (rows.unsqueeze(-2) + other.unsqueeze(-1)) / strength
    return by_cost.to(cost.dtype), rows, other


def _backward_fake(
    grad_alpha: Tensor, grad_beta: Tensor, alpha: Tensor, beta: Tensor, cost: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return cost.new_empty(cost.shape), alpha.new_empty(alpha.shape), beta.new_empty(beta.shape)


def _no_second_order(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
    raise NotImplementedError(
        "the implicit derivative of transport potentials and plans is of first order; "
        "second derivatives exist for the value alone"
    )


# Not an Operator: it has no kernels of its own. The backend of the kernels below it is an argument.
LIBRARY.define(
    "transport_potentials(Tensor cost, Tensor a, Tensor b, Tensor gamma, Tensor? alpha0, "
    "Tensor? beta0, SymInt k, int regularizer, bool dual, str solver, int max_iter, float tol, "
    "float lr, bool strict, str? backend) -> (Tensor alpha, Tensor beta, Tensor iterations)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("transport_potentials", solve, "CompositeExplicitAutograd")
torch.library.register_fake("regularizers::transport_potentials", _fake, lib=LIBRARY)
torch.library.register_autograd(
    "regularizers::transport_potentials", _rule, setup_context=_context, lib=LIBRARY
)
LIBRARY.define(
    "transport_potentials_backward(Tensor grad_alpha, Tensor grad_beta, Tensor alpha, Tensor beta, "
    "Tensor cost, Tensor b, Tensor gamma, SymInt k, int regularizer, bool dual, str? backend) "
    "-> (Tensor grad_cost, Tensor grad_a, Tensor grad_b)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("transport_potentials_backward", implicit_vjp, "CompositeExplicitAutograd")
torch.library.register_fake(
    "regularizers::transport_potentials_backward", _backward_fake, lib=LIBRARY
)
torch.library.register_autograd(
    "regularizers::transport_potentials_backward", _no_second_order, lib=LIBRARY
)
