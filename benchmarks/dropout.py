"""Benchmarks of dropout: dropout_samples and multi_sample_dropout_cross_entropy.

The goals hold on two CPU cores and are those of docs/design.md; on CUDA the same cases run at larger sizes, without goals.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from regularizers._bench import Case, Goal, ScalingCurve
from regularizers._bench.case import Call
from regularizers._bench.floors import copy, fresh_fill, fresh_fill_huge_pages
from regularizers.ops import dropout_samples, multi_sample_dropout_cross_entropy

P = 0.5
M = 8


def cases(device: str, quick: bool) -> list[Case]:
    """List the cases."""
    large, small = ((512, 2048), (128, 2048)) if device == "cpu" else ((4096, 4096), (512, 2048))
    classes = (10, 100) if quick else (10, 100, 1000)
    found = [_samples(device, large, quick), _samples_recycled(device, small, quick)]
    if not quick:
        found += [_samples_backward(device, shape) for shape in (large, small)]
    found += [_loss(device, large, count, quick=quick) for count in classes]
    if not quick:
        found.append(_loss(device, large, 100, dtype=torch.bfloat16))
    return [*found, _loss_memory(device, quick)]


def scaling(device: str, quick: bool) -> list[ScalingCurve]:
    """List the scaling curves."""
    features = 2048 if device == "cpu" else 4096
    batches = (64, 256, 1024) if quick else (16, 64, 256, 512, 1024, 2048)
    class_counts = (10, 30, 100) if quick else (10, 30, 100, 300, 1000)
    curves = [
        ScalingCurve(
            "samples-over-batch",
            f"dropout_samples, M = {M}, x [B, {features}]",
            "batch size B",
            batches,
            lambda batch: _samples(device, (batch, features), quick=True, goals=False),
        ),
        ScalingCurve(
            "loss-over-classes",
            f"multi_sample_dropout_cross_entropy, forward + backward, M = {M}, x [512, {features}]",
            "classes C",
            class_counts,
            lambda classes: _loss(device, (512, features), classes, quick=True, goals=False),
        ),
    ]
    if not quick:
        curves.append(
            ScalingCurve(
                "loss-memory-over-samples",
                "multi_sample_dropout_cross_entropy, forward + backward, x [1024, 1024], C = 1000",
                "dropout samples M",
                (1, 2, 4, 8, 16, 32),
                lambda num_samples: _loss_memory_point(device, num_samples),
            )
        )
    return curves


# --- dropout_samples ------------------------------------------------------------------------------


def _eager_samples(x: Tensor) -> Tensor:
    return torch.stack([F.dropout(x, P) for _ in range(M)])


def _samples(device: str, shape: tuple[int, int], quick: bool, *, goals: bool = True) -> Case:
    """Output too large for the allocator to recycle: every call pays for fresh pages."""
    x = torch.randn(shape, device=device)
    bytes_moved = (1 + M) * x.nbytes
    floors = {"fill": fresh_fill(M, *shape, device=device), "copy, as many bytes": copy(bytes_moved, device=device)}
    if device == "cpu":
        floors["fill, huge pages"] = fresh_fill_huge_pages(M, *shape)
    return Case(
        f"dropout_samples, M = {M}, x {list(shape)}",
        ours=lambda: dropout_samples(x, P, M),
        peers=_with_compiled(lambda call: lambda: call(x), _eager_samples, quick),
        floors=floors,
        goals=_on_cpu(device and goals, Goal("eager", at_most=1 / 7), Goal("fill", at_most=1.15)),
        bytes_moved=bytes_moved,
    )
