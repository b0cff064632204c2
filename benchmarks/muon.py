"""Benchmarks of Muon: a step against torch's, and against the products of its iteration alone.

The goals are meant for two CPU cores; on CUDA the same cases run at larger sizes, without goals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from regularizers._bench import Case, Goal, ScalingCurve
from regularizers._bench.case import Call
from regularizers.optim import Muon, newton_schulz

STEPS = 5
LR, MOMENTUM = 0.02, 0.95


def cases(device: str, quick: bool) -> list[Case]:
    """List the cases; ``quick`` leaves out the largest matrices."""
    factor = 1 if device == "cpu" else 4
    found = [
        _step([(32, 32)] * 200, device, goals=[Goal("torch.optim.Muon", at_most=0.5)]),
        _step([(64, 128), (128, 64)] * 24, device, goals=[Goal("torch.optim.Muon", at_most=0.75)]),
        _iteration((8, 128, 256), device, torch.float32),
    ]
    if not quick:
        sizes = [(512 * factor, 512 * factor)] * 4
        found += [
            _step(sizes, device, goals=[Goal("torch.optim.Muon", at_most=1.1)]),
            _iteration((4, 512 * factor, 512 * factor), device, torch.float32),
            _iteration((4, 512 * factor, 512 * factor), device, torch.bfloat16),
        ]
    return found if device == "cpu" else [dataclasses.replace(case, goals=()) for case in found]


def scaling(device: str, quick: bool) -> list[ScalingCurve]:
    """List the scaling curves."""
    return [
        ScalingCurve(
            "step-over-side",
            "a step of Muon, 8 square matrices",
            "side",
            (32, 128) if quick else (32, 64, 128, 256, 512),
            lambda side: _step([(side, side)] * 8, device),
        ),
        ScalingCurve(
            "step-over-matrices",
            "a step of Muon, matrices of 32 x 32",
            "matrices",
            (4, 64) if quick else (1, 4, 16, 64, 256),
            lambda count: _step([(32, 32)] * count, device),
        ),
    ]


def _parameters(shapes: Sequence[tuple[int, int]], device: str) -> list[torch.nn.Parameter]:
    params = []
    for shape in shapes:
        param = torch.nn.Parameter(torch.randn(shape, device=device))
        param.grad = torch.randn(shape, device=device)
        params.append(param)
    return params


def _products(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Call:
    """Compute the three products of every iteration, from and into memory that is there."""
    *batch, m, n = shape
    m, n = min(m, n), max(m, n)
    x = torch.randn(*batch, m, n, device=device).to(dtype).reshape(-1, m, n)
    x /= x.norm()
    gram, square = torch.empty(2, len(x), m, m, dtype=dtype, device=device)
    out = torch.empty_like(x)

    def call() -> None:
        for _ in range(STEPS):
            torch.bmm(x, x.mT, out=gram)
            torch.bmm(gram, gram, out=square)
            torch.bmm(square, x, out=out)

    return call


def _step(shapes: Sequence[tuple[int, int]], device: str, *, goals: Sequence[Goal] = ()) -> Case:
    """Take a step of matrices that are all of one shape, or of it and its transpose."""
    ours = Muon(_parameters(shapes, device), lr=LR, momentum=MOMENTUM)
    peers: dict[str, Call] = {}
    if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
        theirs = torch.optim.Muon(
            _parameters(shapes, device), lr=LR, momentum=MOMENTUM, weight_decay=0.0
        )
        peers["torch.optim.Muon"] = theirs.step
    else:
        goals = ()
    m, n = min(shapes[0]), max(shapes[0])
    return Case(
        f"Muon, {len(shapes)} matrices of {m} x {n}",
        ours=ours.step,
        peers=peers,
        floors={"products": _products((len(shapes), m, n), torch.bfloat16, device)},
        goals=goals,
        flops=len(shapes) * STEPS * (4 * m * m * n + 2 * m**3),
    )


def _plain_iteration(x: Tensor) -> Tensor:
    """Iterate as the authors' code does."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _iteration(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> Case:
    x = torch.randn(shape, device=device).to(dtype)
    batch, m, n = shape
    return Case(
        f"newton_schulz, {str(dtype).removeprefix('torch.')}, {list(shape)}",
        ours=lambda: newton_schulz(x, dtype=dtype),
        peers={"eager": lambda: _plain_iteration(x)},
        floors={"products": _products(shape, dtype, device)},
        flops=batch * STEPS * (4 * m * m * n + 2 * m**3),
    )
