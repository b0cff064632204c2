"""Benchmarks of entropic transport: sinkhorn on a cost matrix, sinkhorn_points, transport_plan.

The goals are meant for two CPU cores; on CUDA the same cases run without goals, and peers that have
no CUDA form are reported as missing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from regularizers._bench import Case, Goal, ScalingCurve
from regularizers._bench.case import Call
from regularizers._bench.floors import copy
from regularizers.ops import sinkhorn, sinkhorn_points, transport_plan
from regularizers.transport import SinkhornDivergence

N = 2048
STRENGTHS = (0.05, 0.005)  # epsilon over the largest cost
ITERATIONS = 50


def cases(device: str, quick: bool) -> list[Case]:
    """List the cases; ``quick`` leaves out the slowest peers and sizes."""
    found = [_iterations(N, strength, device, quick) for strength in STRENGTHS]
    for strength in STRENGTHS[:1] if quick else STRENGTHS:
        found += [_tolerance(N, strength, tol, device) for tol in (1e-3, 1e-5)]
    found += [_batched(device), _plan(N, device), _divergence(N, device, quick)]
    if not quick:
        found.append(_streaming(20_000, 16, device, goals=[_streaming_goal()]))
    return found if device == "cpu" else [dataclasses.replace(case, goals=()) for case in found]


def scaling(device: str, quick: bool) -> list[ScalingCurve]:
    """List the scaling curves."""
    return [
        ScalingCurve(
            "sinkhorn-iterations-over-points",
            f"sinkhorn, {ITERATIONS} iterations, cost [n, n]",
            "points n",
            (128, 512) if quick else (128, 256, 512, 1024, 2048, 4096),
            lambda n: _iterations(n, 0.05, device, quick=True, goals=False),
        ),
        ScalingCurve(
            "sinkhorn-streaming-over-points",
            "sinkhorn_points, 1 iteration, d = 16",
            "points n",
            (1000, 3000) if quick else (1000, 3000, 10_000, 30_000, 100_000),
            lambda n: _streaming(n, 16, device, iterations=1, curve=True),
        ),
    ]


def clouds(n: int, d: int, device: str) -> tuple[Tensor, Tensor]:
    """Return two Gaussian clouds of different place and width."""
    generator = torch.Generator().manual_seed(n + d)
    x, y = (torch.randn(n, d, generator=generator) for _ in range(2))
    return x.to(device), (1.3 * y + 0.5).to(device)


def _cost(n: int, device: str) -> Tensor:
    x, y = clouds(n, 2, device)
    return torch.cdist(x, y).square()


# --- A cost matrix --------------------------------------------------------------------------------


def loop(cost: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Run the iteration as one would write it in PyTorch."""
    n, m = cost.shape[-2:]
    f = cost.new_zeros(*cost.shape[:-2], n)
    for _ in range(iterations):
        g = -epsilon * (torch.logsumexp((f[..., :, None] - cost) / epsilon, -2) - math.log(n))
        f = -epsilon * (torch.logsumexp((g[..., None, :] - cost) / epsilon, -1) - math.log(m))
    return f, g


def _one_pass_an_iteration(cost: Tensor, epsilon: float, iterations: int) -> Call:
    """Multiply a stored kernel by a vector, once an iteration: no iteration can read it less."""
    kernel = torch.exp(-cost / epsilon)
    vector, out = cost.new_ones(cost.shape[1]), cost.new_empty(cost.shape[0])

    def call() -> None:
        for _ in range(iterations):
            torch.mv(kernel, vector, out=out)

    return call


def _pot(cost: Tensor, epsilon: float, iterations: int, method: str) -> Call:
    """POT on numpy arrays, float32, without stopping; NaN is an error."""
    import numpy as np
    import ot

    matrix = cost.cpu().numpy()
    a, b = (np.full(count, 1 / count, dtype=np.float32) for count in matrix.shape)
    solver: Callable[..., Any] = getattr(ot.bregman, method)

    def call() -> Any:
        plan = solver(a, b, matrix, epsilon, numItermax=iterations, stopThr=0.0, warn=False)
        if not np.isfinite(plan).all() or abs(plan.sum() - 1) > 0.1:
            raise FloatingPointError("the kernel underflows")
        return plan

    return call


