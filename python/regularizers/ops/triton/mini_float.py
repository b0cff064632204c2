"""Triton kernels of the small floating-point formats: a program a tile of words of eight codes.

The twin of csrc/cpu/mini_float_kernels.h, where the arithmetic is explained.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from regularizers._shared.checks import FLOATING, check_values
from regularizers.ops._operator import accumulate_dtype
from regularizers.ops.mini_float import bias_of_largest, check_bias_value, largest_code

BLOCK = 1024
WORD = tl.constexpr(8)  # codes
MIDDLE_BIAS = tl.constexpr(63)


def mini_float_bias(x: Tensor, exp_bits: int, has_inf_nan: bool) -> Tensor:
    """Return the bias fitted to ``x``."""
    x = x.contiguous()
    wide = accumulate_dtype(x.dtype)
    largest = torch.zeros(max(1, triton.cdiv(x.numel(), BLOCK)), dtype=wide, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            _largest[(largest.numel(),)](x, largest, x.numel(), *_layout(wide), BLOCK)
    return bias_of_largest(largest.amax().double(), exp_bits, has_inf_nan)


def mini_float_pack(
    x: Tensor,
    bias: Tensor,
    exp_bits: int,
    man_bits: int,
    signed: bool,
    has_inf_nan: bool,
    dense: bool,
) -> Tensor:
    """Return the codes of ``x``."""
    check_bias_value(bias)
    x = x.contiguous()
    count, bits = x.numel(), int(signed) + exp_bits + man_bits
    packed = x.new_empty((count * bits + 7) // 8 if dense else x.shape, dtype=torch.uint8)
    if count == 0:
        return packed
    wide = torch.float64 if exp_bits == 8 else accumulate_dtype(x.dtype)
    wrong = torch.empty(triton.cdiv(count, BLOCK), dtype=torch.int32, device=x.device)
    largest = largest_code(exp_bits, man_bits, has_inf_nan)
    with torch.cuda.device_of(x):
        _encode[(wrong.numel(),)](
            x, bias, packed, wrong, count, packed.numel(),
            man_bits, bits, bits if dense else 8, largest, signed, has_inf_nan,
            *_layout(wide), BLOCK // 8,
        )  # fmt: skip
    if not has_inf_nan:
        check_values((wrong == 0).all(), lambda: "x must be finite, got NaN or infinity")
    return packed


def mini_float_unpack(
    packed: Tensor,
    bias: Tensor,
    count: int,
    exp_bits: int,
    man_bits: int,
    signed: bool,
    has_inf_nan: bool,
    dense: bool,
    type: int,
) -> Tensor:
    """Return the numbers of codes."""
    check_bias_value(bias)
    packed = packed.contiguous()
    bits = int(signed) + exp_bits + man_bits
    found = packed.new_empty(count, dtype=FLOATING[type])
    if count == 0:
        return found
    wide = torch.float64 if exp_bits == 8 else accumulate_dtype(FLOATING[type])
    wrong = torch.empty(triton.cdiv(count, BLOCK), dtype=torch.int32, device=packed.device)
    largest = largest_code(exp_bits, man_bits, has_inf_nan)
    with torch.cuda.device_of(packed):
        _decode[(wrong.numel(),)](
            packed, bias, found, wrong, count, packed.numel(),
            man_bits, bits, bits if dense else 8, largest, signed, has_inf_nan,
            *_layout(wide), BLOCK // 8,
        )  # fmt: skip
    if not dense and bits < 8:
        check_values((wrong == 0).all(), lambda: f"packed must hold codes below {2**bits}")
    return found


def _layout(wide: torch.dtype) -> tuple[object, ...]:
    """Return a type, the integer of its size, the bits of its mantissa and its bias."""
    if wide == torch.float64:
        return tl.float64, tl.int64, 52, 1023
    return tl.float32, tl.int32, 23, 127


@triton.jit
def _scales(
    bias, SIGN: tl.constexpr, A: tl.constexpr, INT: tl.constexpr, MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """Return two powers of two whose product moves the bias to the middle one, or back."""
    LIMIT: tl.constexpr = 252 if MANTISSA == 23 else 1024
    shift = SIGN * (tl.load(bias).to(INT) - MIDDLE_BIAS)
    shift = tl.minimum(tl.maximum(shift, -LIMIT), LIMIT)
    half = shift >> 1
    first = ((half + BIAS) << MANTISSA).to(A, bitcast=True)
    second = ((shift - half + BIAS) << MANTISSA).to(A, bitcast=True)
    return first, second


@triton.jit
def _magic(
    like, SHIFT: tl.constexpr, INT: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr
):
    """Return the bits of the number whose last place is one step of the field 0."""
    return (like * 0 + (MANTISSA + 1 - MIDDLE_BIAS - SHIFT + BIAS)).to(INT) << MANTISSA


@triton.jit
def _size_bits(x, A: tl.constexpr, INT: tl.constexpr):
    """Return the bits of ``x`` in the type A, and those without the sign."""
    if x.dtype.primitive_bitwidth == 16:  # to float64 by way of float32
        x = x.to(tl.float32)
    bits = x.to(A).to(INT, bitcast=True)
    one = (bits * 0) + 1
    sign = one << (31 if tl.int32 == INT else 63)
    return bits, bits & ~sign


@triton.jit
def _encode(
    x, bias, packed, wrong, count, num_bytes,
    MAN_BITS: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, LARGEST: tl.constexpr,
    SIGNED: tl.constexpr, HAS_NAN: tl.constexpr,
    A: tl.constexpr, INT: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    DROP: tl.constexpr = MANTISSA - MAN_BITS
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)[:, None]
    place = tl.arange(0, WORD)[None, :]
    element = word * WORD + place
    inside = element < count
    bits, size = _size_bits(tl.load(x + element, inside, 0.0), A, INT)
    first, second = _scales(bias, 1, A, INT, MANTISSA, BIAS)
    middle = size.to(A, bitcast=True) * first * second
    fields = middle.to(INT, bitcast=True)
    one = fields * 0 + 1
    offset = (one * (BIAS - MIDDLE_BIAS)) << MANTISSA
    shifted = fields - offset
    half_less = (one << (DROP - 1)) - 1
    normal = (shifted + half_less + ((shifted >> DROP) & 1)) >> DROP
    magic = _magic(fields, MAN_BITS, INT, MANTISSA, BIAS)
    low = (middle + magic.to(A, bitcast=True)).to(INT, bitcast=True) - magic
    code = tl.where(fields < offset + (one << MANTISSA), low, normal)
    code = tl.minimum(code, LARGEST).to(tl.int32)
    infinity = (one * (2 * BIAS + 1)) << MANTISSA
    if not SIGNED:
        code = tl.where(bits < 0, 0, code)
    if HAS_NAN:
        code = tl.where(size > infinity, LARGEST + 1, code)
    else:
        tl.store(wrong + tl.program_id(0), tl.max((size >= infinity).to(tl.int32)))
    if SIGNED:
        code = tl.where(bits < 0, code | (1 << (BITS - 1)), code)
    if WIDTH == 8:
        tl.store(packed + element, code.to(tl.uint8), inside)
    else:
        joined = tl.sum(tl.where(inside, code, 0).to(tl.int64) << (place * WIDTH), 1)[:, None]
        at = word * WIDTH + place
        byte = (joined >> (place * 8)) & 255
        tl.store(packed + at, byte.to(tl.uint8), (place < WIDTH) & (at < num_bytes))


@triton.jit
def _decode(
    packed, bias, found, wrong, count, num_bytes,
    MAN_BITS: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, LARGEST: tl.constexpr,
    SIGNED: tl.constexpr, HAS_NAN: tl.constexpr,
    A: tl.constexpr, INT: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    DROP: tl.constexpr = MANTISSA - MAN_BITS
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)[:, None]
    place = tl.arange(0, WORD)[None, :]
    element = word * WORD + place
    inside = element < count
    if WIDTH == 8:
        code = tl.load(packed + element, inside, 0).to(INT)
    else:
        at = word * WIDTH + place
        byte = tl.load(packed + at, (place < WIDTH) & (at < num_bytes), 0).to(tl.int64)
        joined = tl.sum(byte << (place * 8), 1)[:, None]
        code = ((joined >> (place * WIDTH)) & ((1 << BITS) - 1)).to(INT)
    tl.store(wrong + tl.program_id(0), tl.max((code >= (1 << BITS)).to(tl.int32)))
    magnitude = code
    if SIGNED:
        magnitude = code & ((1 << (BITS - 1)) - 1)
    one = code * 0 + 1
    offset = (one * (BIAS - MIDDLE_BIAS)) << MANTISSA
    magic = _magic(code, MAN_BITS, INT, MANTISSA, BIAS)
    low = (magnitude + magic).to(A, bitcast=True) - magic.to(A, bitcast=True)
    normal = ((magnitude << DROP) + offset).to(A, bitcast=True)
    first, second = _scales(bias, -1, A, INT, MANTISSA, BIAS)
    value = tl.where(magnitude < (1 << MAN_BITS), low, normal) * first * second
    if HAS_NAN:
        value = tl.where(magnitude == LARGEST, float("inf"), value)
        value = tl.where(magnitude > LARGEST, float("nan"), value)
    if SIGNED:
        value = tl.where(code >= (1 << (BITS - 1)), -value, value)
    if found.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    tl.store(found + element, value.to(found.dtype.element_ty), inside)


@triton.jit
def _largest(
    x, largest, count,
    A: tl.constexpr, INT: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _, size = _size_bits(tl.load(x + element, element < count, 0.0), A, INT)
    infinity = ((size * 0 + 1) * (2 * BIAS + 1)) << MANTISSA
    finite = tl.where(size < infinity, size, 0)
    tl.store(largest + tl.program_id(0), tl.max(finite).to(A, bitcast=True))
