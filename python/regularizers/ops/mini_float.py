"""Numbers to small floating-point codes of 2 to 8 bits and back, in one pass over memory each."""

from __future__ import annotations

import torch
from torch import Tensor

from regularizers._shared.checks import (
    FLOATING,
    check_at_least,
    check_floating,
    check_same_device,
    check_tensor,
    check_values,
)
from regularizers.ops._operator import Operator, accumulate_dtype, transformed

NARROWEST, WIDEST = 2, 8
LARGEST_BIAS = 500  # beyond the exponents of float32, and powers of two up to here are float64


def mini_float_bias(x: Tensor, exp_bits: int, *, has_inf_nan: bool = False) -> Tensor:
    r"""Return the bias that puts the largest finite entry of a tensor into a format's top binade.

    .. math:: b = 2^E - 1 - [\text{has infinities}] - \lfloor \log_2 \max |x_i| \rfloor

    Args:
        x: ``[*]``; float32, float64, bfloat16 or float16. Infinities and NaN do not count.
        exp_bits: E, bits of the format's exponent.
        has_inf_nan: whether the largest exponent field stands for infinity and NaN.

    Returns:
        int32 tensor with no dimensions, in [-500, 500]; :math:`2^{E-1} - 1`, the usual bias, where
        no entry is finite and not 0.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, or ``exp_bits`` is not an int.
        ValueError: ``exp_bits`` is out of range.

    Example:
        >>> mini_float_bias(torch.tensor([0.02, -0.001]), 4)  # 2^-6 <= 0.02 < 2^-5
        tensor(21, dtype=torch.int32)
    """
    check_floating("x", x)
    check_at_least("exp_bits", exp_bits, 1 + has_inf_nan)
    if exp_bits > WIDEST:
        raise ValueError(f"exp_bits must be at most {WIDEST}, got {exp_bits}")
    arguments = (x.detach(), exp_bits, has_inf_nan)
    found: Tensor = _bias(*arguments) if transformed() else BIAS(*arguments)
    return found


def mini_float_pack(
    x: Tensor,
    bias: Tensor,
    exp_bits: int,
    man_bits: int,
    *,
    signed: bool = True,
    has_inf_nan: bool = False,
    dense: bool = True,
) -> Tensor:
    r"""Round numbers to a small floating-point format and return the bytes of their codes.

    A code holds, from its highest bit down, a sign, an exponent field f and a mantissa m:

    .. math::
        x = \pm\left(1 + \frac{m}{2^M}\right) 2^{f - b} \ (f > 0), \qquad
        x = \pm\frac{m}{2^M}\, 2^{1 - b} \ (f = 0)

    Rounding is to nearest, once, ties to the even code. Beyond the largest number comes the largest
    number, or infinity where the format has one. Unsigned formats take negative numbers to 0. With
    infinities the largest field stands for infinity (m = 0) and NaN.

    A float32 number costs four bytes read and at most one written; the codes have no derivative.

    Args:
        x: ``[*]``; float32, float64, bfloat16 or float16; finite where the format has no NaN.
        bias: b, int32 tensor with no dimensions, in [-500, 500].
        exp_bits: bits of f, at least 1 (2 with infinities).
        man_bits: M, at least 0 (1 with infinities).
        signed: whether there is a sign bit.
        has_inf_nan: whether the largest exponent field stands for infinity and NaN.
        dense: lay codes out without gaps: code i takes the bits from ``i * bits`` on, counted from
            the lowest bit of the first byte. False: a byte a code.

    Returns:
        uint8: ``[ceil(n * bits / 8)]``, or the shape of ``x`` with a byte a code.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: the bits do not come to 2 to 8 with the sign, ``bias`` has dimensions, is on
            another device or out of range (the value is unchecked off a CPU), or ``x`` is not
            finite and the format has no NaN.

    Example:
        >>> bias = torch.tensor(1, dtype=torch.int32)
        >>> packed = mini_float_pack(torch.tensor([0.3, 2.5, -9.0]), bias, 2, 1)  # 4 bits a number
        >>> packed
        tensor([65, 15], dtype=torch.uint8)
        >>> mini_float_unpack(packed, bias, 2, 1, shape=(3,))
        tensor([ 0.5000,  2.0000, -6.0000])

    Source:
        IEEE 754 in small; ``(5, 2)`` with infinities and bias 15 is ``torch.float8_e5m2``.
    """
    check_floating("x", x)
    check_format(exp_bits, man_bits, signed, has_inf_nan)
    _check_bias(bias, "x", x)
    arguments = (x.detach(), bias, exp_bits, man_bits, signed, has_inf_nan, dense)
    packed: Tensor = _packed(*arguments) if transformed() else PACK(*arguments)
    return packed


