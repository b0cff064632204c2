"""Benchmarks of the log-sum-exp over pairs, forward and backward, against stored scores.

Floor, in multiply-adds of N M D: the scores once forward and once backward, and a product for the
gradient of each side: 4. Where y is x a score is that of two pairs: 1/2 + 1/2 + 1 = 2. Besides N M
exponentials each way. The goals are meant for two CPU cores; on CUDA the same cases run without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from regularizers._bench import Case, Goal, ScalingCurve
from regularizers._bench.case import Call
from regularizers.ops import SameLabel, pairwise_logsumexp

FEATURES = 128
POINTS = 8192
CLASSES = 100
# Forward and backward with stored scores cost 3 products.
PRODUCTS = 3


def cases(device: str, quick: bool) -> list[Case]:
    """List the cases; ``quick`` takes fewer points and leaves out every compiled peer."""
    points = 2048 if quick else POINTS
    found = [
        _info_nce(points, device, compiled=not quick, goals=not quick),
        _dispersive(points, device, compiled=not quick, goals=not quick),
        _same_label(points, device, compiled=not quick, goals=not quick),
    ]
    return found if device == "cpu" else [dataclasses.replace(case, goals=()) for case in found]


def scaling(device: str, quick: bool) -> list[ScalingCurve]:
    """List the scaling curves."""
    sizes = (512, 1024, 2048) if quick else (512, 1024, 2048, 4096, 8192, 16384)
    return [
        ScalingCurve(
            "pairs-over-n",
            f"dispersive log-sum-exp of {FEATURES} features, forward and backward",
            "points",
            sizes,
            lambda points: _dispersive(points, device),
        ),
    ]


def _points(points: int, device: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = functional.normalize(torch.randn(points, FEATURES, generator=generator))
    return drawn.to(device).requires_grad_()


def _step(function: Callable[..., Tensor], *leaves: Tensor) -> Call:
    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        function(*leaves).mean().backward()

    return call


def _case(
    name: str,
    ours: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    leaves: tuple[Tensor, ...],
    compiled: bool,
    goals: tuple[Goal, ...],
) -> Case:
    peers = {"eager": _step(eager, *leaves)}
    if compiled:
        peers["torch.compile"] = _step(_compile(eager), *leaves)
    x, y = leaves[0].detach(), leaves[-1].detach()
    return Case(
        f"{name}, {len(x)} points, {FEATURES} features, forward and backward",
        ours=_step(ours, *leaves),
        peers=peers,
        floors=_floors(x, y),
        goals=goals,
        flops=2 * len(leaves) * 2 * len(x) * len(y) * FEATURES,
    )


def _goals(times: float) -> tuple[Goal, ...]:
    """Return the goals of a case; two sides cost 4 products where stored scores cost 3."""
    return Goal("eager", 1 / times), Goal("eager", 0.1, quantity="memory")


def _floors(x: Tensor, y: Tensor) -> dict[str, Call]:
    """Do the products of stored scores alone, and one exponential a pair, in memory made before."""
    scores = x.new_empty(len(x), len(y))
    gradient = torch.empty_like(x)

    def products() -> None:
        torch.mm(x, y.T, out=scores)
        for _ in range(PRODUCTS - 1):
            torch.mm(scores, y, out=gradient)

    def exponentials() -> None:
        torch.exp(scores.fill_(-1.0), out=scores)

    return {"products alone": products, "exponentials alone": exponentials}


def _info_nce(points: int, device: str, compiled: bool = False, goals: bool = False) -> Case:
    def ours(x: Tensor, y: Tensor) -> Tensor:
        return pairwise_logsumexp(x, y, scale=10.0).logsumexp - 10.0 * (x * y).sum(1)

    def eager(x: Tensor, y: Tensor) -> Tensor:
        target = torch.arange(x.shape[0], device=x.device)
        return functional.cross_entropy(10.0 * (x @ y.T), target, reduction="none")

    leaves = _points(points, device, 0), _points(points, device, 1)
    return _case("InfoNCE", ours, eager, leaves, compiled, _goals(2) if goals else ())


def _off_diagonal(scores: Tensor) -> Tensor:
    diagonal = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    return scores.masked_fill(diagonal, -torch.inf)


def _dispersive(points: int, device: str, compiled: bool = False, goals: bool = False) -> Case:
    def ours(x: Tensor) -> Tensor:
        return pairwise_logsumexp(x, kind="sqdist", scale=-2.0).logsumexp

    def eager(x: Tensor) -> Tensor:
        squares = x.square().sum(1)
        distances = (squares[:, None] + squares - 2 * (x @ x.T)).clamp_min(0)
        return torch.logsumexp(_off_diagonal(-2.0 * distances), 1)

    leaves = (_points(points, device, 0),)
    return _case("dispersive", ours, eager, leaves, compiled, _goals(3) if goals else ())


def _same_label(points: int, device: str, compiled: bool = False, goals: bool = False) -> Case:
    labels = (torch.arange(points) % CLASSES).to(device)

    def ours(x: Tensor) -> Tensor:
        return pairwise_logsumexp(x, scale=10.0, pairs=SameLabel(labels)).logsumexp

    def eager(x: Tensor) -> Tensor:
        other = labels[:, None] != labels
        scores = _off_diagonal(10.0 * (x @ x.T))
        return torch.logsumexp(scores.masked_fill(other, -torch.inf), 1)

    leaves = (_points(points, device, 0),)
    return _case("same label", ours, eager, leaves, compiled, _goals(3) if goals else ())


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # fullgraph: past the recompilation limit an error, never a silent fall back to eager.
    return torch.compile(function, fullgraph=True, dynamic=False)
