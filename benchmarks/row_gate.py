"""Benchmarks of stochastic depth: residual + gated branch in one pass against the eager formula.

The goals are meant for two CPU cores; on CUDA the same cases run at larger sizes, without goals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from regularizers._bench import Case, Goal, ScalingCurve
from regularizers.dropout import drop_path_compact
from regularizers.ops import row_gate

P = 0.2


def cases(device: str, quick: bool) -> list[Case]:
    """List the cases; ``quick`` leaves out the slowest and every compiled peer."""
    large = (64, 197, 384) if device == "cpu" else (512, 197, 768)
    found = [
        _gate(large, device, compiled=not quick, goals=[Goal("eager", at_most=1)]),
        _compact((64, 384), device, 0.5, goals=[Goal("dense", at_most=0.75)]),
    ]
    if not quick:
        found += [
            _gate(large, device, backward=True),
            _gate(large, device, dtype=torch.bfloat16),
        ]
    return found if device == "cpu" else [dataclasses.replace(case, goals=()) for case in found]


def scaling(device: str, quick: bool) -> list[ScalingCurve]:
    """List the scaling curves."""
    return [
        ScalingCurve(
            "gate-over-batch",
            "row_gate with a residual, x [B, 197, 384]",
            "batch size B",
            (8, 32) if quick else (2, 8, 32, 128),
            lambda batch: _gate((batch, 197, 384), device),
        ),
        ScalingCurve(
            "compact-over-keep",
            "drop_path_compact around a two-layer branch, forward + backward",
            "kept samples, per cent",
            (30, 70) if quick else (10, 30, 50, 70, 90),
            lambda kept: _compact((64, 384), device, 1 - kept / 100),
        ),
    ]


def _eager(x: Tensor, residual: Tensor) -> Tensor:
    """Drop path as timm computes it."""
    keep = 1 - P
    mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep).div_(keep)
    return residual + x * mask


def _gate(
    shape: tuple[int, ...],
    device: str,
    *,
    dtype: torch.dtype = torch.float32,
    backward: bool = False,
    compiled: bool = False,
    goals: Sequence[Goal] = (),
) -> Case:
    x, residual, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "ours": lambda x, r: row_gate(x, P, r),
        "eager": _eager,
    }
    if compiled:
        ways["torch.compile"] = torch.compile(_eager, fullgraph=True, dynamic=False)
    out = torch.empty_like(x)
    x.requires_grad_(backward)
    residual.requires_grad_(backward)

    def call(way: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        if not backward:
            return lambda: way(x, residual)
        return lambda: torch.autograd.grad(way(x, residual), (x, residual), grad)

    def floor() -> None:
        torch.add(grad, grad, out=out)
        if backward:
            out.copy_(grad)

    name = f"row_gate with a residual, {'forward + backward, ' if backward else ''}x {list(shape)}"
    calls = {key: call(way) for key, way in ways.items()}
    return Case(
        name if dtype == torch.float32 else f"{name}, bfloat16",
        ours=calls.pop("ours"),
        peers=calls,
        floors={"add, in place" if not backward else "add + copy": floor},
        goals=goals,
        bytes_moved=(5 if backward else 3) * x.nbytes,
    )


def _compact(shape: tuple[int, int], device: str, p: float, goals: Sequence[Goal] = ()) -> Case:
    batch, features = shape
    branch = nn.Sequential(
        nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features)
    ).to(device)
    x = torch.randn(batch, 49, features, device=device)

    def step(run: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(run().sum(), list(branch.parameters()))

    return Case(
        f"drop_path_compact, forward + backward, p = {p:g}, x {list(x.shape)}",
        ours=step(lambda: drop_path_compact(branch, x, p, residual=x)),
        peers={"dense": step(lambda: row_gate(branch(x), p, x))},
        floors={
            "the branch on the kept share": step(
                lambda: branch(x[: max(1, round(batch * (1 - p)))])
            )
        },
        goals=goals,
    )
