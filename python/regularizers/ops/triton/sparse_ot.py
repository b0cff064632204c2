"""Triton kernels of sparse projections and transport duals: a program holds a row in registers.

The GPU twin of csrc/cpu/sparse_ot_kernels.h, without its lists of survivors: what is dropped gets
the score -inf. The k-th largest score is found by halving on the bits of the scores, which order as
the scores do; theta by Michelot's iteration. A program of the dual works off a strip of columns and
adds their plan up in registers, so that no two programs add to one number and results repeat bit by
bit.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from regularizers.ops._operator import accumulate_dtype
from regularizers.ops.sparse_ot import (
    ENTROPIC,
    QUADRATIC,
    _check_gamma,
    _dual_reference,
    _plan_reference,
    _sparse_plan_reference,
)
from regularizers.ops.sparse_projection import (
    _check_sums,
    _projection_backward_fake,
    _projection_backward_reference,
    _projection_reference,
)

# A longer row does not fit the registers of one program: the reference serves it.
LONGEST_ROW = 1 << 15
# Strips of columns that a large GPU works on at once.
FILLING_PROGRAMS = 256


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def sparse_projection(v: Tensor, z: Tensor | None, k: int) -> Tensor:
    """Project the rows of ``v``."""
    size = v.shape[-1]
    if size > LONGEST_ROW or v.numel() == 0:
        return _projection_reference(v, z, k)
    _check_sums(z)
    v = v.contiguous()
    out = torch.empty_like(v)
    block = triton.next_power_of_2(size)
    with torch.cuda.device_of(v):
        _project[(v.numel() // size,)](
            v, z if z is None else z.contiguous(), out, size, k, block, num_warps=_warps(block)
        )
    return out


def sparse_projection_backward(grad: Tensor, out: Tensor, simplex: bool) -> tuple[Tensor, Tensor]:
    """Centre ``grad`` on the supports of ``out``."""
    size = out.shape[-1]
    if size > LONGEST_ROW or out.numel() == 0:
        return _projection_backward_reference(grad, out, simplex)
    grad_v, grad_z = _projection_backward_fake(grad, out, simplex)
    block = triton.next_power_of_2(size)
    with torch.cuda.device_of(out):
        _project_backward[(out.numel() // size,)](
            grad.contiguous(), out.contiguous(), grad_v, grad_z, size, simplex, block,
            num_warps=_warps(block),
        )  # fmt: skip
    return grad_v, grad_z


def transport_dual(
    alpha: Tensor,
    beta: Tensor | None,
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    gamma: Tensor,
    k: int,
    regularizer: int,
    envelope: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the value and its derivatives; ``envelope`` is for the autograd rule."""
    batch, n, m = cost.shape
    if m > LONGEST_ROW or cost.numel() == 0:
        return _dual_reference(alpha, beta, cost, a, b, gamma, k, regularizer, envelope)
    _check_gamma(gamma)
    strips = min(n, triton.cdiv(FILLING_PROGRAMS, batch))
    slopes, conjugates = torch.empty_like(b), torch.empty_like(b)
    parts = cost.new_empty(batch, strips, m, dtype=accumulate_dtype(cost.dtype))
    _launch(_dual, strips, (alpha, beta, cost, b), gamma, k, regularizer, parts, slopes, conjugates)
    value = (alpha.double() * a).sum(-1) - conjugates.double().sum(-1)
    if beta is not None:
        value = value + (beta.double() * b).sum(-1)
        slopes = b - slopes
    return value, a - parts.sum(1), slopes


def regularized_plan(
    alpha: Tensor,
    beta: Tensor | None,
    cost: Tensor,
    b: Tensor,
    gamma: Tensor,
    k: int,
    regularizer: int,
) -> Tensor:
    """Return the plan [B, n, m]."""
    if cost.shape[-1] > LONGEST_ROW or cost.numel() == 0:
        return _plan_reference(alpha, beta, cost, b, gamma, k, regularizer)
    _check_gamma(gamma)
    plan = cost.new_empty(cost.shape)
    _launch(_plan, cost.shape[1], (alpha, beta, cost, b), gamma, k, regularizer, plan)
    return plan


