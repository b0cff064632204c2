"""Triton kernels of the sliced statistics: p = z A in tiles, sums over rows, gradient through A^T.

The CUDA twin of csrc/cpu/sketch_kernels.h, with theta = spacing p and i the imaginary unit. The
spacing is multiplied into the slices before: Triton would round a number given to a kernel to
float32.

    sums     S_l = sum_n e^{i l theta_n}, by rotation from knot to knot
    gradient g_n = sum_l a_l cos(l theta_n) + b_l sin(l theta_n), by Horner's rule; dz = g A^T
    match    (p_(i) - q_i) put back to the place of p_(i): one program sorts one column

Nothing of size rows x slices x knots exists, and for sums and their gradient nothing of size rows x
slices. Columns are sorted a chunk of slices at a time. No two programs add to the same number:
results repeat bit by bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from regularizers.ops._operator import accumulate_dtype
from regularizers.ops.sketch import (
    epps_pulley_statistic,
    epps_pulley_sums_gradient,
    scale_gradient,
)

__all__ = [
    "scale_gradient",
    "sliced_characteristic",
    "sliced_characteristic_backward",
    "sliced_epps_pulley",
    "sliced_quantile",
]

# "tf32" would leave three digits of a phase, "tf32x3" nearly all.
FLOAT32_PRECISION = "ieee"
# tl.dot takes no smaller side.
LEAST_TILE = 16
# Rows and slices of a tile of p: cosines, sines and their rotations hold four such tiles.
TILE_ROWS = 64
TILE_SLICES = 64
# Features of a step of a product, and of the tile of dz that a program keeps.
DEPTH = 32
TILE_FEATURES = 128
# Programs that a large GPU runs at once; sums of fewer tiles of slices are split over the rows.
FILLING_PROGRAMS = 256
# The longest column that one program sorts, and what the columns of a chunk may take.
LONGEST_COLUMN = 4096
CHUNK_BYTES = 32 << 20


def _tile(size: int, largest: int) -> int:
    least: int = max(LEAST_TILE, triton.next_power_of_2(size))
    return min(largest, least)


def sliced_characteristic(z: Tensor, slices: Tensor, spacing: float, knots: int) -> Tensor:
    """Return the sums of cosines and sines [2, V, knots, K]."""
    z, slices = _wide(z, slices, spacing)
    (views, rows, features), count = z.shape, slices.shape[2]
    tile_rows, tile_slices = _tile(rows, TILE_ROWS), _tile(count, TILE_SLICES)
    tiles = views * triton.cdiv(count, tile_slices)
    splits = max(1, min(FILLING_PROGRAMS // tiles, triton.cdiv(rows, tile_rows)))
    sums = z.new_empty((splits, 2, views, knots, count))
    with torch.cuda.device_of(z):
        _sums[(tiles, splits)](
            z, slices, sums, views, views // slices.shape[0], rows, features, count, knots,
            FLOAT32_PRECISION, tile_rows, tile_slices, DEPTH, triton.next_power_of_2(knots),
        )  # fmt: skip
    return sums[0] if splits == 1 else sums.sum(0)


def sliced_characteristic_backward(
    grad_sums: Tensor, z: Tensor, slices: Tensor, spacing: float, knots: int
) -> Tensor:
    """Return the gradient of z, given that of the sums."""
    return _gradient_of_z(grad_sums, z, slices, spacing, knots).to(z.dtype)


def sliced_epps_pulley(
    z: Tensor, slices: Tensor, spacing: float, knots: int, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the mean statistic and, where wanted, its gradient."""
    sums = sliced_characteristic(z, slices, spacing, knots)
    loss = epps_pulley_statistic(sums, z.shape[1], spacing).mean()
    if not wants_gradient:
        return loss, loss.new_empty(0)
    upstream = epps_pulley_sums_gradient(sums, z.shape[1], spacing)
    return loss, _gradient_of_z(upstream, z, slices, spacing, knots)


