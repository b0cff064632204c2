"""Arguments that the Sinkhorn solvers share, checked and brought to one batch dimension."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_one_of,
    check_same_device,
    check_same_dtype,
    check_tensor,
    known_range,
)
from regularizers.ops._operator import accumulate_dtype
from regularizers.ops._sinkhorn_reference import within

NORMS = ("l1", "linf")
COSTS = ("sqeuclidean", "euclidean", "cosine")
PointCost = Literal["sqeuclidean", "euclidean", "cosine"]


def masses(
    name: str,
    given: Tensor | None,
    like: Tensor,
    batch: torch.Size,
    count: int,
    sizes: Tensor | None,
) -> Tensor:
    """Return masses [B, count] in the accumulation type; uniform ones when none are given."""
    dtype = accumulate_dtype(like.dtype)
    if given is None:
        if sizes is None:
            return torch.full(
                (batch.numel(), count), 1 / max(count, 1), dtype=dtype, device=like.device
            )
        inside = torch.arange(count, device=like.device) < sizes[:, None]
        return torch.where(inside, 1 / sizes.clamp(min=1)[:, None].to(dtype), 0)
    check_floating(name, given)
    check_same_device(name, given, "the costs", like)
    fits = given.dim() >= 1 and given.shape[-1] == count and given.dim() - 1 <= len(batch)
    if not fits or any(
        have not in (1, want)
        for have, want in zip(reversed(given.shape[:-1]), reversed(batch), strict=False)
    ):
        raise ValueError(
            f"{name} must have shape {[*batch, count]} or broadcast to it, got {list(given.shape)}"
        )
    return _flat_batch(given.to(dtype), batch)


def strengths(name: str, given: float | Tensor, like: Tensor, batch: torch.Size) -> Tensor:
    """Return float64 [B], one entropic strength a problem."""
    if isinstance(given, Tensor):
        if not given.is_floating_point() or given.shape not in ((), batch):
            raise ValueError(
                f"{name} must be a number or a floating-point tensor of shape [] or {list(batch)}, "
                f"got {given.dtype} of shape {list(given.shape)}"
            )
        check_same_device(name, given, "the costs", like)
        return given.detach().double().expand(batch).reshape(-1)
    if isinstance(given, bool) or not isinstance(given, (int, float, torch.SymFloat)):
        raise TypeError(f"{name} must be a number or a tensor, got {type(given).__name__}")
    if not 0.0 < given < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {given}")
    return torch.full((batch.numel(),), given, dtype=torch.float64, device=like.device)


def sizes_of(name: str, given: Tensor | None, like: Tensor, batch: torch.Size) -> Tensor | None:
    """Return int64 [B] or None."""
    if given is None:
        return None
    check_tensor(name, given)
    if given.dtype != torch.int64 or given.shape != batch:
        raise ValueError(
            f"{name} must be int64 of shape {list(batch)}, got {given.dtype} of shape "
            f"{list(given.shape)}"
        )
    check_same_device(name, given, "the costs", like)
    return given.reshape(-1)


def potential(
    name: str, given: Tensor | None, like: Tensor, batch: torch.Size, count: int
) -> Tensor | None:
    """Return a potential [B, count] in the accumulation type, or None."""
    if given is None:
        return None
    check_floating(name, given)
    check_same_device(name, given, "the costs", like)
    if given.shape[-1:] != (count,) or given.shape[:-1] not in ((), batch):
        raise ValueError(f"{name} must have shape {[*batch, count]}, got {list(given.shape)}")
    return _flat_batch(given.to(accumulate_dtype(like.dtype)), batch)


def check_options(
    symmetric: bool,
    tol: float,
    max_iter: int,
    min_iter: int,
    inner_iter: int,
    eps_init: float,
    eps_decay: float,
    momentum: float | str,
    tau_a: float,
    tau_b: float,
    norm_error: str,
) -> tuple[Any, ...]:
    """Return the options in the order of the operators, checked; see :class:`Options`."""
    check_at_least("max_iter", max_iter, 1)
    check_at_least("min_iter", min_iter, 0)
    check_at_least("inner_iter", inner_iter, 1)
    check_one_of("norm_error", norm_error, NORMS)
    if not tol >= 0.0:
        raise ValueError(f"tol must not be negative, got {tol}")
    if not eps_init >= 1.0:
        raise ValueError(f"eps_init must be at least 1, got {eps_init}")
    for name, number in (("eps_decay", eps_decay), ("tau_a", tau_a), ("tau_b", tau_b)):
        if not 0.0 < number <= 1.0:
            raise ValueError(f"{name} must lie in (0, 1], got {number}")
    if momentum == "auto":
        factor = 0.0
    elif isinstance(momentum, str) or not 0.0 < momentum < 2.0:
        raise ValueError(f"momentum must be 'auto' or lie in (0, 2), got {momentum!r}")
    else:
        factor = float(momentum)
    if symmetric and tau_a != tau_b:
        raise ValueError(f"tau_b must equal tau_a = {tau_a} where symmetric, got {tau_b}")
    numbers = (float(tol), max_iter, min_iter, inner_iter, float(eps_init), float(eps_decay))
    return (*numbers, factor, float(tau_a), float(tau_b), norm_error == "linf", bool(symmetric))


def _flat_batch(tensor: Tensor, batch: torch.Size) -> Tensor:
    """Return ``[..., k]`` broadcast to the batch and with one batch dimension."""
    return tensor.expand(*batch, tensor.shape[-1]).reshape(batch.numel(), tensor.shape[-1])


def point_arguments(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    epsilon: float | Tensor,
    row_sizes: Tensor | None,
    column_sizes: Tensor | None,
) -> tuple[torch.Size, tuple[Any, ...]]:
    """Return the batch shape and points, masses, strengths and sizes with one batch dimension."""
    check_floating("x", x)
    check_floating("y", y)
    check_same_dtype("y", y, "x", x)
    check_same_device("y", y, "x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have shape [..., n, d], got {list(x.shape)}")
    batch = x.shape[:-2]
    if y.dim() != x.dim() or y.shape[:-2] != batch or y.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"y must have shape {[*batch, 'm', x.shape[-1]]} to fit x, got {list(y.shape)}"
        )
    rows = sizes_of("row_sizes", row_sizes, x, batch)
    columns = sizes_of("column_sizes", column_sizes, x, batch)
    row_mass = masses("a", a, x, batch, x.shape[-2], rows)
    column_mass = masses("b", b, x, batch, y.shape[-2], columns)
    x = x.reshape(batch.numel(), *x.shape[-2:])
    y = y.reshape(batch.numel(), *y.shape[-2:])
    _check_points("x", x, within(row_mass, rows))
    _check_points("y", y, within(column_mass, columns))
    strength = strengths("epsilon", epsilon, x, batch)
    return batch, (x, y, row_mass, column_mass, strength, (rows, columns))


def _check_points(name: str, points: Tensor, mass: Tensor) -> None:
    """Check that points with mass are finite, where looking is free.

    Products and roots hide a NaN from the kernels: a distance is rounded up to 0.
    """
    if known_range(points) is None:
        return
    if not bool((points.isfinite().all(-1) | ~(mass > 0)).all()):
        raise ValueError(f"{name} must be finite where there is mass, got NaN or infinity")


def point_cost(cost: str, scale: float) -> int:
    """Return the number of a cost between points."""
    check_one_of("cost", cost, COSTS)
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    return COSTS.index(cost)
