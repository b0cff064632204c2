"""Benchmarks of the sliced statistics: Epps-Pulley (SIGReg) and quantiles (VISReg).

The goals are meant for two CPU cores; on CUDA the same cases run at larger sizes, without goals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from regularizers._bench import Case, Goal, ScalingCurve
from regularizers._bench.case import Call
from regularizers.ops import sliced_epps_pulley, sliced_quantile
from regularizers.transport import GaussianQuantile, random_slices, sigreg, visreg

KNOTS = 17
T_MAX = 3.0


class Size(NamedTuple):
    """Batch, features and slices."""

    batch: int
    dim: int
    slices: int

    def __str__(self) -> str:
        return f"z [{self.batch}, {self.dim}], K = {self.slices}"


def cases(device: str, quick: bool) -> list[Case]:
    """List the cases; ``quick`` leaves out the methods and every compiled peer."""
    size = Size(512, 128, 1024) if device == "cpu" else Size(4096, 256, 4096)
    compiled = not quick
    found = [
        _epps_pulley(
            size,
            device,
            compiled,
            [
                Goal("eager", at_most=1 / 6),
                Goal("eager", at_most=1 / 10, quantity="memory"),
                Goal("products", at_most=2),
            ],
        ),
        _quantile(size, device, compiled, [Goal("eager", at_most=1 / 6)]),
    ]
    if not quick:
        found += [
            _method("sigreg", sigreg, _eager_epps_pulley, size, device),
            _method("visreg", visreg, _eager_visreg, size, device),
        ]
    return found if device == "cpu" else [dataclasses.replace(case, goals=()) for case in found]


def scaling(device: str, quick: bool) -> list[ScalingCurve]:
    """List the scaling curves."""
    batch, dim, slices = (512, 128, 1024) if device == "cpu" else (4096, 256, 4096)
    few, many = (64, 256, 1024), (64, 128, 256, 512, 1024, 2048, 4096)
    sizes = few if quick else many
    return [
        ScalingCurve(
            "epps-pulley-over-slices",
            f"sliced_epps_pulley, forward + backward, z [{batch}, {dim}]",
            "slices K",
            sizes,
            lambda count: _epps_pulley(Size(batch, dim, count), device),
        ),
        ScalingCurve(
            "epps-pulley-over-batch",
            f"sliced_epps_pulley, forward + backward, D = {dim}, K = {slices}",
            "batch size B",
            sizes,
            lambda rows: _epps_pulley(Size(rows, dim, slices), device),
        ),
        ScalingCurve(
            "quantile-over-batch",
            f"sliced_quantile, forward + backward, D = {dim}, K = {slices}",
            "batch size B",
            sizes,
            lambda rows: _quantile(Size(rows, dim, slices), device),
        ),
    ]


def _eager_epps_pulley(z: Tensor, slices: Tensor) -> Tensor:
    """Compute SIGReg as LeJEPA's minimal code does: batch x slices x knots in memory."""
    t = torch.linspace(0, T_MAX, KNOTS, device=z.device)
    phi = torch.exp(-(t**2) / 2)
    weight = torch.full_like(t, 2 * T_MAX / (KNOTS - 1))
    weight[[0, -1]] /= 2
    phase = (z @ slices).unsqueeze(-1) * t
    error = (phase.cos().mean(-3) - phi) ** 2 + phase.sin().mean(-3) ** 2
    return (error @ (weight * phi)).mean() * z.shape[-2]


def _eager_quantile(z: Tensor, slices: Tensor) -> Tensor:
    rows = z.shape[-2]
    i = torch.arange(1, rows + 1, device=z.device)
    q = 2**0.5 * torch.erfinv(2 * i / (rows + 1) - 1)
    return ((z @ slices).sort(-2).values - q[:, None]).square().mean()


def _eager_visreg(z: Tensor, slices: Tensor) -> Tensor:
    mu = z.mean(-2, keepdim=True)
    sigma = (z - mu).norm(dim=-2, keepdim=True) / z.shape[-2] ** 0.5 + 1e-6
    shape = _eager_quantile((z - mu) / sigma.detach(), slices)
    return shape + (sigma - 1).square().mean() + mu.square().mean()


def _drawn(loss: Callable[[Tensor, Tensor], Tensor], num_slices: int) -> Callable[[Tensor], Tensor]:
    """Return a loss that draws its slices, as users' code does."""

    def call(z: Tensor) -> Tensor:
        slices = torch.randn(z.shape[-1], num_slices, device=z.device)
        return loss(z, slices / slices.norm(dim=0))

    return call


def _epps_pulley(
    size: Size, device: str, compiled: bool = False, goals: Sequence[Goal] = ()
) -> Case:
    slices = random_slices(size.dim, size.slices, seed=0, device=device)
    return _case(
        f"sliced_epps_pulley, forward + backward, {size}, {KNOTS} knots",
        lambda z: sliced_epps_pulley(z, slices, num_knots=KNOTS, t_max=T_MAX),
        lambda z: _eager_epps_pulley(z, slices),
        size,
        slices,
        compiled,
        goals,
    )


def _quantile(size: Size, device: str, compiled: bool = False, goals: Sequence[Goal] = ()) -> Case:
    slices = random_slices(size.dim, size.slices, seed=0, device=device)
    quantiles = GaussianQuantile().quantiles(size.batch, slices)
    return _case(
        f"sliced_quantile, forward + backward, {size}",
        lambda z: sliced_quantile(z, slices, quantiles),
        lambda z: _eager_quantile(z, slices),
        size,
        slices,
        compiled,
        goals,
    )


def _method(
    name: str,
    ours: Callable[..., Tensor],
    eager: Callable[[Tensor, Tensor], Tensor],
    size: Size,
    device: str,
) -> Case:
    slices = random_slices(size.dim, size.slices, seed=0, device=device)
    return _case(
        f"{name}, slices drawn, forward + backward, {size}",
        lambda z: ours(z, num_slices=size.slices),
        _drawn(eager, size.slices),
        size,
        slices,
        compiled=True,
    )


def _case(
    name: str,
    ours: Callable[[Tensor], Tensor],
    eager: Callable[[Tensor], Tensor],
    size: Size,
    slices: Tensor,
    compiled: bool,
    goals: Sequence[Goal] = (),
) -> Case:
    z = torch.randn(1, size.batch, size.dim, device=slices.device, requires_grad=True)
    peers = {"eager": _step(eager, z)}
    if compiled:
        peers["torch.compile"] = _step(torch.compile(eager, fullgraph=True, dynamic=False), z)
    return Case(
        name,
        ours=_step(ours, z),
        peers=peers,
        floors={"products": _products(z.detach()[0], slices)},
        goals=goals,
        flops=2 * 2 * size.batch * size.dim * size.slices,
    )


def _products(z: Tensor, slices: Tensor) -> Call:
    """Return the two products alone, projections and gradient; nothing is allocated."""
    p = z @ slices
    grad_z = torch.empty_like(z)

    def call() -> None:
        torch.mm(z, slices, out=p)
        torch.mm(p, slices.T, out=grad_z)

    return call


def _step(loss: Callable[[Tensor], Tensor], z: Tensor) -> Call:
    def call() -> None:
        loss(z).backward()
        z.grad = None

    return call