def _gradient_of_z(
    grad_sums: Tensor, z: Tensor, slices: Tensor, spacing: float, knots: int
) -> Tensor:
    """Return dz in the accumulation type."""
    z, slices = _wide(z, slices, spacing)
    (views, rows, features), count = z.shape, slices.shape[2]
    tile_rows, tile_slices = _tile(rows, TILE_ROWS), _tile(count, TILE_SLICES)
    tile_features = _tile(features, TILE_FEATURES)
    grad_z = torch.empty_like(z)
    grid = (views * triton.cdiv(rows, tile_rows), triton.cdiv(features, tile_features))
    with torch.cuda.device_of(z):
        _gradient[grid](
            z, slices, grad_sums.to(z.dtype).contiguous(), grad_z, views,
            views // slices.shape[0], rows, features, count, knots, FLOAT32_PRECISION, tile_rows,
            tile_slices, DEPTH, tile_features,
        )  # fmt: skip
    return grad_z


def sliced_quantile(
    z: Tensor, slices: Tensor, quantiles: Tensor, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the mean squared distance to the quantiles and, where wanted, its gradient."""
    z, slices = _wide(z, slices)
    quantiles = quantiles.to(z.dtype).contiguous()
    (views, rows, features), (groups, _, count) = z.shape, slices.shape
    grouped = z.view(groups, views // groups, rows, features)
    chunk = max(1, CHUNK_BYTES // (views * rows * z.element_size()))
    squares = z.new_empty((views, count))
    grad_z = torch.zeros_like(grouped) if wants_gradient else z.new_empty(0)
    for first in range(0, count, chunk):
        some = slices[:, None, :, first : first + chunk]  # [groups, 1, features, chunk]
        p = (some.mT @ grouped.mT).view(views, -1, rows)
        squares[:, first : first + chunk] = _match(p, quantiles, 2 / (views * rows * count))
        if wants_gradient:
            grad_z += p.view(groups, -1, *p.shape[1:]).mT @ some.mT
    return squares.mean() / rows, grad_z.view(z.shape) if wants_gradient else grad_z


def _match(p: Tensor, quantiles: Tensor, factor: float) -> Tensor:
    """Return the squared distances of columns p [V, K, B], which become their gradient."""
    rows = p.shape[2]
    if p.dtype == torch.float64 or rows > LONGEST_COLUMN:
        ordered, place = torch.sort(p, dim=2, stable=True)
        residual = ordered - quantiles
        p.scatter_(2, place, residual * factor)
        return (residual**2).sum(2)
    squares = p.new_empty(p.shape[:2])
    block = triton.next_power_of_2(rows)
    with torch.cuda.device_of(p):
        _match_column[(squares.numel(),)](
            p, quantiles, squares, factor, rows, block, num_warps=max(1, min(16, block // 256))
        )
    return squares


def _wide(z: Tensor, slices: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return z and scaled slices, contiguous and in the accumulation type."""
    wide = accumulate_dtype(z.dtype)
    return z.to(wide).contiguous(), slices.to(wide).contiguous() * scale


# theta [ROWS, SLICES] of rows n [ROWS, 1] and slices k [1, SLICES]; zero outside
@triton.jit
def _angles(z, slices, n, k, rows, features, count, PRECISION: tl.constexpr, DEPTH: tl.constexpr):
    theta = tl.zeros((n.shape[0], k.shape[1]), z.dtype.element_ty)
    for first in range(0, features, DEPTH):
        across = first + tl.arange(0, DEPTH)[None, :]
        down = first + tl.arange(0, DEPTH)[:, None]
        left = tl.load(z + n * features + across, (n < rows) & (across < features), 0.0)
        right = tl.load(
            slices + down.to(tl.int64) * count + k, (down < features) & (k < count), 0.0
        )
        theta = tl.dot(left, right, theta, input_precision=PRECISION, out_dtype=theta.dtype)
    return theta


# Where the z of a view and the slices of its group begin.
@triton.jit
def _sources(z, slices, view, views_per_group, rows, features, count):
    place = view.to(tl.int64)
    group = place // views_per_group
    return z + place * rows * features, slices + group * features * count


# S_l += e^{i l theta} over every splits-th tile of rows
@triton.jit
def _sums(
    z, slices, sums, views, views_per_group, rows, features, count, knots,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, SLICES: tl.constexpr, DEPTH: tl.constexpr,
    KNOTS: tl.constexpr,
):  # fmt: skip
    slice_tiles = tl.cdiv(count, SLICES)
    view = tl.program_id(0) // slice_tiles
    k = (tl.program_id(0) % slice_tiles * SLICES + tl.arange(0, SLICES))[None, :]
    own_z, own_slices = _sources(z, slices, view, views_per_group, rows, features, count)
    knot = tl.arange(0, KNOTS)[:, None]
    cosine_sums = tl.zeros((KNOTS, SLICES), z.dtype.element_ty)
    sine_sums = tl.zeros((KNOTS, SLICES), z.dtype.element_ty)
    for first in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        n = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        theta = _angles(own_z, own_slices, n, k, rows, features, count, PRECISION, DEPTH)
        c1, s1 = tl.cos(theta), tl.sin(theta)
        # A row outside has e^{0} = 1, which must not count: its rotation starts from 0.
        c, s = tl.where(n < rows, c1, 0.0), tl.where(n < rows, s1, 0.0)
        for here in range(knots):
            cosine_sums += tl.where(knot == here, tl.sum(c, 0)[None, :], 0.0)
            sine_sums += tl.where(knot == here, tl.sum(s, 0)[None, :], 0.0)
            c, s = c * c1 - s * s1, s * c1 + c * s1
    plane = tl.cast(views, tl.int64) * knots * count
    out = sums + tl.program_id(1) * 2 * plane + (view.to(tl.int64) * knots + knot) * count + k
    inside = (knot < knots) & (k < count)
    tl.store(out, cosine_sums, inside)
    tl.store(out + plane, sine_sums, inside)


# dz = g A^T, the sum over tiles of slices
@triton.jit
def _gradient(
    z, slices, grad_sums, grad_z, views, views_per_group, rows, features, count, knots,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, SLICES: tl.constexpr, DEPTH: tl.constexpr,
    FEATURES: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(rows, ROWS)
    view = tl.program_id(0) // row_tiles
    n = (tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    d = (tl.program_id(1) * FEATURES + tl.arange(0, FEATURES))[None, :]
    own_z, own_slices = _sources(z, slices, view, views_per_group, rows, features, count)
    plane = tl.cast(views, tl.int64) * knots * count
    of_cosine = grad_sums + view.to(tl.int64) * knots * count
    total = tl.zeros((ROWS, FEATURES), z.dtype.element_ty)
    for first in range(0, count, SLICES):
        k = first + tl.arange(0, SLICES)[None, :]
        theta = _angles(own_z, own_slices, n, k, rows, features, count, PRECISION, DEPTH)
        c1, s1 = tl.cos(theta), tl.sin(theta)
        real, imaginary = tl.zeros_like(theta), tl.zeros_like(theta)
        for step in range(knots):
            knot = knots - step  # t = knot spacing; the spacing comes with the slices
            place = (knot - 1) * count + k
            a = knot * tl.load(of_cosine + plane + place, k < count, 0.0)
            b = -knot * tl.load(of_cosine + place, k < count, 0.0)
            real, imaginary = a + real * c1 - imaginary * s1, imaginary * c1 + real * s1 - b
        g = real * c1 - imaginary * s1
        down = first + tl.arange(0, SLICES)[:, None]
        right = tl.load(
            own_slices + d.to(tl.int64) * count + down, (d < features) & (down < count), 0.0
        )
        total = tl.dot(g, right, total, input_precision=PRECISION, out_dtype=total.dtype)
    out = grad_z + view.to(tl.int64) * rows * features + n * features + d
    tl.store(out, total, (n < rows) & (d < features))


# One column of p: numbers and places are sorted as one int64, the number above. Of a negative
# number all bits but the sign are turned over, so that integers have the order of the numbers.
@triton.jit
def _match_column(p, quantiles, squares, factor, rows, BLOCK: tl.constexpr):
    column = p + tl.program_id(0).to(tl.int64) * rows
    i = tl.arange(0, BLOCK)
    bits = tl.load(column + i, i < rows, float("inf")).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    packed = tl.where(i < rows, (key.to(tl.int64) << 32) | i, 0x7FFFFFFFFFFFFFFF)
    packed = tl.sort(packed)
    key, place = (packed >> 32).to(tl.int32), (packed & 0x7FFFFFFF).to(tl.int32)
    ordered = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    residual = tl.where(i < rows, ordered - tl.load(quantiles + i, i < rows, 0.0), 0.0)
    tl.store(squares + tl.program_id(0), tl.sum(residual * residual, 0))
    tl.store(column + place, residual * factor, i < rows)
