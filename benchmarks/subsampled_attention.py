"""Benchmarks of attention to n of N keys: the gathered kernel, sampling included, and windows.

The goals are meant for two CPU cores; on CUDA the same cases run at larger sizes, without goals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from regularizers._bench import Case, Goal, ScalingCurve
from regularizers._bench.case import Call
from regularizers.dropout import sample_keys, subsampled_attention
from regularizers.ops import gathered_attention

TOKENS = 2048


def cases(device: str, quick: bool) -> list[Case]:
    """List the cases; ``quick`` leaves out most ratios."""
    tokens = TOKENS if device == "cpu" else 4 * TOKENS
    parts = (4,) if quick else (4, 16)
    found = []
    for part in parts:
        # n / N of the time, and a quarter of it for what does not shrink: queries and results.
        at_most = 1.25 / part
        for backward in (False, True):
            goals = [Goal("dense", at_most=at_most), Goal("gather", at_most=1.0)]
            if backward:
                goals.append(Goal("dense", at_most=max(at_most, 1.0), quantity="memory"))
            found.append(_unbiased(tokens, tokens // part, device, backward, goals=goals))
    found.append(_causal(tokens, tokens // 4, device))
    found.append(_local(tokens, tokens // 4, device))
    found.append(_draw(tokens, tokens // 4, device))
    return found if device == "cpu" else [dataclasses.replace(case, goals=()) for case in found]


def scaling(device: str, quick: bool) -> list[ScalingCurve]:
    """List the scaling curves."""
    tokens = TOKENS // 4 if quick else TOKENS
    counts = tuple(tokens // part for part in (16, 8, 4, 2, 1))
    kinds: dict[str, tuple[str, Callable[[int], Case]]] = {
        "training": (
            "forward and backward",
            lambda n: _unbiased(tokens, n, device, True, masked=False),
        ),
        "local": ("windows, forward and backward", lambda n: _local(tokens, n, device)),
    }
    return [
        ScalingCurve(
            f"{name}-over-n", f"{title}, N = {tokens}, B = 2, H = 8, E = 64", "n", counts, case
        )
        for name, (title, case) in kinds.items()
    ]


def _qkv(tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 8, tokens, 64, generator=generator).to(device)
    return q, k, v


def _timed(function: Call, leaves: tuple[Tensor, ...], backward: bool) -> Call:
    """Call a function, and its backward pass under a fixed cotangent."""
    if not backward:
        return function
    for leaf in leaves:
        leaf.requires_grad_()
    cotangent = torch.ones_like(leaves[0])

    def call() -> None:
        result = function()
        assert isinstance(result, Tensor)
        torch.autograd.grad(result, leaves, cotangent)

    return call


def _gather(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """Gather the keys and attend densely: the short way without this library."""
    place = keys[:, None, :, None].expand(*q.shape[:2], -1, q.shape[3])
    return F.scaled_dot_product_attention(q, k.gather(2, place), v.gather(2, place))


def _unbiased(
    tokens: int,
    n: int,
    device: str,
    backward: bool,
    *,
    masked: bool = True,
    goals: list[Goal] | None = None,
) -> Case:
    """Time attention to given keys; the masks of a peer are ready beforehand, too."""
    leaves = _qkv(tokens, device)
    q, k, v = leaves
    keys = sample_keys(2, tokens, n, seed=0, device=device)
    peers: dict[str, Call] = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v),
        "gather": lambda: _gather(q, k, v, keys),
    }
    # Two products forward, five in the backward pass.
    operations = (14 if backward else 4) * q.numel() * n
    floors: dict[str, Call] = {}
    if masked:
        floors["as many operations in large products"] = _products(operations, device)
        mask = torch.zeros(2, tokens, dtype=torch.bool, device=device).scatter(1, keys, True)
        mask = mask[:, None, None].expand(2, 1, tokens, tokens)
        peers["boolean mask"] = lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return Case(
        f"attention to n = {n} of {tokens} keys{', forward and backward' if backward else ''}",
        ours=_timed(lambda: gathered_attention(q, k, v, keys), leaves, backward),
        peers={name: _timed(peer, leaves, backward) for name, peer in peers.items()},
        floors=floors,
        goals=goals or (),
        flops=operations,
    )


def _products(operations: int, device: str) -> Call:
    """Do as many operations in products of a size that libraries do best."""
    size = 512
    left, right = torch.randn(2, size, size, device=device)
    out = torch.empty(size, size, device=device)
    count = max(1, round(operations / (2 * size**3)))

    def call() -> None:
        for _ in range(count):
            torch.mm(left, right, out=out)

    return call


def _causal(tokens: int, n: int, device: str) -> Case:
    leaves = _qkv(tokens, device)
    q, k, v = leaves
    keys = sample_keys(2, tokens, n, seed=0, device=device)
    own = torch.ones(2, tokens, dtype=torch.bool, device=device).scatter(1, keys, False)
    visible = (~own)[:, None, None].expand(2, 1, tokens, tokens).tril()
    visible = visible | torch.eye(tokens, dtype=torch.bool, device=device)
    peers: dict[str, Call] = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "boolean mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=visible),
    }
    return Case(
        f"causal, the own key and n = {n} of {tokens}, forward and backward",
        ours=_timed(
            lambda: gathered_attention(q, k, v, keys, own=own, is_causal=True), leaves, True
        ),
        peers={name: _timed(peer, leaves, True) for name, peer in peers.items()},
    )


def _local(tokens: int, window: int, device: str) -> Case:
    """Time the whole call: jitter, windows and attention."""
    leaves = _qkv(tokens, device)
    q, k, v = leaves
    return Case(
        f"local, window {window} of {tokens}, forward and backward",
        ours=_timed(
            lambda: subsampled_attention(q, k, v, window=window, mode="local"), leaves, True
        ),
        peers={"dense": _timed(lambda: F.scaled_dot_product_attention(q, k, v), leaves, True)},
    )


def _draw(tokens: int, n: int, device: str) -> Case:
    batch = 32
    return Case(
        f"draw n = {n} of {tokens} keys, {batch} samples",
        ours=lambda: sample_keys(batch, tokens, n, device=device),
        peers={
            "randperm a sample": lambda: torch.stack(
                [torch.randperm(tokens, device=device)[:n] for _ in range(batch)]
            ),
            "rand and topk": lambda: torch.rand(batch, tokens, device=device).topk(n).indices,
        },
    )