def mini_float_unpack(
    packed: Tensor,
    bias: Tensor,
    exp_bits: int,
    man_bits: int,
    *,
    shape: tuple[int, ...] | None = None,
    signed: bool = True,
    has_inf_nan: bool = False,
    dense: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the numbers that :func:`mini_float_pack` stored.

    Args:
        packed: uint8, what it returned.
        bias: what it was given.
        exp_bits: as there.
        man_bits: as there.
        shape: the shape of the numbers; needed with ``dense``, else that of ``packed``.
        signed: as there.
        has_inf_nan: as there.
        dense: as there.
        dtype: of the result; computed in float64 for float64, else in float32.

    Returns:
        A tensor of ``shape``, row-major.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: ``packed`` does not hold ``shape``, a byte is no code of the format (a CPU looks
            before it returns, other devices assert), or a reason that :func:`mini_float_pack` has.

    Example:
        >>> code = torch.tensor([0b0_0111_100], dtype=torch.uint8)
        >>> mini_float_unpack(code, torch.tensor(7, dtype=torch.int32), 4, 3, shape=(1,))
        tensor([1.5000])
    """
    check_bytes("packed", packed)
    bits = check_format(exp_bits, man_bits, signed, has_inf_nan)
    _check_bias(bias, "packed", packed)
    if dtype not in FLOATING:
        raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    if shape is None:
        if dense:
            raise ValueError("shape must be given for dense codes")
        shape = tuple(packed.shape)
    count = 1
    for size in shape:
        count = count * size
    if dense:
        check_dense(packed, bits, count)
    elif packed.numel() != count:
        raise ValueError(f"packed must hold {count} codes, got {packed.numel()}")
    format_ = (exp_bits, man_bits, signed, has_inf_nan)
    arguments = (packed, bias, count, *format_, dense, FLOATING.index(dtype))
    found: Tensor = _unpacked(*arguments) if transformed() else UNPACK(*arguments)
    return found.reshape(shape)


def check_format(exp_bits: int, man_bits: int, signed: bool, has_inf_nan: bool) -> int:
    """Return how many bits a code has; raise unless they are 2 to 8."""
    check_at_least("exp_bits", exp_bits, 1 + has_inf_nan)
    check_at_least("man_bits", man_bits, 0 + has_inf_nan)
    bits = int(signed) + exp_bits + man_bits
    if not NARROWEST <= bits <= WIDEST:
        raise ValueError(
            f"exp_bits and man_bits must come to {NARROWEST} to {WIDEST} bits with the sign, "
            f"got {bits}"
        )
    return bits


def check_bytes(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is a tensor of bytes."""
    check_tensor(name, tensor)
    if tensor.dtype != torch.uint8:
        raise TypeError(f"{name} must be uint8, got {tensor.dtype}")


def check_dense(packed: Tensor, bits: int, count: int) -> None:
    """Raise unless ``packed`` has the bytes of ``count`` codes of ``bits`` bits."""
    due = (count * bits + 7) // 8
    if packed.dim() != 1 or packed.numel() != due:
        raise ValueError(f"packed must have shape [{due}], got {list(packed.shape)}")


def _check_bias(bias: Tensor, reference_name: str, reference: Tensor) -> None:
    check_tensor("bias", bias)
    if bias.dtype != torch.int32:
        raise TypeError(f"bias must be int32, got {bias.dtype}")
    if bias.dim() != 0:
        raise ValueError(f"bias must have no dimensions, got {list(bias.shape)}")
    check_same_device("bias", bias, reference_name, reference)


def check_bias_value(bias: Tensor) -> None:
    """Check the value of a bias where that costs no synchronisation."""
    if bias.device.type == "cpu" and not -LARGEST_BIAS <= bias.item() <= LARGEST_BIAS:
        raise ValueError(
            f"bias must lie in [-{LARGEST_BIAS}, {LARGEST_BIAS}], got {int(bias.item())}"
        )


def usual_bias(exp_bits: int) -> int:
    """Return the bias of IEEE 754 for so many exponent bits."""
    return int(2 ** (exp_bits - 1)) - 1


def largest_code(exp_bits: int, man_bits: int, has_inf_nan: bool) -> int:
    """Return the code, without sign, of what lies beyond the format: infinity or the largest."""
    return int((2**exp_bits - has_inf_nan) << man_bits) - (not has_inf_nan)


def bias_of_largest(largest: Tensor, exp_bits: int, has_inf_nan: bool) -> Tensor:
    """Return the bias for a tensor whose largest finite entry is ``largest``, float64."""
    # 2^e <= largest < 2^(e + 1)
    exponent = torch.frexp(largest).exponent - 1
    bias = (2**exp_bits - 1 - int(has_inf_nan)) - exponent
    fitted: Tensor = torch.where(largest > 0, bias, usual_bias(exp_bits))
    return fitted.clamp(-LARGEST_BIAS, LARGEST_BIAS).int()


def _bias(x: Tensor, exp_bits: int, has_inf_nan: bool) -> Tensor:
    """Fit a bias in plain PyTorch; the specification."""
    size = torch.where(x.isfinite(), x.abs(), 0)
    largest = size.amax() if x.numel() else x.new_zeros(())
    return bias_of_largest(largest.double(), exp_bits, has_inf_nan)


def _packed(
    x: Tensor,
    bias: Tensor,
    exp_bits: int,
    man_bits: int,
    signed: bool,
    has_inf_nan: bool,
    dense: bool,
) -> Tensor:
    """Encode in plain PyTorch; the specification. All steps are exact in float64 but one."""
    size = x.double().abs()
    negative = torch.signbit(x)
    if not signed:
        size = torch.where(negative & ~size.isnan(), 0, size)
    least = 1 - bias.double()
    exponent = (torch.frexp(size).exponent - 1).double().maximum(least)
    exponent = torch.where(size > 0, exponent, least)  # frexp gives 0 the exponent 0
    base = (exponent - least) * 2**man_bits
    # 2^M codes a binade; a mantissa that rounds up to 2 carries into the next by itself.
    steps = size * torch.exp2(man_bits - exponent)
    # With M = 0 every other binade begins at an odd code, which ties must know of.
    odd = base % 2
    code = base + odd + torch.round(steps - odd)
    largest = largest_code(exp_bits, man_bits, has_inf_nan)
    code = torch.where(size.isinf(), largest, code.clamp(max=largest))
    code = torch.where(size.isnan(), largest + 1, code)
    bits = int(signed) + exp_bits + man_bits
    if signed:
        code = code + negative * 2 ** (bits - 1)
    codes = code.to(torch.uint8)
    return dense_codes(codes, bits) if dense else codes


def dense_codes(codes: Tensor, bits: int) -> Tensor:
    """Lay codes of ``bits`` bits out without gaps, lowest bits first: uint8 to uint8."""
    codes = codes.reshape(-1)
    if bits == 8:
        return codes.clone()
    n = codes.numel()
    # Eight codes are `bits` bytes, put together in one 64-bit word.
    words = torch.nn.functional.pad(codes, (0, -n % 8)).reshape(-1, 8).long()
    word = (words << (bits * torch.arange(8, device=codes.device))).sum(1, keepdim=True)
    packed = (word >> (8 * torch.arange(bits, device=codes.device))) & 255
    return packed.to(torch.uint8).reshape(-1)[: (n * bits + 7) // 8]


def single_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return ``count`` codes of ``bits`` bits that :func:`dense_codes` laid out."""
    if bits == 8:
        return packed.clone()
    due = packed.numel()
    parts = torch.nn.functional.pad(packed, (0, -due % bits)).reshape(-1, bits).long()
    word = (parts << (8 * torch.arange(bits, device=packed.device))).sum(1, keepdim=True)
    codes = (word >> (bits * torch.arange(8, device=packed.device))) & (2**bits - 1)
    narrow: Tensor = codes.to(torch.uint8)
    return narrow.reshape(-1)[:count]


def all_values(
    bias: Tensor,
    exp_bits: int,
    man_bits: int,
    signed: bool,
    has_inf_nan: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the numbers of all codes, ``[2^bits]``, in the order of the codes."""
    bits = int(signed) + exp_bits + man_bits
    code = torch.arange(2**bits, device=bias.device)
    field = (code >> man_bits) & (2**exp_bits - 1)
    mantissa = (code & (2**man_bits - 1)).double()
    significand = mantissa + (field > 0) * 2**man_bits
    exponent = field.clamp(min=1) - man_bits - bias
    value = significand * torch.exp2(exponent.double())
    if has_inf_nan:
        special = torch.where(mantissa > 0, torch.nan, torch.inf)
        value = torch.where(field == 2**exp_bits - 1, special, value)
    if signed:
        value = torch.where(code >> (bits - 1) > 0, -value, value)
    numbers: Tensor = value.to(dtype)
    return numbers


def _unpacked(
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
    """Decode in plain PyTorch; the specification."""
    bits = int(signed) + exp_bits + man_bits
    codes = single_codes(packed, bits, count) if dense else packed.reshape(-1)
    dtype = FLOATING[type]
    table = all_values(bias, exp_bits, man_bits, signed, has_inf_nan, dtype=accumulate_dtype(dtype))
    return table[codes.long()].to(dtype)


def _pack_reference(
    x: Tensor,
    bias: Tensor,
    exp_bits: int,
    man_bits: int,
    signed: bool,
    has_inf_nan: bool,
    dense: bool,
) -> Tensor:
    check_bias_value(bias)
    if not has_inf_nan and x.numel():
        check_values(x.isfinite().all(), lambda: "x must be finite, got NaN or infinity")
    return _packed(x, bias, exp_bits, man_bits, signed, has_inf_nan, dense).contiguous()


def _unpack_reference(
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
    check_bias_value(bias)
    bits = int(signed) + exp_bits + man_bits
    if not dense and bits < 8 and packed.numel():
        check_values(packed.amax() < 2**bits, lambda: f"packed must hold codes below {2**bits}")
    return _unpacked(
        packed, bias, count, exp_bits, man_bits, signed, has_inf_nan, dense, type
    ).contiguous()


def _pack_fake(
    x: Tensor,
    bias: Tensor,
    exp_bits: int,
    man_bits: int,
    signed: bool,
    has_inf_nan: bool,
    dense: bool,
) -> Tensor:
    bits = int(signed) + exp_bits + man_bits
    shape = ((x.numel() * bits + 7) // 8,) if dense else x.shape
    return x.new_empty(shape, dtype=torch.uint8)


def _unpack_fake(packed: Tensor, bias: Tensor, count: int, *others: int) -> Tensor:
    return packed.new_empty((count,), dtype=FLOATING[others[-1]])


# None has an autograd rule: codes and biases are integers, and numbers come from integers alone.
BIAS = Operator(
    "mini_float_bias",
    "(Tensor x, int exp_bits, bool has_inf_nan) -> Tensor",
    fake=lambda x, *_: x.new_empty((), dtype=torch.int32),
    reference=_bias,
    triton="mini_float:mini_float_bias",
)
PACK = Operator(
    "mini_float_pack",
    "(Tensor x, Tensor bias, int exp_bits, int man_bits, bool signed, bool has_inf_nan, "
    "bool dense) -> Tensor",
    fake=_pack_fake,
    reference=_pack_reference,
    triton="mini_float:mini_float_pack",
)
UNPACK = Operator(
    "mini_float_unpack",
    "(Tensor packed, Tensor bias, SymInt count, int exp_bits, int man_bits, bool signed, "
    "bool has_inf_nan, bool dense, int type) -> Tensor",
    fake=_unpack_fake,
    reference=_unpack_reference,
    triton="mini_float:mini_float_unpack",
)