def _ott(cost: Tensor, epsilon: float, *, iterations: int | None, tol: float = 0.0) -> Call:
    """OTT-JAX in the log domain, jitted, on the same float32 costs."""
    import jax
    import jax.numpy as jnp
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn as ott_sinkhorn

    matrix = jnp.asarray(cost.cpu().numpy())
    limits = (
        {"min_iterations": iterations, "max_iterations": iterations}
        if iterations is not None
        else {"threshold": tol, "max_iterations": 5000}
    )
    solver = ott_sinkhorn.Sinkhorn(lse_mode=True, **limits)

    @jax.jit
    def run(matrix: Any) -> Any:
        problem = linear_problem.LinearProblem(geometry.Geometry(matrix, epsilon=epsilon))
        found = solver(problem)
        return found.f, found.g

    return lambda: jax.block_until_ready(run(matrix))


def _iterations(n: int, strength: float, device: str, quick: bool, *, goals: bool = True) -> Case:
    cost = _cost(n, device)
    epsilon = strength * cost.max().item()
    peers: dict[str, Call] = {
        "ours, over-relaxed": lambda: sinkhorn(cost, epsilon=epsilon, tol=0, max_iter=ITERATIONS),
        "PyTorch logsumexp": lambda: loop(cost, epsilon, ITERATIONS),
    }
    _add(peers, "OTT-JAX", lambda: _ott(cost, epsilon, iterations=ITERATIONS))
    _add(peers, "POT, kernel form", lambda: _pot(cost, epsilon, ITERATIONS, "sinkhorn_knopp"))
    if not quick:
        _add(peers, "POT, log domain", lambda: _pot(cost, epsilon, ITERATIONS, "sinkhorn_log"))
    bounds = [
        Goal("PyTorch logsumexp", at_most=1 / 25),
        Goal("OTT-JAX", at_most=1 / 3),
        Goal("stored kernel, one pass each", at_most=1.25),
    ]
    if strength >= 0.05:
        bounds.append(Goal("POT, kernel form", at_most=1 / 1.3))
    return Case(
        f"sinkhorn, {ITERATIONS} iterations, cost [{n}, {n}], epsilon {strength:g} of its maximum",
        ours=lambda: sinkhorn(cost, epsilon=epsilon, tol=0, max_iter=ITERATIONS, momentum=1.0),
        peers=peers,
        floors={"stored kernel, one pass each": _one_pass_an_iteration(cost, epsilon, ITERATIONS)},
        goals=bounds if goals else (),
        bytes_moved=ITERATIONS * cost.nbytes,
    )


def _tolerance(n: int, strength: float, tol: float, device: str) -> Case:
    """Time to an L1 error of the marginals. POT runs as many iterations as it needs, no more."""
    cost = _cost(n, device)
    epsilon = strength * cost.max().item()
    needed = int(sinkhorn(cost, epsilon=epsilon, tol=tol, momentum=1.0, max_iter=5000).n_iter)
    peers: dict[str, Call] = {
        "ours, plain": lambda: sinkhorn(cost, epsilon=epsilon, tol=tol, momentum=1.0),
    }
    _add(peers, "OTT-JAX", lambda: _ott(cost, epsilon, iterations=None, tol=tol))
    _add(peers, "POT, kernel form", lambda: _pot(cost, epsilon, needed, "sinkhorn_knopp"))
    bounds = [Goal("OTT-JAX", at_most=1 / 5)]
    if strength >= 0.05:
        bounds.append(Goal("POT, kernel form", at_most=1 / 5))
    return Case(
        f"sinkhorn to an error of {tol:g}, cost [{n}, {n}], epsilon {strength:g} of its maximum",
        ours=lambda: sinkhorn(cost, epsilon=epsilon, tol=tol),
        peers=peers,
        goals=bounds,
    )


