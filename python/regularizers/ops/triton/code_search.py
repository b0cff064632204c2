"""Triton kernels of the codebook search: products of tokens and codes with a running best code.

The CUDA twin of csrc/cpu/code_search_kernels.h, without its filter: a program searches a tile of
tokens in a share of the codes, and the best of the shares are compared afterwards.

    s_j = z . e_j - |e_j|^2 / 2     nearest: the largest s_j
                                    draw: the largest slope s_j - weight log(-log u_j), j != i

Tokens and codes are taken relative to the mean code. Selected tokens are put first without asking
the host for their number: programs beyond it return at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from regularizers.ops._operator import accumulate_dtype
from regularizers.ops.triton.philox import WORDS_PER_CALL, call_words

# "tf32" would put an error of |z| |e| / 2048 into every distance, "tf32x3" nearly none.
FLOAT32_PRECISION = tl.constexpr("tf32x3")
# tl.dot takes no smaller side.
LEAST_TILE = 16
# Tokens and codes of a tile, on eight warps, so that no register spills (ptxas, 8.0 and 9.0); half
# the codes where a number takes two registers or Philox words lie beside it.
TILE_TOKENS = 64
TILE_CODES = 128
WARPS = 8
DEPTH = tl.constexpr(32)
# Programs that a large GPU runs at once; fewer tiles of tokens share the codes out.
FILLING_PROGRAMS = 256
# Tiles of codes that make a share worth a program.
LEAST_STEPS = 4


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Find nearest codes of ``z [n, C]``."""
    codes, offset, centre = _centred(codebook)
    tokens = (z.to(codes.dtype) - centre).contiguous()
    count = torch.full((), z.shape[0], dtype=torch.int64, device=z.device)
    found = _best(tokens, codes, offset, None, None, count, None, None, z.shape[0])
    return torch.where(z.isfinite().all(-1), found, 0)


def sample_code(
    index: Tensor, codebook: Tensor, selected: Tensor | None, temperature: Tensor, seed: Tensor
) -> Tensor:
    """Draw other codes for ``index [t]`` where ``selected``."""
    codes, offset, _ = _centred(codebook)
    place = torch.arange(index.shape[0], device=index.device)
    count = torch.full((), index.shape[0], dtype=torch.int64, device=index.device)
    if selected is not None:
        place = torch.argsort(selected.byte(), descending=True, stable=True)
        count = selected.sum()
    slope, weight = 2 / temperature.clamp(min=1), temperature.clamp(max=1)
    factors = torch.stack([slope, weight]).to(codes.dtype)
    index = index.contiguous()
    found = _best(codes, codes, offset, index, place, count, factors, seed, index.shape[0])
    drawn = torch.empty_like(index)
    drawn[place] = found
    return drawn if selected is None else torch.where(selected, drawn, index)


def _centred(codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes relative to their mean, -|e|^2 / 2, and the mean."""
    wide = codebook.to(accumulate_dtype(codebook.dtype))
    centre = wide.mean(0)
    codes = (wide - centre).contiguous()
    return codes, codes.square().sum(-1) * -0.5, centre


def _best(
    tokens: Tensor,
    codes: Tensor,
    offset: Tensor,
    index: Tensor | None,
    place: Tensor | None,
    count: Tensor,
    factors: Tensor | None,
    seed: Tensor | None,
    rows: int,
) -> Tensor:
    """Return the best code of each row; rows from ``count`` on are unspecified but in range."""
    number, features = codes.shape
    if rows == 0:
        return count.new_zeros(0)
    narrow = codes.dtype == torch.float64 or factors is not None
    tile_tokens = min(TILE_TOKENS, max(LEAST_TILE, triton.next_power_of_2(rows)))
    tile_codes = min(
        TILE_CODES // 2 if narrow else TILE_CODES, max(LEAST_TILE, triton.next_power_of_2(number))
    )
    tiles, steps = triton.cdiv(rows, tile_tokens), triton.cdiv(number, tile_codes)
    shares = max(1, min(FILLING_PROGRAMS // tiles, steps // LEAST_STEPS))
    share_codes = triton.cdiv(steps, shares) * tile_codes
    value = codes.new_zeros((shares, rows))
    code = count.new_zeros((shares, rows))
    with torch.cuda.device_of(codes):
        _search[(tiles, shares)](
            tokens, codes, offset, index, place, count, factors, seed, value, code,
            rows, number, features, share_codes,
            index is not None, tile_tokens, tile_codes, num_warps=WARPS,
        )  # fmt: skip
    # Of equal values argmax gives the first share, as the search within a share the first code.
    return code.gather(0, value.argmax(0, keepdim=True))[0]


@triton.jit
def _products(tokens, codes, row, exists, j, number, features, ACC: tl.constexpr):
    """Return z . e_j for the token rows ``row`` [I, 1] and the codes ``j`` [1, J]."""
    PRECISION: tl.constexpr = "ieee" if ACC.primitive_bitwidth == 64 else FLOAT32_PRECISION
    total = tl.zeros((row.shape[0], j.shape[1]), ACC)
    for first in range(0, features, DEPTH):
        d = first + tl.arange(0, DEPTH)[None, :]
        left = tl.load(tokens + row * features + d, exists & (d < features), 0.0)
        d = first + tl.arange(0, DEPTH)[:, None]
        right = tl.load(codes + j.to(tl.int64) * features + d, (j < number) & (d < features), 0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=ACC)
    return total


@triton.jit
def _gumbel(seed, stream, first, COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """Return Gumbel variables of the streams [I, 1] (int64), elements from ``first`` on."""
    call = first // WORDS_PER_CALL + tl.arange(0, COLUMNS // WORDS_PER_CALL)[None, :].to(tl.int64)
    word0, word1, word2, word3 = call_words(seed, call, stream)
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    u = ((words >> 9).to(tl.int32).to(ACC) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(u))


@triton.jit
def _search(
    tokens, codes, offset, index, place, count, factors, seed, value, code,
    rows, number, features, share_codes,
    DRAW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = codes.dtype.element_ty
    first_row = tl.program_id(0) * ROWS
    if first_row >= tl.load(count):
        return
    i = first_row + tl.arange(0, ROWS)[:, None]
    exists = i < rows
    row = i.to(tl.int64)
    if DRAW:
        stream = tl.load(place + row, exists, 0)
        row = tl.load(index + stream, exists, 0)
        row = tl.where((row >= 0) & (row < number), row, 0)
        own, slope, weight = row, tl.load(factors), tl.load(factors + 1)
        bits = tl.load(seed)
    begin = tl.program_id(1) * share_codes
    best = tl.full((ROWS,), float("-inf"), ACC)
    best_code = tl.full((ROWS,), begin, tl.int32)
    for first in range(begin, tl.minimum(begin + share_codes, number), COLUMNS):
        j = first + tl.arange(0, COLUMNS)[None, :]
        s = _products(tokens, codes, row, exists, j, number, features, ACC)
        s += tl.load(offset + j, j < number, float("-inf"))
        if DRAW:
            s = slope * s + weight * _gumbel(bits, stream, first, COLUMNS, ACC)
            s = tl.where(j == own, float("-inf"), s)
        largest, at = tl.max(s, 1, return_indices=True, return_indices_tie_break_left=True)
        better = largest > best
        best = tl.where(better, largest, best)
        best_code = tl.where(better, first + at, best_code)
    out = tl.program_id(1).to(tl.int64) * rows + first_row + tl.arange(0, ROWS)
    inside = first_row + tl.arange(0, ROWS) < rows
    tl.store(value + out, best, inside)
    tl.store(code + out, best_code.to(tl.int64), inside)
