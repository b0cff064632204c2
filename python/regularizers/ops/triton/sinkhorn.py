"""Triton kernels of sinkhorn and transport_plan: a stored cost matrix."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from regularizers.ops._marginal_solve import _reference as marginal_solve
from regularizers.ops._sinkhorn_reference import Options, check_values, within
from regularizers.ops.triton import sinkhorn_iteration as iteration
from regularizers.ops.triton.sinkhorn_iteration import LOG2E

# The linear system behind the derivatives is products with a stored plan, PyTorch's own on a GPU.
__all__ = ["marginal_solve", "sinkhorn", "transport_plan"]

# Elements of a tile a warp: 32 a thread, and as many sums of columns.
WARP_ELEMENTS = 1024
# Rows of up to so many elements are kept in registers, one row a program of sixteen warps.
LONGEST_ROW = 16384
# Rows of a tile where rows are longer, and gone through twice.
TILE_ROWS = 4
COLUMN_TILE = (64, 32, 4)
PLAN_TILE = (8, 256)


def sinkhorn(
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
    """Solve a batch, ``cost [B, n, m]``; NaN in a problem shows in its error."""
    options = Options(*numbers)
    balanced = options.tau_a == options.tau_b == 1.0
    check_values(within(a, row_sizes), within(b, column_sizes), epsilon, balanced)
    count, n, m = cost.shape
    if m <= LONGEST_ROW:
        columns = triton.next_power_of_2(max(1, m))
        rows = max(1, 4 * WARP_ELEMENTS // columns)
    else:
        columns, rows = 4 * WARP_ELEMENTS // TILE_ROWS, TILE_ROWS
    costs = iteration.Costs(
        tile=stored_costs,
        source=(cost.contiguous(), n, m),
        rows=iteration.fewer_rows(rows, 1, n, count),
        columns=columns,
        warps=max(4, columns // WARP_ELEMENTS),
        column_tile=COLUMN_TILE,
    )
    return iteration.solve(costs, a, b, epsilon, f0, g0, row_sizes, column_sizes, options)


def transport_plan(
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
    """Return weight_B a_i b_j exp((f_i + g_j - C_ij) / epsilon), [B, n, m]."""
    plan = cost.new_empty(cost.shape)
    count, n, m = cost.shape
    if plan.numel() == 0:
        return plan
    rows, columns = PLAN_TILE
    a, b = within(a, row_sizes), within(b, column_sizes)
    vectors = (tensor.contiguous() for tensor in (a, b, epsilon, f, g, weight))
    with torch.cuda.device_of(cost):
        _plan[(count, triton.cdiv(n, rows), triton.cdiv(m, columns))](
            cost.contiguous(), plan, *vectors, n, m, rows, columns
        )
    return plan


@triton.jit
def stored_costs(source, item, i, j, rows, columns, ACC: tl.constexpr):
    """Return costs [I, J] of a problem in the batch ``cost [B, n, m]``."""
    cost, n, m = source
    place = (item.to(tl.int64) * n + i) * m + j
    return tl.load(cost + place, (i < rows) & (j < columns), 0.0).to(ACC)


@triton.jit
def _plan(cost, plan, a, b, epsilon, f, g, weight, n, m, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    item = tl.program_id(0).to(tl.int64)
    i = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    j = (tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (i < n) & (j < m)
    place = (item * n + i) * m + j
    rows, columns = item * n + i, item * m + j
    mass = tl.load(a + rows, i < n, 0.0) * tl.load(b + columns, j < m, 0.0)
    t = (1.0 / tl.load(epsilon + item) * LOG2E).to(mass.dtype)
    potentials = tl.load(f + rows, i < n, 0.0) + tl.load(g + columns, j < m, 0.0)
    exponent = (potentials - tl.load(cost + place, inside, 0.0).to(mass.dtype)) * t
    entry = mass * tl.exp2(tl.where(mass > 0.0, exponent, 0.0))
    entry *= tl.load(weight + item)
    tl.store(plan + place, entry.to(plan.dtype.element_ty), inside)