def _batched(device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(64, 128, 128, generator=generator).to(device)
    epsilon = 0.05
    peers: dict[str, Call] = {"PyTorch logsumexp": lambda: loop(cost, epsilon, ITERATIONS)}

    def every_item() -> Call:
        calls = [_pot(item, epsilon, ITERATIONS, "sinkhorn_knopp") for item in cost]
        return lambda: [call() for call in calls]

    _add(peers, "POT, kernel form, a loop", every_item)
    return Case(
        f"sinkhorn, {ITERATIONS} iterations, cost [64, 128, 128]",
        ours=lambda: sinkhorn(cost, epsilon=epsilon, tol=0, max_iter=ITERATIONS, momentum=1.0),
        peers=peers,
        goals=[
            Goal("PyTorch logsumexp", at_most=1 / 3),
            Goal("POT, kernel form, a loop", at_most=1 / 10),
        ],
        bytes_moved=ITERATIONS * cost.nbytes,
    )


def _plan(n: int, device: str) -> Case:
    cost = _cost(n, device)
    epsilon = 0.05 * cost.max().item()
    found = sinkhorn(cost, epsilon=epsilon)
    f, g = found.f[:, None], found.g
    return Case(
        f"transport_plan, cost [{n}, {n}]",
        ours=lambda: transport_plan(cost, found.f, found.g, epsilon=epsilon),
        peers={"eager": lambda: torch.exp((f + g - cost) / epsilon) / (n * n)},
        floors={"copy, as many bytes": copy(2 * cost.nbytes, device=device)},
        bytes_moved=2 * cost.nbytes,
    )


def _divergence(n: int, device: str, quick: bool) -> Case:
    """Time the divergence with its gradient.

    GeomLoss ends after a fixed number of annealing steps; how far from the value that leaves it is
    in the name. At ``scaling=0.98`` it is within 1e-3 of ours, whose error is below 1e-5.
    """
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(n, 16, generator=generator).to(device) for _ in range(2))
    y = 0.8 * y + 0.3
    x.requires_grad_()
    y.requires_grad_()

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> Call:
        def call() -> None:
            loss(x, y).backward()
            x.grad = y.grad = None

        return call

    ours = SinkhornDivergence(blur=0.1)
    value = ours(x, y).item()
    peers: dict[str, Call] = {}

    def geomloss(scaling: float) -> tuple[float, Call]:
        import geomloss

        loss = geomloss.SamplesLoss(
            "sinkhorn", p=2, blur=0.1, scaling=scaling, backend="tensorized"
        )
        return abs(loss(x, y).item() / value - 1), step(loss)

    for scaling in (0.5,) if quick else (0.5, 0.9, 0.98):
        try:
            off, call = geomloss(scaling)
        except ImportError:
            break
        peers[f"GeomLoss, scaling {scaling}, {off:.1e} off"] = call
    return Case(
        f"SinkhornDivergence, forward + backward, {n} points on each side, d = 16, blur 0.1",
        ours=step(ours),
        peers=peers,
        goals=[Goal(name, at_most=1 / 20) for name in list(peers)[-1:]] if not quick else (),
    )


# --- Points ---------------------------------------------------------------------------------------


def _streaming_goal() -> Goal:
    return Goal("stored kernel, as many entries", at_most=1.5)


def _streaming(
    n: int,
    d: int,
    device: str,
    *,
    iterations: int = 3,
    curve: bool = False,
    goals: Sequence[Goal] = (),
) -> Case:
    """Time some iterations, and what a stored matrix of as many entries would take.

    The latter by extrapolation: the stored kernel of 8192 points (256 MB, more than any cache) is
    read as often as it takes to have read as many entries.
    """
    x, y = clouds(n, d, device)
    epsilon = 0.1 * d
    peers: dict[str, Call] = {}
    if curve and n <= 10_000:
        peers["sinkhorn on stored costs"] = lambda: sinkhorn(
            torch.cdist(x, y).square(), epsilon=epsilon, tol=0, max_iter=iterations
        )
        peers["PyTorch logsumexp"] = lambda: loop(torch.cdist(x, y).square(), epsilon, iterations)
    floors: dict[str, Call] = {}
    if n <= 30_000:
        floors["products"] = _products(x, y, iterations + 1)
    if n >= 8192 and not curve:
        matrix = torch.rand(8192, 8192, device=device)
        times = round((iterations + 1) * (n / 8192) ** 2)
        floors["stored kernel, as many entries"] = _one_pass_an_iteration(matrix, 1.0, times)
    return Case(
        f"sinkhorn_points, {iterations} iterations, {n} points on each side, d = {d}",
        ours=lambda: sinkhorn_points(x, y, epsilon=epsilon, tol=0, max_iter=iterations),
        peers=peers,
        floors=floors,
        goals=goals,
        flops=(iterations + 1) * 2 * n * n * d,
    )


def _products(x: Tensor, y: Tensor, sweeps: int) -> Call:
    """Multiply all pairs of points, by blocks of rows, and do nothing with the products."""
    block = max(1, (1 << 22) // len(y))
    out = x.new_empty(block, len(y))

    def call() -> None:
        for _ in range(sweeps):
            for rows in x.split(block):
                torch.mm(rows, y.T, out=out[: len(rows)])

    return call


# --- Both -----------------------------------------------------------------------------------------


def _add(peers: dict[str, Call], name: str, make: Callable[[], Call]) -> None:
    """Add a peer; one that is not installed is reported as missing when the case runs."""
    try:
        peers[name] = make()
    except ImportError as error:
        message = str(error)

        def missing() -> None:
            raise ModuleNotFoundError(message)

        peers[name] = missing
