"""Small floating-point formats of 2 to 8 bits for weights: rounding, codes, packed bytes."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from regularizers._shared.checks import check_at_least, check_floating
from regularizers.ops.mini_float import (
    LARGEST_BIAS,
    all_values,
    check_bytes,
    check_format,
    mini_float_bias,
    mini_float_pack,
    mini_float_unpack,
    usual_bias,
)


class Kind(TypedDict):
    """The switches of a format, as the operators take them."""

    signed: bool
    has_inf_nan: bool


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
        bits = check_format(exp_bits, man_bits, signed, has_inf_nan)
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
        if self.bias is None:
            return mini_float_bias(x, self.exp_bits, has_inf_nan=self.has_inf_nan)
        check_floating("x", x)
        return torch.full((), self.bias, dtype=torch.int32, device=x.device)

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
        bias = self.bias_for(x) if bias is None else _as_bias(bias, x)
        return mini_float_pack(x, bias, *self._bits, dense=False, **self._kind)

    def values(self, bias: int | Tensor | None = None) -> Tensor:
        """Return the numbers of all codes, ``[2^bits]``, float32, in the order of the codes."""
        if bias is None:
            bias = usual_bias(self.exp_bits) if self.bias is None else self.bias
        return all_values(torch.as_tensor(bias), *self._bits, **self._kind)

    def decode(
        self,
        codes: Tensor,
        bias: int | Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return the numbers of codes.

        Args:
            codes: ``[*]``, uint8, below ``2^bits``.
            bias: what they were encoded with; may be omitted where the format has its own.
            dtype: of what is returned.

        Returns:
            ``[*]``.

        Raises:
            TypeError: ``codes`` is not uint8.
            ValueError: a code is out of range, or the bias is missing.
        """
        check_bytes("codes", codes)
        bias = self._stored_bias(bias, codes)
        return mini_float_unpack(codes, bias, *self._bits, dense=False, dtype=dtype, **self._kind)

    def quantize(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded to numbers of the format, in its own dtype; no gradient flows."""
        bias = self.bias_for(x)
        return self.decode(self.encode(x, bias), bias, dtype=x.dtype)

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
        return mini_float_pack(x, bias, *self._bits, **self._kind), bias

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
        check_bytes("packed", packed)
        bias = self._stored_bias(bias, packed)
        return mini_float_unpack(
            packed, bias, *self._bits, shape=tuple(shape), dtype=dtype, **self._kind
        )

    @property
    def _bits(self) -> tuple[int, int]:
        return self.exp_bits, self.man_bits

    @property
    def _kind(self) -> Kind:
        return {"signed": self.signed, "has_inf_nan": self.has_inf_nan}

    def _stored_bias(self, bias: int | Tensor | None, codes: Tensor) -> Tensor:
        bias = self.bias if bias is None else bias
        if bias is None:
            raise ValueError("bias must be given for a format that fits it to each tensor")
        return _as_bias(bias, codes)


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


def _as_bias(bias: int | Tensor, beside: Tensor) -> Tensor:
    """Return a bias as the operators take it; a number goes to the device of ``beside``."""
    if isinstance(bias, Tensor):
        return bias if bias.is_floating_point() else bias.int()
    return torch.full((), bias, dtype=torch.int32, device=beside.device)
