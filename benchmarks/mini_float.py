"""Benchmarks of the small floating-point formats: RF8 and five bits, packed and unpacked.

The goals are meant for two CPU cores; on CUDA the same cases run at larger sizes, without goals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from regularizers._bench import Case, Goal, ScalingCurve
from regularizers._bench.case import Call
from regularizers._bench.floors import copy
from regularizers._shared.checks import FLOATING
from regularizers.ops.mini_float import (
    PACK,
    UNPACK,
    all_values,
    mini_float_bias,
    mini_float_pack,
    mini_float_unpack,
)

RF8, FIVE_BITS = (4, 3), (3, 1)
NUMBERS = 2**22


def cases(device: str, quick: bool) -> list[Case]:
    """List the cases; ``quick`` leaves out the compiled peers."""
    numbers = NUMBERS if device == "cpu" else 64 * NUMBERS
    goals = [Goal("eager", at_most=1 / 20), Goal("copy", at_most=3)]
    found = [
        _pack(numbers, device, RF8, goals=goals),
        _unpack(numbers, device, RF8, compiled=not quick, goals=[Goal("copy", at_most=3)]),
    ]
    if not quick:
        found += [
            _pack(numbers, device, FIVE_BITS),
            _unpack(numbers, device, FIVE_BITS),
            _pack(numbers, device, RF8, dtype=torch.bfloat16),
            _unpack(numbers, device, RF8, dtype=torch.bfloat16),
            _fit(numbers, device),
        ]
    return found if device == "cpu" else [dataclasses.replace(case, goals=()) for case in found]


def scaling(device: str, quick: bool) -> list[ScalingCurve]:
    """List the scaling curves."""
    sizes = (2**12, 2**18) if quick else tuple(2**k for k in range(10, 25, 2))
    return [
        ScalingCurve(
            "pack-over-numbers",
            "mini_float_pack, RF8, float32",
            "numbers",
            sizes,
            lambda n: _pack(n, device, RF8),
        ),
        ScalingCurve(
            "unpack-over-numbers",
            "mini_float_unpack, RF8, float32",
            "numbers",
            sizes,
            lambda n: _unpack(n, device, RF8),
        ),
    ]


def _weights(numbers: int, device: str, dtype: torch.dtype) -> Tensor:
    return (0.02 * torch.randn(numbers, device=device)).to(dtype)


def _moved(numbers: int, form: tuple[int, int], dtype: torch.dtype) -> int:
    """Count the bytes of numbers and codes."""
    return numbers * dtype.itemsize + numbers * (1 + sum(form)) // 8


def _name(form: tuple[int, int], dtype: torch.dtype, numbers: int) -> str:
    bits = "RF8" if form == RF8 else f"{1 + sum(form)} bits"
    return f"{bits}, {str(dtype).removeprefix('torch.')}, {numbers} numbers"


def _pack(
    numbers: int,
    device: str,
    form: tuple[int, int],
    *,
    dtype: torch.dtype = torch.float32,
    goals: Sequence[Goal] = (),
) -> Case:
    x = _weights(numbers, device, dtype)
    bias = mini_float_bias(x, form[0])
    reference: Callable[..., Tensor] = PACK.kernel("reference")
    arguments = (x, bias, *form, True, False, True)
    # Inductor of torch 2.13 fails to compile the frexp in this; hence no compiled peer.
    peers: dict[str, Call] = {"eager": lambda: reference(*arguments)}
    if form == RF8:
        peers["to(float8_e4m3fn)"] = lambda: x.to(torch.float8_e4m3fn)
    moved = _moved(numbers, form, dtype)
    return Case(
        f"pack, {_name(form, dtype, numbers)}",
        ours=lambda: mini_float_pack(x, bias, *form),
        peers=peers,
        floors={"copy": copy(moved, device=device)},
        goals=goals,
        bytes_moved=moved,
    )


def _unpack(
    numbers: int,
    device: str,
    form: tuple[int, int],
    *,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    goals: Sequence[Goal] = (),
) -> Case:
    x = _weights(numbers, device, torch.float32)
    bias = mini_float_bias(x, form[0])
    packed = mini_float_pack(x, bias, *form)
    reference: Callable[..., Tensor] = UNPACK.kernel("reference")
    arguments = (packed, bias, numbers, *form, True, False, True, FLOATING.index(dtype))
    peers: dict[str, Call] = {"eager": lambda: reference(*arguments)}
    if compiled:
        lookup = torch.compile(_lookup, fullgraph=True, dynamic=False)
        table = all_values(bias, *form, True, False, dtype=dtype)
        peers["torch.compile"] = lambda: lookup(packed, table)
    if form == RF8:
        torch_codes = x.to(torch.float8_e4m3fn)
        peers["from float8_e4m3fn"] = lambda: torch_codes.to(dtype)
    moved = _moved(numbers, form, dtype)
    return Case(
        f"unpack, {_name(form, dtype, numbers)}",
        ours=lambda: mini_float_unpack(packed, bias, *form, shape=(numbers,), dtype=dtype),
        peers=peers,
        floors={"copy": copy(moved, device=device)},
        goals=goals,
        bytes_moved=moved,
    )


def _lookup(codes: Tensor, table: Tensor) -> Tensor:
    return table[codes.long()]


def _fit(numbers: int, device: str) -> Case:
    x = _weights(numbers, device, torch.float32)
    return Case(
        f"fitted bias, {_name(RF8, x.dtype, numbers)}",
        ours=lambda: mini_float_bias(x, RF8[0]),
        peers={"abs().amax()": lambda: x.abs().amax()},
        floors={"amax()": x.amax},
        bytes_moved=x.nbytes,
    )
