"""Benchmarks of sparse transport: one evaluation of a semi-dual, a whole solution, projections.

The goals are meant for two CPU cores; on CUDA the same cases run at larger sizes, without goals.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from regularizers._bench import Case, Goal, ScalingCurve
from regularizers._bench.case import Call
from regularizers.ops import sparse_projection, transport_dual
from regularizers.transport import SparsityConstrained, regularized_ot

SIZE = 1024


def cases(device: str, quick: bool) -> list[Case]:
    """List the cases; ``quick`` leaves out the slowest and every compiled peer."""
    size = SIZE if device == "cpu" else 8 * SIZE
    found = []
    for k in (2, 10):
        found.append(_evaluation(size, k, device, compiled=not quick))
        found.append(_solution(SIZE, k, device, goals=[Goal("POT", at_most=1 / 15)]))
    found.append(_projection((size, size), 10, device, compiled=not quick))
    if not quick:
        found += [
            _evaluation(size, None, device, compiled=True),
            _projection((size, size), None, device, compiled=True),
        ]
    return found if device == "cpu" else [dataclasses.replace(case, goals=()) for case in found]


def scaling(device: str, quick: bool) -> list[ScalingCurve]:
    """List the scaling curves."""
    sizes = (256, 512, 1024) if quick else (128, 256, 512, 1024, 2048, 4096)
    counts = (2, 16, 128) if quick else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    return [
        ScalingCurve(
            "evaluation-over-n",
            "semi-dual, value and gradient, k = 10, n = m",
            "n",
            sizes,
            lambda n: _evaluation(n, 10, device),
        ),
        ScalingCurve(
            "evaluation-over-k",
            f"semi-dual, value and gradient, n = m = {SIZE}",
            "k",
            counts,
            lambda k: _evaluation(SIZE, k, device),
        ),
        ScalingCurve(
            "projection-over-k",
            f"projection on the simplex with k nonzeros, v [{SIZE}, {SIZE}]",
            "k",
            counts,
            lambda k: _projection((SIZE, SIZE), k, device),
        ),
    ]


def _problem(n: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return alpha [n], the cost [n, n] and masses [n]."""
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(n, n, generator=generator)
    alpha = 0.01 * torch.rand(n, generator=generator)
    return alpha.to(device), cost.to(device), torch.full((n,), 1 / n, device=device)


def _eager_semi_dual(
    alpha: Tensor, cost: Tensor, a: Tensor, b: Tensor, gamma: float, k: int
) -> tuple[Tensor, Tensor]:
    """Value and gradient of the semi-dual by top-k, cumulative sums and a scatter."""
    s = alpha - cost
    top, order = s.topk(k, -1)
    count = torch.arange(1, k + 1, device=s.device)
    means = (top.cumsum(-1) - gamma * b[:, None]) / count
    support = (top > means).sum(-1, keepdim=True)
    t = (top - means.gather(-1, support - 1)).relu() / gamma
    rows = torch.zeros_like(alpha).scatter_add(0, order.flatten(), t.flatten())
    return alpha @ a - (top * t - gamma / 2 * t.square()).sum(), a - rows


def _read(cost: Tensor) -> Call:
    """Read the cost once, nothing else: what every evaluation has to do."""
    return lambda: torch.amax(cost)


def _evaluation(n: int, k: int | None, device: str, compiled: bool = False) -> Case:
    alpha, cost, mass = _problem(n, device)
    count = n if k is None else min(k, n)
    peers = {"eager": lambda: _eager_semi_dual(alpha, cost, mass, mass, 1.0, count)}
    if compiled:
        function = _compile(_eager_semi_dual)
        peers["torch.compile"] = lambda: function(alpha, cost, mass, mass, 1.0, count)
    return Case(
        f"semi-dual, value and gradient, k = {count}, n = m = {n}",
        ours=lambda: transport_dual(alpha, cost, mass, mass, k=k),
        peers=peers,
        floors={"one read of the cost": _read(cost)},
        bytes_moved=cost.nbytes,
    )


def _solution(n: int, k: int, device: str, goals: Sequence[Goal] = ()) -> Case:
    """Solve from zeros with the defaults of both; POT stops earlier, at a worse objective."""
    _, cost, mass = _problem(n, device)
    regularizer = SparsityConstrained(1.0, k)
    double = cost.double().cpu().numpy(), mass.double().cpu().numpy()

    def pot() -> Any:
        import ot  # here: its import takes seconds

        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ot.smooth.smooth_ot_semi_dual(
                double[1], double[1], double[0], 1.0, "sparsity_constrained", k
            )

    iterations = 0

    def reads() -> None:
        nonlocal iterations
        iterations = iterations or int(regularized_ot(cost, regularizer=regularizer).n_iter)
        for _ in range(iterations):
            torch.amax(cost)

    return Case(
        f"regularized_ot, SparsityConstrained(1, {k}), n = m = {n}",
        ours=lambda: regularized_ot(cost, regularizer=regularizer),
        peers={"POT": pot},
        floors={"one read of the cost an iteration": reads},
        goals=goals,
    )


def _eager_projection(v: Tensor, k: int) -> Tensor:
    top, order = v.topk(k, -1)
    count = torch.arange(1, k + 1, device=v.device)
    means = (top.cumsum(-1) - 1) / count
    support = (top > means).sum(-1, keepdim=True)
    kept = (top - means.gather(-1, support - 1)).relu()
    return torch.zeros_like(v).scatter(-1, order, kept)


def _projection(shape: tuple[int, int], k: int | None, device: str, compiled: bool = False) -> Case:
    v = torch.randn(shape, device=device)
    count = shape[-1] if k is None else min(k, shape[-1])
    peers = {
        "eager": lambda: _eager_projection(v, count),
        "softmax": lambda: v.softmax(-1),
    }
    if compiled:
        function = _compile(_eager_projection)
        peers["torch.compile"] = lambda: function(v, count)
    out = torch.empty_like(v)
    return Case(
        f"projection on the simplex, k = {count}, v {list(shape)}",
        ours=lambda: sparse_projection(v, k=k),
        peers=peers,
        floors={"copy": lambda: out.copy_(v)},
        bytes_moved=2 * v.nbytes,
    )


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # fullgraph: past the recompilation limit an error, never a silent fall back to eager.
    return torch.compile(function, fullgraph=True, dynamic=False)