def transport_sparse_plan(
    alpha: Tensor, beta: Tensor | None, cost: Tensor, b: Tensor, gamma: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Return values and rows [B, n, k] of a quadratic plan."""
    if cost.shape[-1] > LONGEST_ROW or cost.numel() == 0:
        return _sparse_plan_reference(alpha, beta, cost, b, gamma, k)
    _check_gamma(gamma)
    values = cost.new_zeros(*cost.shape[:-1], k)
    rows = torch.zeros_like(values, dtype=torch.int64)
    data = (alpha, beta, cost, b)
    _launch(_sparse_plan, cost.shape[1], data, gamma, k, QUADRATIC, values, rows)
    return values, rows


def _launch(
    kernel: triton.JITFunction,
    strips: int,
    data: Sequence[Tensor | None],
    gamma: Tensor,
    k: int,
    regularizer: int,
    *out: Tensor,
) -> None:
    """Run a kernel on a grid of (strips of columns, problems)."""
    alpha, beta, cost, b = (None if tensor is None else tensor.contiguous() for tensor in data)
    assert cost is not None
    batch, n, m = cost.shape
    block = triton.next_power_of_2(m)
    with torch.cuda.device_of(cost):
        kernel[(strips, batch)](
            alpha, beta, cost, b, gamma, *out, m, n, k,
            regularizer == ENTROPIC, block, num_warps=_warps(block),
        )  # fmt: skip


# The k largest of s, of equal ones the first; the others -inf. Bits of a float, with the magnitude
# turned round below zero, order as signed integers do.
@triton.jit
def _top(s, place, k, BLOCK: tl.constexpr):
    if s.dtype == tl.float64:
        bits = s.to(tl.int64, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    else:
        bits = s.to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    low, high = tl.min(key, 0), tl.max(key, 0)
    # The largest key that at least k entries reach.
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up; no sum overflows
        enough = tl.sum((key >= middle).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    equal = key == low
    left = k - tl.sum((key > low).to(tl.int32), 0)
    rank = tl.cumsum(equal.to(tl.int32), 0)
    return tl.where((key > low) | (equal & (rank <= left)), s, float("-inf"))


# max(u - theta, 0) and theta with the sum z, by dropping what lies below the mean until nothing
# does; u <= 0 is counted from the largest score.
@triton.jit
def _simplex(u, z, BLOCK: tl.constexpr):
    kept = u >= -z
    count = tl.sum(kept.to(tl.int32), 0)
    theta = (tl.sum(tl.where(kept, u, 0.0), 0) - z) / count
    before = count + 1
    while count < before:
        before = count
        kept = kept & (u > theta)
        count = tl.sum(kept.to(tl.int32), 0)
        theta = (tl.sum(tl.where(kept, u, 0.0), 0) - z) / count
    return tl.where(kept, u - theta, 0.0), theta


@triton.jit
def _project(v, z, out, size, k, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < size
    ACC: tl.constexpr = tl.float64 if v.dtype.element_ty == tl.float64 else tl.float32
    s = tl.load(v + row * size + place, inside, float("-inf")).to(ACC)
    broken = tl.sum((s != s).to(tl.int32), 0) > 0
    s = tl.where(broken, 0.0, s)
    s = tl.where(inside, s, float("-inf"))
    if k < size:
        s = _top(s, place, k, BLOCK)
    if z is None:
        t = tl.where(s > 0, s, 0.0)
    else:
        total = tl.load(z + row).to(ACC)
        top = tl.max(s, 0)
        # With no mass at all any positive sum keeps the iteration finite; its result is dropped.
        t, _ = _simplex(s - top, tl.where(total > 0, total, 1.0), BLOCK)
        t = tl.where(total > 0, t, 0.0)
    t = tl.where(broken, float("nan"), t)
    tl.store(out + row * size + place, t.to(out.dtype.element_ty), inside)


@triton.jit
def _project_backward(
    grad, out, grad_v, grad_z, size, SIMPLEX: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < size
    ACC: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    on = tl.load(out + row * size + place, inside, 0.0) > 0
    g = tl.where(on, tl.load(grad + row * size + place, inside, 0.0).to(ACC), 0.0)
    if SIMPLEX:
        count = tl.sum(on.to(tl.int32), 0)
        mean = tl.sum(g, 0) / tl.maximum(count, 1)
        tl.store(grad_z + row, mean.to(grad_z.dtype.element_ty))
        g = tl.where(on, g - mean, 0.0)
    tl.store(grad_v + row * size + place, g.to(grad_v.dtype.element_ty), inside)


# Column j of problem i: its plan t, its conjugate, and beta_j (semi-dual) or its mass (dual).
@triton.jit
def _column(
    alpha, beta, cost, b, gamma, i, j, m, n, k, ENTROPIC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    place = tl.arange(0, BLOCK)
    inside = place < m
    ACC: tl.constexpr = alpha.dtype.element_ty
    g = tl.load(gamma).to(ACC)
    problem = tl.cast(i, tl.int64)
    c = tl.load(cost + (problem * n + j) * m + place, inside, float("inf")).to(ACC)
    s = tl.load(alpha + problem * m + place, inside, 0.0) - c
    if beta is not None:
        s += tl.load(beta + problem * n + j)
        if ENTROPIC:
            t = tl.exp((s - g) / g)
            mass = tl.sum(t, 0)
            return t, g * mass, mass
        if k < m:
            s = _top(s, place, k, BLOCK)
        s = tl.where(s > 0, s, 0.0)
        return s / g, tl.sum(s * s, 0) / (2 * g), tl.sum(s, 0) / g
    mass = tl.load(b + problem * n + j)
    has_mass = mass > 0
    z = tl.where(has_mass, mass, 1.0)
    top = tl.max(s, 0)
    if ENTROPIC:
        t = tl.exp((s - top) / g)
        total = tl.sum(t, 0)
        smooth_top = g * tl.log(total / z) + top
        t = tl.where(has_mass, t * (z / total), 0.0)
        return t, mass * smooth_top, tl.where(has_mass, g - smooth_top, -top)
    if k < m:
        s = _top(s, place, k, BLOCK)
    u, theta = _simplex(s - top, g * z, BLOCK)
    conjugate = (top + theta) * mass + tl.sum(u * u, 0) / (2 * g)
    t = tl.where(has_mass, u / g, 0.0)
    return t, tl.where(has_mass, conjugate, 0.0), tl.where(has_mass, -top - theta, -top)


@triton.jit
def _dual(
    alpha, beta, cost, b, gamma, parts, slopes, conjugates, m, n, k,
    ENTROPIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    strip, i, strips = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    total = tl.zeros((BLOCK,), alpha.dtype.element_ty)
    for j in range(strip, n, strips):
        t, conjugate, slope = _column(
            alpha, beta, cost, b, gamma, i, j, m, n, k, ENTROPIC, BLOCK
        )  # fmt: skip
        total += t
        tl.store(conjugates + i * n + j, conjugate)
        tl.store(slopes + i * n + j, slope)
    place = tl.arange(0, BLOCK)
    part = tl.cast(i, tl.int64) * strips + strip
    tl.store(parts + part * m + place, total, place < m)


@triton.jit
def _plan(
    alpha, beta, cost, b, gamma, plan, m, n, k, ENTROPIC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    j, i = tl.program_id(0), tl.program_id(1)
    t, _, _ = _column(alpha, beta, cost, b, gamma, i, j, m, n, k, ENTROPIC, BLOCK)
    place = tl.arange(0, BLOCK)
    column = tl.cast(i, tl.int64) * n + j
    tl.store(plan + column * m + place, t.to(plan.dtype.element_ty), place < m)


@triton.jit
def _sparse_plan(
    alpha, beta, cost, b, gamma, values, rows, m, n, k,
    ENTROPIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    j, i = tl.program_id(0), tl.program_id(1)
    t, _, _ = _column(alpha, beta, cost, b, gamma, i, j, m, n, k, ENTROPIC, BLOCK)
    place = tl.arange(0, BLOCK)
    column = (tl.cast(i, tl.int64) * n + j) * k
    on = t > 0
    rank = tl.cumsum(on.to(tl.int32), 0) - 1
    tl.store(values + column + rank, t.to(values.dtype.element_ty), on)
    tl.store(rows + column + rank, place.to(tl.int64), on)
