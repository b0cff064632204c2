"""Benchmarks of the StableMax loss: forward and backward against softmax and the plain formula.

There is no kernel of ours behind it: the cases say what that costs. On CUDA they run at larger
sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from regularizers._bench import Case, ScalingCurve
from regularizers._bench.floors import copy
from regularizers.optim import stablemax_cross_entropy


def cases(device: str, quick: bool) -> list[Case]:
    """List the cases; ``quick`` leaves out the vocabulary-sized ones."""
    rows = 2048 if device == "cpu" else 16384
    found = [
        _loss((rows, 113), device, torch.float64),
        _loss((rows, 113), device, None, compiled=not quick),
    ]
    if not quick:
        found += [
            _loss((rows // 8, 32000), device, None, compiled=True),
            _loss((rows // 8, 32000), device, torch.float64),
        ]
    return found


def scaling(device: str, quick: bool) -> list[ScalingCurve]:
    """List the scaling curves."""
    return [
        ScalingCurve(
            "loss-over-classes",
            "stablemax_cross_entropy, forward + backward, dtype=None, 512 rows",
            "classes",
            (64, 1024) if quick else (16, 128, 1024, 8192, 32768),
            lambda classes: _loss((512, classes), device, None),
        )
    ]


def _formula(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the loss as the authors' code does, with logarithms of probabilities."""
    s = torch.where(logits >= 0, logits + 1, 1 / (1 - logits + 1e-30))
    log_p = torch.log(s / s.sum(-1, keepdim=True))
    return -log_p.gather(1, target[:, None]).mean()


def _loss(
    shape: tuple[int, int], device: str, dtype: torch.dtype | None, compiled: bool = False
) -> Case:
    logits = (3 * torch.randn(shape, device=device)).requires_grad_()
    target = torch.randint(shape[1], shape[:1], device=device)

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(logits, target), logits)

    def ours(z: Tensor, y: Tensor) -> Tensor:
        return stablemax_cross_entropy(z, y, dtype=dtype)

    def authors(z: Tensor, y: Tensor) -> Tensor:
        return _formula(z if dtype is None else z.to(dtype), y)

    peers = {"F.cross_entropy": step(F.cross_entropy), "authors' formula": step(authors)}
    if compiled:
        peers["ours, torch.compile"] = step(torch.compile(ours, fullgraph=True, dynamic=False))
    # Read the logits twice, forward and backward, and write their gradient.
    moved = 3 * logits.nbytes
    return Case(
        f"StableMax loss, forward + backward, {'float32' if dtype is None else 'float64'}, "
        f"{list(shape)}",
        ours=step(ours),
        peers=peers,
        floors={"copy": copy(moved, device=device)},
        bytes_moved=moved,
    )
