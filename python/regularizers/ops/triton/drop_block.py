"""Triton kernels of drop_block: rows, then columns of the mask, then one pass over x.

The mask holds a byte for every pixel, or for every element where channels do not share it; it lives
for the length of the call.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from regularizers.ops._layout import empty_dense, in_layout_of, keeps_channels_last
from regularizers.ops._operator import accumulate_dtype
from regularizers.ops.drop_block import centre_ratio, check_rate
from regularizers.ops.triton.dropout import accumulate_type
from regularizers.ops.triton.philox import WORDS_PER_CALL, drop_rule, keep_calls

BLOCK = 1024  # elements of one program, on four warps
FAR = tl.constexpr(1 << 29)  # further away than any tile is long


def drop_block(
    x: Tensor,
    p: Tensor,
    seed: Tensor,
    block_size: int,
    exact: bool,
    per_sample: bool,
    shared_channels: bool,
) -> Tensor:
    """Return DropBlock of ``x``, laid out as ``empty_dense(x)``."""
    check_rate(p)
    out = empty_dense(x)
    if x.numel() == 0:
        return out
    batch, channels, height, width = x.shape
    pixels, streams = height * width, 1 if shared_channels else channels
    gamma = p * centre_ratio(height, width, block_size, exact)
    rows = torch.empty(streams * batch * pixels, dtype=torch.int8, device=x.device)
    keep = torch.empty_like(rows)
    kept = torch.zeros(batch, dtype=torch.int64, device=x.device)
    reach = block_size // 2
    halo = triton.cdiv(reach, WORDS_PER_CALL.value)
    calls = max(BLOCK // WORDS_PER_CALL.value, triton.next_power_of_2(4 * halo))
    tiles = triton.cdiv(batch * pixels, WORDS_PER_CALL.value * (calls - 2 * halo))
    with torch.cuda.device_of(x):
        _rows[(tiles, streams)](
            rows, gamma, seed, batch * pixels, height, width, reach, halo, calls, exact
        )
        tiles = triton.cdiv(pixels, BLOCK)
        _columns[(tiles * batch * streams,)](
            rows, keep, kept, tiles, batch, height, width, reach, BLOCK
        )
        among = streams * pixels * (1 if per_sample else batch)
        counts = kept if per_sample else kept.sum().expand(batch)
        factor = (among / counts.clamp(min=1).double()).to(accumulate_dtype(x.dtype))
        _scale[(triton.cdiv(x.numel(), BLOCK),)](
            in_layout_of(out, x),
            out,
            keep,
            factor,
            x.numel(),
            batch,
            channels,
            pixels,
            shared_channels,
            keeps_channels_last(out),
            x.numel() + BLOCK >= 2**31,
            BLOCK,
        )
    return out


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


# Pixels whose row has a centre within `reach`: a tile is a run of elements of one stream with a
# halo on both sides, and the nearest centres to the left and right come from two scans. Rows end
# inside a tile, so a centre counts only as far as the pixel's own row goes.
@triton.jit(do_not_specialize=["elements", "height", "width", "reach"])
def _rows(
    rows,
    gamma,
    seed,
    elements,
    height,
    width,
    reach,
    HALO: tl.constexpr,
    CALLS: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
):
    stream = tl.program_id(1)
    first_call = tl.program_id(0).to(tl.int64) * (CALLS - 2 * HALO) - HALO
    place = tl.arange(0, WORDS_PER_CALL * CALLS)
    element = first_call * WORDS_PER_CALL + place
    inside = (element >= 0) & (element < elements)
    keep = keep_calls(tl.load(seed), drop_rule(gamma), first_call + tl.arange(0, CALLS), stream)
    centre = (keep == 0) & inside
    x = (element % width).to(tl.int32)
    if WHOLE_BLOCKS:
        y = (element // width % height).to(tl.int32)
        centre = centre & (x >= reach) & (x < width - reach)
        centre = centre & (y >= reach) & (y < height - reach)
    left = tl.associative_scan(tl.where(centre, place, -FAR), 0, _larger)
    right = tl.associative_scan(tl.where(centre, place, FAR), 0, _smaller, reverse=True)
    covered = place - left <= tl.minimum(x, reach)
    covered = covered | (right - place <= tl.minimum(width - 1 - x, reach))
    inner = (place >= WORDS_PER_CALL * HALO) & (place < WORDS_PER_CALL * (CALLS - HALO))
    at = tl.cast(stream, tl.int64) * elements + element
    tl.store(rows + at, covered.to(tl.int8), inside & inner)


# A pixel is kept unless a pixel of its column within `reach` is covered. Planes are
# [stream][sample].
@triton.jit(do_not_specialize=["tiles", "batch", "height", "width", "reach"])
def _columns(rows, keep, kept, tiles, batch, height, width, reach, BLOCK: tl.constexpr):
    plane = tl.program_id(0) // tiles
    pixel = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < height * width
    y = pixel // width
    at = plane.to(tl.int64) * (height * width) + pixel
    covered = tl.zeros([BLOCK], dtype=tl.int8)
    for d in range(-reach, reach + 1):
        there = inside & (y + d >= 0) & (y + d < height)
        covered = covered | tl.load(rows + at + d * width, there, 0)
    keeps = (covered == 0) & inside
    tl.store(keep + at, keeps.to(tl.int8), inside)
    tl.atomic_add(kept + plane % batch, tl.sum(keeps.to(tl.int32)).to(tl.int64))


# Elements in the order of memory. Selected, never multiplied: a NaN under a block stays there.
@triton.jit(do_not_specialize=["elements", "batch", "channels", "pixels"])
def _scale(
    x,
    y,
    keep,
    factor,
    elements,
    batch,
    channels,
    pixels,
    SHARED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if WIDE:
        element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    else:
        element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    if CHANNELS_LAST:
        channel, pixel = element % channels, element // channels % pixels
    else:
        pixel, channel = element % pixels, element // pixels % channels
    sample = element // (channels * pixels)
    plane = sample if SHARED else channel * batch + sample
    keeps = tl.load(keep + plane * pixels + pixel, inside, 0) != 0
    value = tl.load(x + element, inside).to(accumulate_type(x.dtype.element_ty))
    value = value * tl.load(factor + sample, inside)
    tl.store(y + element, tl.where(keeps, value, 0.0).to(y.dtype.element_ty), inside)
