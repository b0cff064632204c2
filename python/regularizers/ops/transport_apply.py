"""Products with an entropic transport plan between points that is never written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regularizers._shared.checks import check_floating, check_same_device
from regularizers.ops._marginal_solve import solve_marginals
from regularizers.ops._operator import (
    Operator,
    accumulate_dtype,
    alias,
    full_precision,
    transformed,
)
from regularizers.ops._sinkhorn_arguments import (
    PointCost,
    point_arguments,
    point_cost,
    potential,
)
from regularizers.ops._sinkhorn_reference import ratio, within

_SQUARED, _EUCLIDEAN, _COSINE = range(3)


def transport_apply(
    x: Tensor,
    y: Tensor,
    f: Tensor,
    g: Tensor,
    v: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    cost: PointCost = "sqeuclidean",
    scale: float = 1.0,
    epsilon: float | Tensor,
    row_sizes: Tensor | None = None,
    column_sizes: Tensor | None = None,
) -> Tensor:
    r"""Multiply vectors by the plan of two potentials without writing the plan.

    .. math:: (P v)_i = \sum_j a_i b_j e^{(f_i + g_j - C_{ij}) / \varepsilon} v_j

    ``transport_apply(x, y, f, g, y) / a[..., None]`` is the barycentric map of the plan, and
    ``transport_apply(y, x, g, f, u, b, a)`` multiplies by the transposed plan.

    Args:
        x: ``[..., n, d]``.
        y: ``[..., m, d]``, dtype of ``x``.
        f: ``[..., n]``, potential of x.
        g: ``[..., m]``, potential of y.
        v: ``[..., m, k]``.
        a: ``[..., n]``, masses; 1/n when omitted.
        b: ``[..., m]``, masses; 1/m when omitted.
        cost: as for :func:`sinkhorn_points`.
        scale: as for :func:`sinkhorn_points`.
        epsilon: as for :func:`sinkhorn_points`; not differentiated through.
        row_sizes: as for :func:`sinkhorn_points`; the product is 0 beyond.
        column_sizes: as for :func:`sinkhorn_points`.

    Returns:
        ``[..., n, k]``; float32 for half-precision points. Differentiable in every tensor.

    Raises:
        TypeError: as :func:`sinkhorn_points`.
        ValueError: likewise.

    Example:
        >>> from regularizers.ops import sinkhorn_points
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> found = sinkhorn_points(x, x + 2, epsilon=0.01)
        >>> transport_apply(x, x + 2, found.f, found.g, x + 2, epsilon=0.01) * 2
        tensor([[2.0000],
                [3.0000]])

    Source:
        The optimality condition of :func:`sinkhorn_points`.
    """
    batch, (rows, columns, row_mass, column_mass, strength, sizes) = point_arguments(
        x, y, a, b, epsilon, row_sizes, column_sizes
    )
    kind = point_cost(cost, scale)
    check_floating("v", v)
    check_same_device("v", v, "x", x)
    if v.dim() < 2 or v.shape[-2] != y.shape[-2] or v.shape[:-2] not in ((), batch):
        raise ValueError(f"v must have shape {[*batch, y.shape[-2], 'k']}, got {list(v.shape)}")
    values = v.to(row_mass.dtype).expand(*batch, *v.shape[-2:])
    call = (
        rows, columns, row_mass, column_mass, strength,
        potential("f", f, x, batch, x.shape[-2]),
        potential("g", g, x, batch, y.shape[-2]),
        values.reshape(batch.numel(), *v.shape[-2:]),
        *sizes, kind, float(scale), False,
    )  # fmt: skip
    product: Tensor = (_apply(*call) if transformed() else APPLY(*call))[0]
    return product.reshape(batch + product.shape[1:])


# --- The operator ---------------------------------------------------------------------------------


def point_costs(x: Tensor, y: Tensor, cost: int, scale: float) -> Tensor:
    """Compute all costs ``[B, n, m]`` in plain PyTorch, in the accumulation type."""
    x, y = (side.to(accumulate_dtype(side.dtype)) for side in (x, y))
    if cost == _COSINE:
        with full_precision(x.device):
            return scale * (1 - _unit(x) @ _unit(y).mT)
    square = (x[:, :, None] - y[:, None]).square().sum(-1)
    if cost == _SQUARED:
        return scale * square
    apart = square != 0  # NaN too, which stays NaN
    return scale * torch.where(apart, torch.where(apart, square, 1).sqrt(), 0)


def _unit(x: Tensor) -> Tensor:
    square = x.square().sum(-1, keepdim=True)
    apart = square != 0
    return torch.where(apart, x / torch.where(apart, square, 1).sqrt(), 0)


def _apply(
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
    """Compute (P v, P 1) in plain PyTorch; ``over_distance`` divides P_ij by |x_i - y_j|."""
    a, b = within(a, row_sizes), within(b, column_sizes)
    mass = a[:, :, None] * b[:, None, :]
    x, y = (torch.where(side[..., None] > 0, points, 0) for points, side in ((x, a), (y, b)))
    costs = point_costs(x, y, cost, scale)
    exponent = (f[:, :, None] + g[:, None, :] - costs) / epsilon.to(a.dtype)[:, None, None]
    plan = mass * torch.exp(torch.where(mass > 0, exponent, 0))
    if over_distance:
        plan = ratio(plan, costs / scale)
    with full_precision(x.device):
        return plan @ v, plan.sum(-1)


def _apply_fake(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    f: Tensor,
    g: Tensor,
    v: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    batch, n = a.shape
    return a.new_empty(batch, n, v.shape[-1]), a.new_empty(batch, n)


def _apply_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.options = inputs[10:]


_BLOCK = 1 << 22  # entries of the plan that a backward pass through the reference holds at a time


def _apply_backward(
    backend: str | None, ctx: Any, grad_product: Tensor, grad_sums: Tensor
) -> tuple[Tensor | None, ...]:
    """Differentiate the reference by blocks of rows."""
    create_graph = torch.is_grad_enabled()
    *tensors, row_sizes, column_sizes = ctx.saved_tensors
    x, y, a, b, epsilon, f, g, v = tensors
    wanted = [k for k in (0, 1, 2, 3, 5, 6, 7) if ctx.needs_input_grad[k]]
    totals: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    with torch.enable_grad():
        sides = [alias(t, create_graph) if k in wanted else t for k, t in enumerate(tensors)]
        x, y, a, b, epsilon, f, g, v = sides
        height = max(1, _BLOCK // max(1, y.shape[1] * x.shape[0]))
        masked = within(a, row_sizes)
        for first in range(0, x.shape[1], height):
            rows = slice(first, first + height)
            results = _apply(
                x[:, rows], y, masked[:, rows], b, epsilon, f[:, rows], g, v,
                None, column_sizes, *ctx.options,
            )  # fmt: skip
            found = torch.autograd.grad(
                results,
                [sides[k] for k in wanted],
                (grad_product[:, rows], grad_sums[:, rows]),
                create_graph=create_graph,
                retain_graph=True,
                allow_unused=True,
            )
            for k, gradient in zip(wanted, found, strict=True):
                if gradient is not None:
                    have = totals[k]
                    totals[k] = gradient if have is None else have + gradient
    return tuple(totals)


# --- Gradients through the plan -------------------------------------------------------------------


class Plan:
    """The plan of two potentials, never written: products with it and gradients through it."""

    def __init__(
        self,
        backend: str | None,
        sides: Sequence[Tensor],  # x, y, a, b, epsilon, f, g
        sizes: Sequence[Tensor | None],
        cost: int,
        scale: float,
    ) -> None:
        self._sides = sides
        self._sizes = sizes
        self._backend = backend
        self._cost, self._scale = cost, scale

    def transposed(self) -> Plan:
        """Return the plan from y to x."""
        x, y, a, b, epsilon, f, g = self._sides
        row_sizes, column_sizes = self._sizes
        sides, sizes = (y, x, b, a, epsilon, g, f), (column_sizes, row_sizes)
        return Plan(self._backend, sides, sizes, self._cost, self._scale)

    def times(self, v: Tensor, *, over_distance: bool = False) -> tuple[Tensor, Tensor]:
        """Return P v ``[B, n, k]`` and P 1 ``[B, n]``."""
        product, sums = APPLY.kernel(self._backend)(
            *self._sides, v, *self._sizes, self._cost, self._scale, over_distance
        )
        return product, sums

    def gradient(self, p: Tensor | None, q: Tensor | None) -> Tensor:
        r"""Return :math:`\sum_j P_{ij} (p_i + q_j) \nabla_1 c(x_i, y_j)`; None stands for 0."""
        x, y, a, b, *_ = self._sides
        masses = (within(weight, size) for weight, size in zip((a, b), self._sizes, strict=True))
        # A point without mass may hold NaN, which times 0 is NaN still.
        x_wide, y_wide = (
            torch.where(mass[..., None] > 0, side.to(mass.dtype), 0)
            for side, mass in zip((x, y), masses, strict=True)
        )
        if self._cost == _COSINE:
            points = _unit(y_wide)
        else:  # differences do not depend on the origin, rounding does
            centre = x_wide.detach().mean(1, keepdim=True)
            x_wide, points = x_wide - centre, y_wide - centre
        d = points.shape[-1]
        parts = [] if p is None else [points]
        if q is not None:
            parts += [q[..., None] * points, q[..., None]]
        product, sums = self.times(torch.cat(parts, -1), over_distance=self._cost == _EUCLIDEAN)
        towards, mass = torch.zeros_like(x_wide), torch.zeros_like(sums)
        if p is not None:
            towards = towards + p[..., None] * product[..., :d]
            mass = mass + p * sums
        if q is not None:
            towards = towards + product[..., -d - 1 : -1]
            mass = mass + product[..., -1]
        if self._cost == _COSINE:
            return _through_unit(x_wide, -self._scale * towards).to(x.dtype)
        factor = 2 * self._scale if self._cost == _SQUARED else self._scale
        return (factor * (mass[..., None] * x_wide - towards)).to(x.dtype)


def _through_unit(x: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient in x of one in x / |x|."""
    unit = _unit(x)
    along = (unit * gradient).sum(-1, keepdim=True)
    square = x.square().sum(-1, keepdim=True)
    return ratio(gradient - along * unit, torch.where(square > 0, square, 1).sqrt() * (square > 0))


