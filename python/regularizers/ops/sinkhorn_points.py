"""Entropic optimal transport between points, streamed: no array of all pairs is ever held."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from regularizers.ops._operator import Operator, transformed
from regularizers.ops._sinkhorn_arguments import (
    PointCost,
    check_options,
    point_arguments,
    point_cost,
    potential,
)
from regularizers.ops._sinkhorn_reference import (
    by_masses,
    ratio,
    solve_reference,
    unrolled_batch,
    within,
)
from regularizers.ops.sinkhorn import OPTIONS_SCHEMA, RESULT_SCHEMA, SinkhornOutput
from regularizers.ops.transport_apply import (
    MARGINAL_SOLVE,
    POINTS_SCHEMA,
    SIZES_SCHEMA,
    Plan,
    point_costs,
)


def sinkhorn_points(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    cost: PointCost = "sqeuclidean",
    scale: float = 1.0,
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
    r"""Solve entropic optimal transport between weighted points without their cost matrix.

    The problem, the iteration and its options are those of :func:`regularizers.ops.sinkhorn`, with

    .. math::
        C_{ij} = s \|x_i - y_j\|^2, \qquad s \|x_i - y_j\|, \qquad\text{or}\qquad
        s \Big(1 - \frac{\langle x_i, y_j \rangle}{\|x_i\| \|y_j\|}\Big).

    Costs are computed tile by tile from a small matrix product, once an iteration: memory grows
    with n + m. Where n m numbers fit into memory, :func:`regularizers.ops.sinkhorn` on a stored
    cost is faster on a CPU: it exponentiates only when potentials have moved.

    ``value`` is differentiable in ``x``, ``y``, ``a`` and ``b`` by the envelope theorem, ``f`` and
    ``g`` by implicit differentiation; both stream too. Second derivatives go through the reference
    by blocks of rows.

    Args:
        x: ``[..., n, d]``; float32, float64, bfloat16 or float16 (computed in float32).
        y: ``[..., m, d]``, dtype of ``x``.
        a: ``[..., n]``, masses of x, not negative; 1/n when omitted. A point of mass 0 takes no
            part, whatever its coordinates are.
        b: ``[..., m]``, masses of y, likewise.
        cost: ``"sqeuclidean"``, ``"euclidean"`` (gradient 0 at distance 0) or ``"cosine"`` (1 with
            a zero vector).
        scale: factor s > 0 of the cost; 0.5 with ``"sqeuclidean"`` is GeomLoss's convention.
        epsilon: entropic strength, in units of the cost; a positive number, or a tensor of shape
            ``[...]`` or with no dimensions. Not differentiated through.
        max_iter: as for :func:`regularizers.ops.sinkhorn`, here and below.
        min_iter: do not stop before.
        inner_iter: test for convergence every so many iterations.
        tol: stop when the error of the marginals is at most this.
        norm_error: ``"l1"`` or ``"linf"``.
        eps_init: annealing.
        eps_decay: annealing.
        symmetric: ``x`` equals ``y`` and ``a`` equals ``b``: averaged update of one potential.
        momentum: over-relaxation in (0, 2), or ``"auto"``.
        tau_a: softness of the rows' marginals in (0, 1].
        tau_b: softness of the columns' marginals in (0, 1].
        f0: ``[..., n]``, where to start.
        g0: ``[..., m]``, where to start.
        row_sizes: int64 ``[...]``, how many of the n points each problem has.
        column_sizes: likewise for the m points.

    Returns:
        Potentials, value and diagnostics; float32 for half-precision points.

    Raises:
        TypeError: a tensor or number is of the wrong type.
        ValueError: a shape does not fit or a number is out of range; on a CPU also: masses are
            negative or their sums differ, or a point with mass is not finite.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> found = sinkhorn_points(x, x + 2, epsilon=0.1)
        >>> found.value, found.f + found.g
        (tensor(4.0693), tensor([4.0693, 4.0693]))

    Source:
        As :func:`regularizers.ops.sinkhorn`; the sweep that updates rows and columns at once is
        this library's.
    """
    batch, (rows, columns, row_mass, column_mass, strength, sizes) = point_arguments(
        x, y, a, b, epsilon, row_sizes, column_sizes
    )
    kind = point_cost(cost, scale)
    if symmetric and x.shape[-2] != y.shape[-2]:
        raise ValueError(f"y must equal x where symmetric, got {y.shape[-2]} points")
    options = check_options(
        symmetric, tol, max_iter, min_iter, inner_iter, eps_init, eps_decay, momentum,
        tau_a, tau_b, norm_error,
    )  # fmt: skip
    start = (
        potential("f0", f0, x, batch, x.shape[-2]),
        potential("g0", g0, x, batch, y.shape[-2]),
    )
    weights = (row_mass, column_mass, strength, *start, *sizes)
    if transformed():
        found = unrolled_batch(point_costs(rows, columns, kind, scale), *weights, *options)
    else:
        found = SINKHORN_POINTS(rows, columns, *weights, kind, float(scale), *options)
    return SinkhornOutput(*(item.reshape(batch + item.shape[1:]) for item in found))


def _reference(x: Tensor, y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *weights, cost, scale = arguments[:9]
    return solve_reference("x and y", point_costs(x, y, cost, scale), *weights, *arguments[9:])


def _fake(x: Tensor, y: Tensor, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, ...]:
    scalar = a.new_empty(a.shape[0])
    return (
        torch.empty_like(a, memory_format=torch.contiguous_format),
        torch.empty_like(b, memory_format=torch.contiguous_format),
        scalar,
        torch.empty_like(scalar, dtype=torch.int64),
        torch.empty_like(scalar),
        torch.empty_like(scalar, dtype=torch.bool),
    )


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, a, b, epsilon, _, _, row_sizes, column_sizes, cost, scale, *options = inputs
    f, g, _, *diagnostics = output
    ctx.mark_non_differentiable(*diagnostics)
    ctx.set_materialize_grads(False)  # f and g that nobody used need no linear system
    ctx.save_for_backward(x, y, a, b, epsilon, f, g, row_sizes, column_sizes)
    ctx.options = (cost, scale, *options[-4:-2])


def _backward(
    backend: str | None,
    ctx: Any,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    grad_value: Tensor | None,
    *_: Any,
) -> tuple[Tensor | None, ...]:
    x, y, a, b, epsilon, f, g, *sizes = ctx.saved_tensors
    cost, scale, tau_a, tau_b = ctx.options
    wants_x, wants_y, wants_a, wants_b, *_rest = ctx.needs_input_grad
    plan = Plan(backend, (x, y, a, b, epsilon, f, g), sizes, cost, scale)
    # The derivative in C_ij is P_ij (p_i + q_j), by the envelope theorem and the linear system.
    p, q = torch.zeros_like(f), torch.zeros_like(g)
    by_a, by_b = None, None
    if grad_value is not None:
        p = p + grad_value[:, None]
        by_a, by_b = (
            within(grad_value[:, None] * side, size)
            for side, size in zip(by_masses(a, b, epsilon, f, g, tau_a, tau_b), sizes, strict=True)
        )
    implicit = grad_f is not None or grad_g is not None
    if implicit:
        rows, columns = MARGINAL_SOLVE(
            x, y, a, b, epsilon, f, g,
            torch.zeros_like(f) if grad_f is None else grad_f,
            torch.zeros_like(g) if grad_g is None else grad_g,
            *sizes, cost, scale, tau_a, tau_b, backend or "",
        )  # fmt: skip
        strength = epsilon.to(a.dtype)[:, None]
        if wants_a:
            moved = ratio(-strength * plan.times(columns[..., None])[0][..., 0], a)
            by_a = moved if by_a is None else by_a + moved
        if wants_b:
            moved = ratio(-strength * plan.transposed().times(rows[..., None])[0][..., 0], b)
            by_b = moved if by_b is None else by_b + moved
        p, q = p + rows, q + columns
    grad_x = plan.gradient(p, q if implicit else None) if wants_x else None
    grad_y = plan.transposed().gradient(q if implicit else None, p) if wants_y else None
    return grad_x, grad_y, by_a if wants_a else None, by_b if wants_b else None, *(None,) * 18


SINKHORN_POINTS = Operator(
    "sinkhorn_points",
    f"({POINTS_SCHEMA}, Tensor? f0, Tensor? g0, {SIZES_SCHEMA}, {OPTIONS_SCHEMA}) "
    f"-> {RESULT_SCHEMA}",
    fake=_fake,
    reference=_reference,
    triton="sinkhorn_points:sinkhorn_points",
    setup_context=_context,
    backward=_backward,
)
