"""Benchmarks of gradient dropout's gate: one pass against the formula in PyTorch.

The goals are meant for two CPU cores; on CUDA the same cases run at larger sizes, without goals.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from regularizers._bench import Case, Goal, ScalingCurve
from regularizers._bench.case import Call
from regularizers.ops import gradient_gate

NUMBERS = 2**22


def cases(device: str, quick: bool) -> list[Case]:
    """List the cases; ``quick`` leaves out the compiled peer."""
    numbers = NUMBERS if device == "cpu" else 16 * NUMBERS
    found = [
        _gate(numbers, device, torch.float32, compiled=not quick),
        _gate(numbers, device, torch.bfloat16),
    ]
    return found if device == "cpu" else [dataclasses.replace(case, goals=()) for case in found]


def scaling(device: str, quick: bool) -> list[ScalingCurve]:
    """List the scaling curves."""
    return [
        ScalingCurve(
            "gate-over-numbers",
            "gradient_gate, float32",
            "numbers",
            (2**12, 2**18) if quick else tuple(2**k for k in range(10, 25, 2)),
            lambda n: _gate(n, device, torch.float32),
        )
    ]


def _eager(g_task: Tensor, g_reg: Tensor) -> Tensor:
    """Gate as the authors' code does, in place where that is possible."""
    size = g_task.abs()
    share = g_task.sign().mul_(g_reg).add_(size).div_(size.add_(g_reg.abs()).add_(1e-8))
    keep = torch.rand_like(g_task) < share.mul_(0.5).add_(0.5)
    return torch.where(keep, g_task, 0)


def _gate(numbers: int, device: str, dtype: torch.dtype, compiled: bool = False) -> Case:
    g_task, g_reg = (torch.randn(numbers, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(g_task)
    peers: dict[str, Call] = {"eager": lambda: _eager(g_task, g_reg)}
    goals = [Goal("eager", at_most=1 / 4), Goal("add, in place", at_most=4)]
    if compiled:
        together = torch.compile(_eager, fullgraph=True, dynamic=False)
        peers["torch.compile"] = lambda: together(g_task, g_reg)
        goals.append(Goal("torch.compile", at_most=1))
    return Case(
        f"gradient_gate, {str(dtype).removeprefix('torch.')}, {numbers} numbers",
        ours=lambda: gradient_gate(g_task, g_reg),
        peers=peers,
        floors={"add, in place": lambda: torch.add(g_task, g_reg, out=out)},
        goals=goals,
        bytes_moved=3 * g_task.nbytes,
    )
