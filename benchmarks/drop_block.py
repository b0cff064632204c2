"""Benchmarks of DropBlock: one pass against the eager max-pooling form, and a copy of x.

The goals are meant for two CPU cores; on CUDA the same cases run at larger sizes, without goals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from regularizers._bench import Case, Goal, ScalingCurve
from regularizers.ops import drop_block

P, SIZE = 0.1, 7


def cases(device: str, quick: bool) -> list[Case]:
    """List the cases; ``quick`` leaves out the slowest and every compiled peer."""
    batch = 32 if device == "cpu" else 256
    goals = [Goal("eager", at_most=1 / 2)]
    found = [
        _block((batch, 64, 56, 56), device, compiled=not quick, goals=goals),
        _block((batch, 256, 14, 14), device, compiled=not quick, goals=goals),
    ]
    if not quick:
        found += [
            _block((batch, 64, 56, 56), device, shared=False, goals=goals),
            _block((batch, 64, 56, 56), device, channels_last=True),
            _block((batch, 256, 14, 14), device, dtype=torch.bfloat16),
            _block((batch, 64, 56, 56), device, backward=True),
        ]
    return found if device == "cpu" else [dataclasses.replace(case, goals=()) for case in found]


def scaling(device: str, quick: bool) -> list[ScalingCurve]:
    """List the scaling curves."""
    sides = (14, 28, 56) if quick else (7, 14, 28, 56, 112)
    blocks = (1, 7, 15) if quick else (1, 3, 5, 7, 9, 11, 15, 21, 31)
    return [
        ScalingCurve(
            "block-over-side",
            "drop_block, x [16, 64, side, side]",
            "height and width",
            sides,
            lambda side: _block((16, 64, side, side), device),
        ),
        ScalingCurve(
            "block-over-block-size",
            "drop_block, x [16, 64, 56, 56]",
            "block_size",
            blocks,
            lambda size: _block((16, 64, 56, 56), device, block_size=size),
        ),
    ]


def _eager(x: Tensor, block_size: int, shared: bool) -> Tensor:
    """DropBlock as torchvision computes it: seeds where a block fits, padding, max pooling."""
    batch, channels, height, width = x.shape
    places = (height - block_size + 1) * (width - block_size + 1)
    gamma = P * height * width / (block_size**2 * places)
    shape = (batch, 1 if shared else channels, height - block_size + 1, width - block_size + 1)
    noise = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(gamma)
    noise = F.pad(noise, [block_size // 2] * 4)
    noise = 1 - F.max_pool2d(noise, block_size, stride=1, padding=block_size // 2)
    return x * noise * (noise.numel() / (1e-6 + noise.sum()))


def _block(
    shape: tuple[int, int, int, int],
    device: str,
    *,
    block_size: int = SIZE,
    shared: bool = True,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
    backward: bool = False,
    compiled: bool = False,
    goals: Sequence[Goal] = (),
) -> Case:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=layout)
    block_size = min(block_size, shape[2] - 1 + shape[2] % 2)  # the eager form has to fit

    def ours(x: Tensor) -> Tensor:
        return drop_block(x, P, block_size, gamma="exact", shared_channels=shared)

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": ours,
        "eager": lambda x: _eager(x, block_size, shared),
    }
    if compiled:
        function = torch.compile(_eager, fullgraph=True, dynamic=False)
        ways["torch.compile"] = lambda x: function(x, block_size, shared)
    out, grad = torch.empty_like(x), torch.randn_like(x)
    x.requires_grad_(backward)

    def call(way: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        if not backward:
            return lambda: way(x)
        return lambda: torch.autograd.grad(way(x), x, grad)

    passes = 2 if backward else 1

    def copies() -> None:
        for _ in range(passes):
            out.copy_(grad)

    details = [
        "channels_last" if channels_last else "",
        "" if shared else "a mask a channel",
        str(dtype).removeprefix("torch.") if dtype != torch.float32 else "",
        "forward + backward" if backward else "",
    ]
    calls = {name: call(way) for name, way in ways.items()}
    return Case(
        ", ".join(["drop_block", *filter(None, details), f"x {list(shape)}"]),
        ours=calls.pop("ours"),
        peers=calls,
        floors={"copy": copies},
        goals=goals,
        bytes_moved=2 * passes * x.nbytes,
    )
