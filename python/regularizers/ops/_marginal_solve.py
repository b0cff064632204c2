"""The linear system behind the derivatives of Sinkhorn's potentials, by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regularizers.ops._operator import Operator, full_precision

MAX_ITERATIONS = 1000


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    diagonal: Tensor,
    project: Callable[[Tensor], Tensor],
) -> Tensor:
    """Solve A x = right for a batch of positive semi-definite matrices.

    Args:
        apply: x ``[B, k]`` to A x.
        right: ``[B, k]``, in the range of A.
        diagonal: ``[B, k]``, of the matrix, for preconditioning; 0 leaves an entry of x at 0.
        project: onto the complement of the null space.
    """
    inverse = torch.where(diagonal > 0, 1 / torch.where(diagonal > 0, diagonal, 1), 0)
    tolerance = 1e-13 if right.dtype == torch.float64 else 1e-6
    x = torch.zeros_like(right)
    residual = project(right)
    preconditioned = inverse * residual
    direction = preconditioned
    product = (residual * preconditioned).sum(-1, keepdim=True)
    enough = tolerance**2 * product
    for iteration in range(MAX_ITERATIONS):
        active = product > enough
        # Asking costs a synchronisation on a GPU, hence not every time.
        if iteration % 8 == 0 and not bool(active.any()):
            break
        image = apply(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        step = torch.where(active & (curvature > 0), product / curvature, 0)
        x = x + step * direction
        residual = residual - step * image
        preconditioned = inverse * project(residual)
        following = (residual * preconditioned).sum(-1, keepdim=True)
        direction = preconditioned + torch.where(active, following / product, 0) * direction
        product = following
    return x


def solve_marginals(
    times_columns: Callable[[Tensor], Tensor],
    times_rows: Callable[[Tensor], Tensor],
    row_sums: Tensor,
    column_sums: Tensor,
    row_right: Tensor,
    column_right: Tensor,
    tau_a: float,
    tau_b: float,
) -> tuple[Tensor, Tensor]:
    r"""Solve the system that a plan's marginals make, without forming it.

    .. math::
        \begin{pmatrix} \mathrm{diag}(P 1) / \tau_a & P \\
        P^\top & \mathrm{diag}(P^\top 1) / \tau_b \end{pmatrix}
        \begin{pmatrix} \lambda \\ \mu \end{pmatrix} =
        \begin{pmatrix} \bar f \\ \bar g \end{pmatrix}

    The rows are eliminated; what is left is positive semi-definite in mu. A balanced problem has
    the null vector (1, -1): the right-hand side loses its part along it, and mu has mean 0. Entries
    whose sums are 0 (no mass) come out as 0.

    Args:
        times_columns: mu ``[B, m]`` to P mu ``[B, n]``.
        times_rows: lambda ``[B, n]`` to P^T lambda ``[B, m]``.
        row_sums: P 1 ``[B, n]``.
        column_sums: P^T 1 ``[B, m]``.
        row_right: ``[B, n]``.
        column_right: ``[B, m]``.
        tau_a: softness of the rows.
        tau_b: softness of the columns.
    """
    rows, columns = row_sums > 0, column_sums > 0
    row_right = torch.where(rows, row_right, 0)
    column_right = torch.where(columns, column_right, 0)
    balanced = tau_a == tau_b == 1.0
    if balanced:
        count = (rows.sum(-1, keepdim=True) + columns.sum(-1, keepdim=True)).clamp(min=1)
        excess = row_right.sum(-1, keepdim=True) - column_right.sum(-1, keepdim=True)
        row_right = torch.where(rows, row_right - excess / count, 0)
        column_right = torch.where(columns, column_right + excess / count, 0)
    eliminate = torch.where(rows, tau_a / torch.where(rows, row_sums, 1), 0)
    diagonal = column_sums / tau_b

    def schur(mu: Tensor) -> Tensor:
        return diagonal * mu - times_rows(eliminate * times_columns(mu))

    def centre(mu: Tensor) -> Tensor:
        if not balanced:
            return mu
        mean = mu.sum(-1, keepdim=True) / columns.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(columns, mu - mean, 0)

    right = column_right - times_rows(eliminate * row_right)
    mu = centre(conjugate_gradients(schur, right, diagonal, centre))
    return eliminate * (row_right - times_columns(mu)), mu


def _reference(
    plan: Tensor, row_right: Tensor, column_right: Tensor, tau_a: float, tau_b: float
) -> tuple[Tensor, Tensor]:
    with full_precision(plan.device):
        return solve_marginals(
            lambda mu: (plan @ mu[..., None])[..., 0],
            lambda rows: (rows[:, None] @ plan)[:, 0],
            plan.sum(-1),
            plan.sum(-2),
            row_right,
            column_right,
            tau_a,
            tau_b,
        )


def _fake(plan: Tensor, row_right: Tensor, column_right: Tensor, *_: float) -> tuple[Tensor, ...]:
    return torch.empty_like(row_right), torch.empty_like(column_right)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    plan, _, _, *ctx.taus = inputs
    ctx.save_for_backward(plan, *output)


# The matrix is symmetric: the adjoint of the solution is a solution, and with
# (x, y) = H^-1 (lambda_bar, mu_bar) the derivative in H is -(x, y) (lambda, mu)^T.
def _backward(
    backend: str | None, ctx: Any, grad_rows: Tensor, grad_columns: Tensor
) -> tuple[Tensor | None, ...]:
    plan, rows, columns = ctx.saved_tensors
    tau_a, tau_b = ctx.taus
    x, y = MARGINAL_SOLVE.kernel(backend)(plan, grad_rows, grad_columns, tau_a, tau_b)
    grad_plan = -(
        (x * rows / tau_a)[:, :, None]
        + (y * columns / tau_b)[:, None, :]
        + x[:, :, None] * columns[:, None, :]
        + rows[:, :, None] * y[:, None, :]
    )
    return grad_plan, x, y, None, None


MARGINAL_SOLVE = Operator(
    "sinkhorn_marginal_solve",
    "(Tensor plan, Tensor row_right, Tensor column_right, float tau_a, float tau_b) "
    "-> (Tensor rows, Tensor columns)",
    fake=_fake,
    reference=_reference,
    triton="sinkhorn:marginal_solve",
    setup_context=_context,
    backward=_backward,
)
