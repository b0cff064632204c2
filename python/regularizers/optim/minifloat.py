"""Small floating-point formats of 2 to 8 bits for weights: rounding, codes, packed bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_same_device,
    check_tensor,
    check_values,
)

NARROWEST, WIDEST = 2, 8
LARGEST_BIAS = 500  # beyond the exponents of float32, and powers of two up to here are float64


class MiniFloat:
    r"""A floating-point format with a sign, a few exponent bits and a few mantissa bits.

    .. math::
        x = \pm\left(1 + \frac{m}{2^M}\right) 2^{f - b} \ (f > 0), \qquad
        x = \pm\frac{m}{2^M}\, 2^{1 - b} \ (f = 0)

    for a code with exponent field f and mantissa field m, from the highest bit down: sign, f, m.
    Rounding is to nearest, ties to the even code; denormals are kept. Without infinities the
    largest field is a number like the others and values beyond it become the largest number; with
    them the field stands for infinity and NaN, as in IEEE 754, and values beyond become infinite.
    Unsigned formats take negative values to 0. Zero keeps its sign in signed formats.

    ``bias=None`` fits the bias to each tensor: the top binade is that of its largest entry. The
    bias then is part of what is stored; :meth:`pack` returns it, :meth:`unpack` takes it.

    Args:
        exp_bits: bits of f, at least 1 (2 with infinities).
        man_bits: M, at least 0 (1 with infinities).
        bias: b, from -500 to 500, or None.
        signed: whether there is a sign bit.
        has_inf_nan: whether the largest exponent field stands for infinity and NaN.

    Raises:
        TypeError: a number of bits or the bias is not an int.
        ValueError: sign, exponent and mantissa do not come to 2 to 8 bits, or one is out of range.

    Example:
        >>> e2m1 = MiniFloat(2, 1, bias=1)
        >>> e2m1.values()
        tensor([ 0.0000,  0.5000,  1.0000,  1.5000,  2.0000,  3.0000,  4.0000,  6.0000,
                -0.0000, -0.5000, -1.0000, -1.5000, -2.0000, -3.0000, -4.0000, -6.0000])
        >>> e2m1.quantize(torch.tensor([0.3, 2.5, -9.0]))
        tensor([ 0.5000,  2.0000, -6.0000])
        >>> packed, bias = e2m1.pack(torch.tensor([0.3, 2.5, -9.0]))
        >>> packed
        tensor([65, 15], dtype=torch.uint8)
        >>> e2m1.unpack(packed, bias, (3,))
        tensor([ 0.5000,  2.0000, -6.0000])

    Source:
        IEEE 754 in small; ``MiniFloat(5, 2, bias=15, has_inf_nan=True)`` is ``float8_e5m2``. See
        :class:`RF8` for the format of arXiv 2506.00486.
    """

    def __init__(
        self,
        exp_bits: int,
        man_bits: int,
        *,
        bias: int | None = None,
        signed: bool = True,
        has_inf_nan: bool = False,
    ) -> None:
        check_at_least("exp_bits", exp_bits, 1 + has_inf_nan)
        check_at_least("man_bits", man_bits, 0 + has_inf_nan)
        bits = int(signed) + exp_bits + man_bits
        if not NARROWEST <= bits <= WIDEST:
            raise ValueError(
                f"exp_bits and man_bits must come to {NARROWEST} to {WIDEST} bits with the sign, "
                f"got {bits}"
            )
        if bias is not None:
            check_at_least("bias", bias, -LARGEST_BIAS)
            if bias > LARGEST_BIAS:
                raise ValueError(f"bias must be at most {LARGEST_BIAS}, got {bias}")
        self.exp_bits = exp_bits
        self.man_bits = man_bits
        self.bias = bias
        self.signed = signed
        self.has_inf_nan = has_inf_nan
        self.bits = bits
        self._infinity = (2**exp_bits - 1) << man_bits  # the code, where there is one
        self._largest = (self._infinity if has_inf_nan else 2 ** (bits - signed)) - 1

    def __repr__(self) -> str:
        inside = f"exp_bits={self.exp_bits}, man_bits={self.man_bits}, bias={self.bias}"
        return f"{type(self).__name__}({inside}, signed={self.signed}, inf={self.has_inf_nan})"

    def bias_for(self, x: Tensor) -> Tensor:
        """Return the bias that ``x`` is stored with: the format's own, or the one fitted to it.

        Args:
            x: ``[*]``, a floating-point tensor.

        Returns:
            A tensor with no dimensions, int32, on the device of ``x``.
        """
        check_floating("x", x)
        default = 2 ** (self.exp_bits - 1) - 1
        fixed = default if self.bias is None else self.bias
        if self.bias is not None or x.numel() == 0:
            return torch.full((), fixed, dtype=torch.int32, device=x.device)
        size = x.detach().abs()
        size = torch.where(size.isfinite(), size, 0)
        largest = size.amax().double()
        # The exponent of the largest entry, 2^e <= largest < 2^(e + 1), in the top binade.
        exponent = torch.frexp(largest).exponent - 1
        bias = (2**self.exp_bits - 1 - int(self.has_inf_nan)) - exponent
        fitted: Tensor = torch.where(largest > 0, bias, default)
        return fitted.clamp(-LARGEST_BIAS, LARGEST_BIAS).int()

    def encode(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Round to the nearest number of the format and return its code.

        Args:
            x: ``[*]``, a floating-point tensor; finite if the format has no infinities.
            bias: from :meth:`bias_for`; found when omitted.

        Returns:
            ``[*]``, uint8: codes below ``2^bits``.

        Raises:
            TypeError: ``x`` is not a floating-point tensor.
            ValueError: ``x`` is not finite and the format has no infinities.
        """
        check_floating("x", x)
        if not self.has_inf_nan and x.numel():
            check_values(x.isfinite().all(), lambda: "x must be finite, got NaN or infinity")
        bias = self._bias(bias, x)
        # All steps are exact in float64 but the one rounding.
        size = x.detach().double().abs()
        negative = torch.signbit(x.detach())
        if not self.signed:
            size = torch.where(negative, 0, size)
        least = 1 - bias.double()
        exponent = (torch.frexp(size).exponent - 1).double().maximum(least)
        exponent = torch.where(size > 0, exponent, least)  # frexp gives 0 the exponent 0
        base = (exponent - least) * 2**self.man_bits
        steps = size * torch.exp2(self.man_bits - exponent)
        # 2^M codes a binade; a mantissa that rounds up to 2 carries into the next by itself.
        if self.man_bits > 0:
            code = base + torch.round(steps)
        else:  # every other binade begins at an odd code, which ties must know of
            odd = base % 2
            code = base + odd + torch.round(steps - odd)
        if self.has_inf_nan:
            code = code.clamp(max=self._infinity)
            code = torch.where(size.isinf(), self._infinity, code)
            code = torch.where(size.isnan(), self._infinity + 1, code)
        else:
            code = code.clamp(max=self._largest)
        if self.signed:
            code = code + negative * 2 ** (self.bits - 1)
        codes: Tensor = code.to(torch.uint8)
        return codes

    def values(self, bias: int | Tensor | None = None) -> Tensor:
        """Return the numbers of all codes, ``[2^bits]``, float32, in the order of the codes."""
        if bias is None:
            bias = 2 ** (self.exp_bits - 1) - 1 if self.bias is None else self.bias
        bias = torch.as_tensor(bias)
        code = torch.arange(2**self.bits, device=bias.device)
        field = (code >> self.man_bits) & (2**self.exp_bits - 1)
        mantissa = (code & (2**self.man_bits - 1)).double()
        significand = mantissa + (field > 0) * 2**self.man_bits
        exponent = field.clamp(min=1) - self.man_bits - bias
        value = significand * torch.exp2(exponent.double())
        if self.has_inf_nan:
            special = torch.where(mantissa > 0, torch.nan, torch.inf)
            value = torch.where(field == 2**self.exp_bits - 1, special, value)
        if self.signed:
            value = torch.where(code >> (self.bits - 1) > 0, -value, value)
        numbers: Tensor = value.float()
        return numbers

    def decode(self, codes: Tensor, bias: int | Tensor | None = None) -> Tensor:
        """Return the numbers of codes.

        Args:
            codes: ``[*]``, uint8, below ``2^bits``.
            bias: what they were encoded with; may be omitted where the format has its own.

        Returns:
            ``[*]``, float32.

        Raises:
            TypeError: ``codes`` is not uint8.
            ValueError: a code is out of range, or the bias is missing.
        """
        _check_bytes("codes", codes)
        if self.bias is None and bias is None:
            raise ValueError("bias must be given for a format that fits it to each tensor")
        if codes.numel():
            in_range = codes.amax() <= 2**self.bits - 1  # 2^8 is no uint8
            check_values(in_range, lambda: f"codes must lie below {2**self.bits}")
        return self.values(bias).to(codes.device)[codes.long()]

    def quantize(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded to numbers of the format, in its own dtype; no gradient flows."""
        bias = self.bias_for(x)
        return self.decode(self.encode(x, bias), bias).to(x.dtype)

    def pack(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode ``x`` and lay the codes out without gaps.

        Code i takes the bits from ``i * bits`` on, counted from the lowest bit of the first byte.

        Args:
            x: ``[*]``, as for :meth:`encode`.

        Returns:
            The bytes, ``[ceil(n * bits / 8)]``, uint8; and the bias, an int32 tensor with no
            dimensions.
        """
        bias = self.bias_for(x)
        return pack_codes(self.encode(x, bias), self.bits), bias

    def unpack(
        self,
        packed: Tensor,
        bias: int | Tensor | None,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return the numbers that :meth:`pack` laid out.

        Args:
            packed: the bytes.
            bias: what :meth:`pack` returned.
            shape: the shape that the tensor had.
            dtype: of what is returned.

        Raises:
            TypeError: ``packed`` is not uint8.
            ValueError: ``packed`` does not have the number of bytes that ``shape`` takes.
        """
        codes = unpack_codes(packed, self.bits, torch.Size(shape).numel())
        return self.decode(codes, bias).to(dtype).reshape(shape)

    def _bias(self, bias: Tensor | None, x: Tensor) -> Tensor:
        if bias is None:
            return self.bias_for(x)
        check_tensor("bias", bias)
        check_same_device("bias", bias, "x", x)
        return bias


class RF8(MiniFloat):
    """An 8-bit format for weights: sign, 4 exponent bits, 3 mantissa bits, a bias for each tensor.

    No code is spent on infinity or NaN, and the top binade holds the tensor's largest weight: 15
    binades with a relative error of at most 1/16, and denormals below.

    Example:
        >>> w = torch.tensor([0.02, -0.001, 0.0133])
        >>> packed, bias = RF8().pack(w)
        >>> packed.numel(), bias.item()
        (3, 21)
        >>> RF8().unpack(packed, bias, (3,))
        tensor([ 0.0195, -0.0010,  0.0137])

    Source:
        A placeholder for the RF8 of arXiv 2506.00486 (versions 1 to 3), whose bit layout is not
        published in what could be found: width and purpose are the paper's, the split into bits and
        the bias are the library's.
    """

    def __init__(self) -> None:
        super().__init__(4, 3)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Lay codes of ``bits`` bits out without gaps, lowest bits first: uint8 to uint8."""
    codes = codes.reshape(-1)
    if bits == 8:
        return codes.clone()
    n = codes.numel()
    # Eight codes are `bits` bytes, put together in one 64-bit word.
    words = torch.nn.functional.pad(codes, (0, -n % 8)).reshape(-1, 8).long()
    word = (words << (bits * torch.arange(8, device=codes.device))).sum(1, keepdim=True)
    packed = (word >> (8 * torch.arange(bits, device=codes.device))) & 255
    return packed.to(torch.uint8).reshape(-1)[: -(-n * bits // 8)]


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return ``count`` codes of ``bits`` bits that :func:`pack_codes` laid out."""
    _check_bytes("packed", packed)
    due = -(-count * bits // 8)
    if packed.dim() != 1 or packed.numel() != due:
        raise ValueError(f"packed must have shape [{due}], got {list(packed.shape)}")
    if bits == 8:
        return packed.clone()
    parts = torch.nn.functional.pad(packed, (0, -due % bits)).reshape(-1, bits).long()
    word = (parts << (8 * torch.arange(bits, device=packed.device))).sum(1, keepdim=True)
    codes = (word >> (bits * torch.arange(8, device=packed.device))) & (2**bits - 1)
    narrow: Tensor = codes.to(torch.uint8)
    return narrow.reshape(-1)[:count]


def _check_bytes(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype != torch.uint8:
        raise TypeError(f"{name} must be uint8, got {tensor.dtype}")