def _solve_marginals(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    f: Tensor,
    g: Tensor,
    row_right: Tensor,
    column_right: Tensor,
    row_sizes: Tensor | None,
    column_sizes: Tensor | None,
    cost: int,
    scale: float,
    tau_a: float,
    tau_b: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Solve the system of :func:`solve_marginals` with products that stream."""
    sides = (x, y, a, b, epsilon, f, g)
    plan = Plan(backend or None, sides, (row_sizes, column_sizes), cost, scale)
    transposed = plan.transposed()
    return solve_marginals(
        lambda columns: plan.times(columns[..., None])[0][..., 0],
        lambda rows: transposed.times(rows[..., None])[0][..., 0],
        plan.times(torch.ones_like(g)[..., None])[1],
        transposed.times(torch.ones_like(f)[..., None])[1],
        row_right,
        column_right,
        tau_a,
        tau_b,
    )


def _marginals_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(arguments[7]), torch.empty_like(arguments[8])


def _marginals_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], *inputs[9:11], *output)
    ctx.options = inputs[11:]


# The matrix H is symmetric: with (s, t) = H^-1 (rows_bar, columns_bar), the derivative in
# whatever H depends on is that of -(s, t)^T H (rows, columns), the vectors held fixed.
def _marginals_backward(
    backend: str | None, ctx: Any, grad_rows: Tensor, grad_columns: Tensor
) -> tuple[Tensor | None, ...]:
    *sides, row_sizes, column_sizes, rows, columns = ctx.saved_tensors
    cost, scale, tau_a, tau_b, which = ctx.options
    sizes = (row_sizes, column_sizes)
    s, t = MARGINAL_SOLVE(*sides, grad_rows, grad_columns, *sizes, cost, scale, tau_a, tau_b, which)
    create_graph = torch.is_grad_enabled()
    wanted = [k for k in (0, 1, 2, 3, 5, 6) if ctx.needs_input_grad[k]]
    found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    found[7], found[8] = s, t
    if wanted:
        with torch.enable_grad():
            leaves = [alias(t, create_graph) if k in wanted else t for k, t in enumerate(sides)]
            plan = Plan(which or None, leaves, sizes, cost, scale)
            vectors = torch.stack([columns, t, t * columns / tau_b], -1)
            product, sums = plan.times(vectors)
            form = (
                (s * rows / tau_a * sums).sum()
                + (s * product[..., 0]).sum()
                + (rows * product[..., 1]).sum()
                + product[..., 2].sum()
            )
            gradients = torch.autograd.grad(
                -form, [leaves[k] for k in wanted], create_graph=create_graph
            )
        for k, gradient in zip(wanted, gradients, strict=True):
            found[k] = gradient
    return tuple(found)


POINTS_SCHEMA = "Tensor x, Tensor y, Tensor a, Tensor b, Tensor epsilon"
SIZES_SCHEMA = "Tensor? row_sizes, Tensor? column_sizes, int cost, float scale"
APPLY = Operator(
    "sinkhorn_points_apply",
    f"({POINTS_SCHEMA}, Tensor f, Tensor g, Tensor v, {SIZES_SCHEMA}, bool over_distance) "
    "-> (Tensor product, Tensor row_sums)",
    fake=_apply_fake,
    reference=_apply,
    triton="sinkhorn_points:sinkhorn_points_apply",
    setup_context=_apply_context,
    backward=_apply_backward,
)
MARGINAL_SOLVE = Operator(
    "sinkhorn_points_marginal_solve",
    f"({POINTS_SCHEMA}, Tensor f, Tensor g, Tensor row_right, Tensor column_right, {SIZES_SCHEMA}, "
    "float tau_a, float tau_b, str backend) -> (Tensor rows, Tensor columns)",
    fake=_marginals_fake,
    reference=_solve_marginals,
    triton="sinkhorn_points:marginal_solve",
    setup_context=_marginals_context,
    backward=_marginals_backward,
)
