"""Benchmarks of the codebook search: nearest codes, and draws of other codes by distance.

The goals are meant for two CPU cores; on CUDA the same cases run with more tokens, without goals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regularizers._bench import Case, Goal, ScalingCurve
from regularizers._bench.case import Call
from regularizers.ops import nearest_code, sample_code

CODES = 16384
TOKENS = 4096
SHARE = 10  # one token in so many is drawn, the rate of VQ-Seg
CHUNK = 256  # tokens whose distances the chunked peers hold


def cases(device: str, quick: bool) -> list[Case]:
    """List the cases; ``quick`` leaves out the slowest and every compiled peer."""
    tokens = TOKENS if device == "cpu" else 16 * TOKENS
    found = []
    for features in (64, 256):
        found.append(_nearest(tokens, CODES, features, device, compiled=not quick, goals=True))
        found.append(_draw(tokens // SHARE, CODES, features, device, goals=True))
    if not quick:
        found.append(_draw(tokens, CODES, 64, device))
    return found if device == "cpu" else [dataclasses.replace(case, goals=()) for case in found]


def scaling(device: str, quick: bool) -> list[ScalingCurve]:
    """List the scaling curves."""
    sizes = (1024, 4096, 16384) if quick else (256, 512, 1024, 2048, 4096, 8192, 16384)
    return [
        ScalingCurve(
            "nearest-over-k",
            f"nearest code, {TOKENS} tokens of 64 features",
            "codes",
            sizes,
            lambda codes: _nearest(TOKENS, codes, 64, device),
        ),
        ScalingCurve(
            "draw-over-k",
            f"draw of another code, {TOKENS // SHARE} tokens of 64 features",
            "codes",
            sizes,
            lambda codes: _draw(TOKENS // SHARE, codes, 64, device),
        ),
    ]


def _problem(tokens: int, codes: int, features: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens [n, C], a codebook [K, C] and codes [n]."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(tokens, features, generator=generator)
    codebook = torch.randn(codes, features, generator=generator) / features**0.5
    index = torch.randint(codes, (tokens,), generator=generator)
    return z.to(device), codebook.to(device), index.to(device)


def _distances(z: Tensor, codebook: Tensor) -> Tensor:
    """Squared distances, up to a constant of each token."""
    return torch.addmm(codebook.square().sum(1), z, codebook.T, alpha=-2)


def _eager_nearest(z: Tensor, codebook: Tensor) -> Tensor:
    return _distances(z, codebook).argmin(1)


def _chunked_nearest(z: Tensor, codebook: Tensor) -> Tensor:
    return torch.cat([_distances(rows, codebook).argmin(1) for rows in z.split(CHUNK)])


def _eager_draw(index: Tensor, codebook: Tensor) -> Tensor:
    score = _distances(codebook[index], codebook)
    score += torch.empty_like(score).exponential_().log_()
    return score.scatter_(1, index[:, None], float("inf")).argmin(1)


def _chunked_draw(index: Tensor, codebook: Tensor) -> Tensor:
    return torch.cat([_eager_draw(rows, codebook) for rows in index.split(CHUNK)])


def _products(z: Tensor, codebook: Tensor) -> dict[str, Call]:
    """Multiply tokens and codes, nothing else: at once, and in chunks that stay in cache."""
    whole = z.new_empty(len(z), len(codebook))
    chunk = z.new_empty(min(CHUNK, len(z)), len(codebook))

    def in_chunks() -> None:
        for rows in z.split(CHUNK):
            torch.mm(rows, codebook.T, out=chunk[: len(rows)])

    return {
        "product": lambda: torch.mm(z, codebook.T, out=whole),
        "product in chunks": in_chunks,
    }


def _nearest(
    tokens: int,
    codes: int,
    features: int,
    device: str,
    compiled: bool = False,
    goals: bool = False,
) -> Case:
    z, codebook, _ = _problem(tokens, codes, features, device)
    peers: dict[str, Call] = {
        "eager": lambda: _eager_nearest(z, codebook),
        "eager in chunks": lambda: _chunked_nearest(z, codebook),
        "cdist": lambda: torch.cdist(z, codebook).argmin(1),
    }
    if compiled:
        function = _compile(_eager_nearest)
        peers["torch.compile"] = lambda: function(z, codebook)
    return Case(
        f"nearest code, {tokens} tokens, {codes} codes, {features} features",
        ours=lambda: nearest_code(z, codebook),
        peers=peers,
        floors=_products(z, codebook),
        best_of={"best product": ["product", "product in chunks"]},
        goals=_goals("eager", "eager in chunks") if goals else (),
        flops=2 * tokens * codes * features,
    )


def _draw(tokens: int, codes: int, features: int, device: str, goals: bool = False) -> Case:
    _, codebook, index = _problem(tokens, codes, features, device)
    return Case(
        f"draw of another code, {tokens} tokens, {codes} codes, {features} features",
        ours=lambda: sample_code(index, codebook, seed=1),
        peers={
            "eager": lambda: _eager_draw(index, codebook),
            "eager in chunks": lambda: _chunked_draw(index, codebook),
        },
        floors=_products(codebook[index], codebook),
        best_of={"best product": ["product", "product in chunks"]},
        goals=_goals("eager", "eager in chunks") if goals else (),
        flops=2 * tokens * codes * features,
    )


def _goals(*peers: str) -> tuple[Goal, ...]:
    faster = tuple(Goal(peer, at_most=1.0) for peer in peers)
    return (*faster, Goal("best product", at_most=1.3), Goal("eager", 0.25, quantity="memory"))


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # fullgraph: past the recompilation limit an error, never a silent fall back to eager.
    return torch.compile(function, fullgraph=True, dynamic=False)
