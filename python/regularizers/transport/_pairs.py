"""The costs of all pairs of two sets of points, stored or streamed, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regularizers import ops
from regularizers._shared.checks import check_one_of
from regularizers.ops._operator import accumulate_dtype
from regularizers.ops._sinkhorn_arguments import PointCost
from regularizers.ops.sinkhorn_points import SINKHORN_POINTS
from regularizers.transport.cost import CostFn

Memory = Literal["auto", "dense", "streaming"]
MEMORIES = ("auto", "dense", "streaming")
SCALES = ("mean", "median", "max")

# "auto" stores costs up to this many (256 MB in float32): a stored cost is the faster one on a CPU.
STORED_AT_MOST = 1 << 26
_FEW_FEATURES = 16  # measured: 1.2 to 4 times as fast up to here, slower from 64
_BLOCK = 1 << 22  # costs that a statistic of streamed pairs holds at a time
_DEGREE = {"sqeuclidean": 2, "euclidean": 1}  # c(tx, ty) = t^degree c(x, y)


def make_pairs(cost: CostFn, x: Tensor, y: Tensor, memory: Memory) -> Pairs:
    """Return the pairs of ``x [..., n, d]`` and ``y [..., m, d]``."""
    check_one_of("memory", memory, MEMORIES)
    if memory == "streaming" and cost.streaming is None:
        raise ValueError(f"memory must not be 'streaming' for {cost}, which has no such kernel")
    if memory == "auto" and _has_kernel(cost, x):
        large = x.shape[:-1].numel() * y.shape[-2] > STORED_AT_MOST
        memory = "streaming" if large else "dense"
    return (StreamedPairs if memory == "streaming" else StoredPairs)(cost, x, y)


def own_pairs(pairs: Pairs, side: Literal[0, 1], memory: Memory) -> Pairs:
    """Return the pairs within x (side 0) or y, at the scale of those between them.

    A symmetric problem takes a few iterations, in which stored costs of few features never earn
    back what writing them took.
    """
    points = pairs.points[side]
    streamed = isinstance(pairs, StreamedPairs)
    if memory == "auto" and points.shape[-1] <= _FEW_FEATURES and _has_kernel(pairs.cost, points):
        streamed |= not isinstance(pairs.scale, Tensor) or pairs.cost.streaming in _DEGREE
    return (StreamedPairs if streamed else StoredPairs)(pairs.cost, points, points, pairs.scale)


def _has_kernel(cost: CostFn, points: Tensor) -> bool:
    """Tell whether a kernel streams the cost: the reference would take [n, m, d] numbers."""
    return cost.streaming is not None and SINKHORN_POINTS.serving(points.device.type) != "reference"


class Pairs(ABC):
    """Costs ``c(x_i, y_j) / scale`` of all pairs, and products with a plan between them."""

    def __init__(self, cost: CostFn, x: Tensor, y: Tensor, scale: float | Tensor = 1.0) -> None:
        self.cost = cost
        self.points = (x, y)
        self.scale = scale

    def between(self, points: Tensor) -> Pairs:
        """Return the pairs of other points with y, at the same scale and kept in the same way."""
        return type(self)(self.cost, points, self.points[1], self.scale)

    @abstractmethod
    def detached(self) -> Pairs:
        """Return the pairs without derivatives."""

    @abstractmethod
    def rescaled(self, scale: float | Tensor) -> Pairs:
        """Return the pairs with costs divided by ``scale``, a number or a tensor ``[...]``."""

    @abstractmethod
    def solve(self, a: Tensor, b: Tensor, epsilon: Tensor, **options: Any) -> ops.SinkhornOutput:
        """Run Sinkhorn's iteration."""

    @abstractmethod
    def plan(self, f: Tensor, g: Tensor, a: Tensor, b: Tensor, epsilon: Tensor) -> Tensor:
        """Return the plan ``[..., n, m]``."""

    @abstractmethod
    def apply(
        self,
        f: Tensor,
        g: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        epsilon: Tensor,
        *,
        transposed: bool = False,
    ) -> Tensor:
        """Return P v ``[..., n, k]``, or with ``transposed`` P^T v ``[..., m, k]``."""

    @abstractmethod
    def total_cost(self, f: Tensor, g: Tensor, a: Tensor, b: Tensor, epsilon: Tensor) -> Tensor:
        """Return <P, C>, ``[...]``."""

    @abstractmethod
    def rows(self, g: Tensor, b: Tensor, epsilon: Tensor) -> Tensor:
        """Return -epsilon log sum_j b_j exp((g_j - C_ij) / epsilon), ``[..., n]``."""

    @abstractmethod
    def mean(self) -> Tensor:
        """Return the mean cost ``[...]``."""

    @abstractmethod
    def mean_square(self) -> Tensor:
        """Return the mean squared cost ``[...]``."""

    @abstractmethod
    def median(self) -> Tensor:
        """Return the median cost ``[...]``."""

    @abstractmethod
    def max(self) -> Tensor:
        """Return the largest cost ``[...]``."""

    def statistic(self, scale_cost: float | str | Tensor) -> float | Tensor:
        """Return what ``scale_cost`` divides costs by, differentiable where it depends on them."""
        if not isinstance(scale_cost, str):
            return scale_cost
        statistics: dict[str, Callable[[], Tensor]] = {
            "mean": self.mean, "median": self.median, "max": self.max,
        }  # fmt: skip
        return statistics[scale_cost]()

    def std(self) -> Tensor:
        """Return the population standard deviation of the costs ``[...]``."""
        return (self.mean_square() - self.mean().square()).clamp(min=0).sqrt()


class StoredPairs(Pairs):
    """The matrix of costs, kept."""

    def __init__(
        self,
        cost: CostFn,
        x: Tensor,
        y: Tensor,
        scale: float | Tensor = 1.0,
        matrix: Tensor | None = None,
    ) -> None:
        super().__init__(cost, x, y, scale)
        self.matrix = _divided(cost.pairwise(x, y), scale) if matrix is None else matrix

    def detached(self) -> StoredPairs:
        x, y, scale = map(_constant, (*self.points, self.scale))
        return StoredPairs(self.cost, x, y, scale, self.matrix.detach())

    def rescaled(self, scale: float | Tensor) -> StoredPairs:
        matrix = _divided(self.matrix, scale)
        return StoredPairs(self.cost, *self.points, self.scale * scale, matrix)

    def solve(self, a: Tensor, b: Tensor, epsilon: Tensor, **options: Any) -> ops.SinkhornOutput:
        return ops.sinkhorn(self.matrix, a, b, epsilon=epsilon, **options)

    def plan(self, f: Tensor, g: Tensor, a: Tensor, b: Tensor, epsilon: Tensor) -> Tensor:
        return ops.transport_plan(self.matrix, f, g, a, b, epsilon=epsilon)

    def apply(
        self,
        f: Tensor,
        g: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        epsilon: Tensor,
        *,
        transposed: bool = False,
    ) -> Tensor:
        plan = self.plan(f, g, a, b, epsilon)
        return (plan.mT if transposed else plan) @ v

    def total_cost(self, f: Tensor, g: Tensor, a: Tensor, b: Tensor, epsilon: Tensor) -> Tensor:
        return _total_cost(self.matrix, f, g, a, b, epsilon)

    def rows(self, g: Tensor, b: Tensor, epsilon: Tensor) -> Tensor:
        strength = epsilon.to(g.dtype)[..., None]
        log_b = torch.where(b > 0, b, 1).log()
        exponent = (g / strength + log_b)[..., None, :] - _divided(self.matrix, epsilon)
        exponent = torch.where((b > 0)[..., None, :], exponent, -torch.inf)
        return -strength * torch.logsumexp(exponent, -1)

    def mean(self) -> Tensor:
        return self.matrix.mean((-2, -1))

    def mean_square(self) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(self.matrix, dim=(-2, -1))
        return norm.square() / (self.matrix.shape[-2] * self.matrix.shape[-1])

    def median(self) -> Tensor:
        return self.matrix.flatten(-2).median(-1).values

    def max(self) -> Tensor:
        return self.matrix.amax((-2, -1))


class StreamedPairs(Pairs):
    """Only the points; whatever takes all pairs goes tile by tile or by blocks of rows.

    A scale is moved into the points where the cost is homogeneous, so that it may be a tensor.
    """

    def __init__(
        self,
        cost: CostFn,
        x: Tensor,
        y: Tensor,
        scale: float | Tensor = 1.0,
    ) -> None:
        super().__init__(cost, x, y, scale)
        self.kind = cast(PointCost, cost.streaming)
        self.factor = cost.scale
        self.x, self.y = x, y
        if not isinstance(scale, Tensor):
            self.factor = cost.scale / scale
        elif self.kind in _DEGREE:
            shrink = scale.pow(-1 / _DEGREE[self.kind])[..., None, None]
            self.x, self.y = (points.to(shrink.dtype) * shrink for points in (x, y))
        else:
            raise ValueError(f"scale_cost must be a number for {cost} with memory='streaming'")

    def detached(self) -> StreamedPairs:
        return StreamedPairs(self.cost, *map(_constant, (*self.points, self.scale)))

    def rescaled(self, scale: float | Tensor) -> StreamedPairs:
        return StreamedPairs(self.cost, *self.points, self.scale * scale)

    @property
    def _kernel(self) -> dict[str, Any]:
        return {"cost": self.kind, "scale": self.factor}

    def solve(self, a: Tensor, b: Tensor, epsilon: Tensor, **options: Any) -> ops.SinkhornOutput:
        return ops.sinkhorn_points(self.x, self.y, a, b, epsilon=epsilon, **self._kernel, **options)

    def plan(self, f: Tensor, g: Tensor, a: Tensor, b: Tensor, epsilon: Tensor) -> Tensor:
        return ops.transport_plan(self._costs(self.x), f, g, a, b, epsilon=epsilon)

    def apply(
        self,
        f: Tensor,
        g: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        epsilon: Tensor,
        *,
        transposed: bool = False,
    ) -> Tensor:
        x, y = self.x, self.y
        if transposed:
            x, y, f, g, a, b = y, x, g, f, b, a
        return ops.transport_apply(x, y, f, g, v, a, b, epsilon=epsilon, **self._kernel)

    def total_cost(self, f: Tensor, g: Tensor, a: Tensor, b: Tensor, epsilon: Tensor) -> Tensor:
        return self._sum_over_rows(
            lambda rows: _total_cost(
                self._costs(self.x[..., rows, :]), f[..., rows], g, a[..., rows], b, epsilon
            )
        )

    def rows(self, g: Tensor, b: Tensor, epsilon: Tensor) -> Tensor:
        # A solver's f has the derivatives of a solution, which one update is not. Hence a constant
        # f, corrected by the logarithm of its row sums, which is 0.
        n = self.x.shape[-2]
        mass = (b.detach().sum(-1, keepdim=True) / n).expand(*b.shape[:-1], n)
        with torch.no_grad():
            f = self.solve(mass, b, epsilon, g0=g, max_iter=1, tol=0.0, momentum=1.0).f
        ones = torch.ones_like(f)
        sums = self.apply(f, g, torch.ones_like(g)[..., None], ones, b, epsilon)[..., 0]
        return f - epsilon.to(f.dtype)[..., None] * sums.log()

    def mean(self) -> Tensor:
        if self.kind != "euclidean":
            return self._moments()[0]
        total = self._sum_over_rows(lambda rows: self._costs(self.x[..., rows, :]).sum((-2, -1)))
        return total / (self.x.shape[-2] * self.y.shape[-2])

    def mean_square(self) -> Tensor:
        mean, mean_square = self._moments()
        return mean if self.kind == "euclidean" else mean_square

    def median(self) -> Tensor:
        raise ValueError(
            "scale_cost must not be 'median' with memory='streaming': that needs all costs at once"
        )

    def max(self) -> Tensor:
        m = self.y.shape[-2]
        with torch.no_grad():
            found = [
                (*self._costs(self.x[..., rows, :]).flatten(-2).max(-1), rows.start * m)
                for rows in self._blocks()
            ]
            values = torch.stack([value for value, _, _ in found])
            places = torch.stack([place + start for _, place, start in found])
            place = places.take_along_dim(values.argmax(0, keepdim=True), 0)[0]
        # Differentiable through the one pair of points that is furthest apart.
        x, y = (
            points.take_along_dim(index[..., None, None], -2)
            for points, index in ((self.x, place // m), (self.y, place % m))
        )
        return self.factor / self.cost.scale * self.cost.paired(x, y)[..., 0]

    def _costs(self, x: Tensor) -> Tensor:
        return self.factor / self.cost.scale * self.cost.pairwise(x, self.y)

    def _blocks(self) -> list[slice]:
        n, m = self.x.shape[-2], self.y.shape[-2]
        height = max(1, _BLOCK // (m * self.x.shape[:-2].numel()))
        return [slice(first, min(first + height, n)) for first in range(0, n, height)]

    def _sum_over_rows(self, block: Callable[[slice], Tensor]) -> Tensor:
        """Sum over blocks of rows; a backward pass computes each block again."""
        total = block(slice(0, 0))
        for rows in self._blocks():
            total = total + checkpoint(block, rows, use_reentrant=False)
        return total

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and mean square of the costs, the *squared* distances if Euclidean.

        They follow from moments of x and of y: C_ij = p_i + q_j - 2 x_i . y_j with p = |x|^2 and
        q = |y|^2, or C_ij = 1 - x_i . y_j for unit vectors. In float64: differences of large sums.
        """
        x, y = self.x.double(), self.y.double()
        if self.kind == "cosine":
            x, y = (nn.functional.normalize(points, dim=-1) for points in (x, y))
            product, square = _product_moments(x, y)
            mean, mean_square = 1 - product, 1 - 2 * product + square
            power = 1
        else:
            centre = (x.detach().mean(-2, keepdim=True) + y.detach().mean(-2, keepdim=True)) / 2
            x, y = x - centre, y - centre
            product, square = _product_moments(x, y)
            p, q = (points.square().sum(-1, keepdim=True) for points in (x, y))
            p_mean, q_mean = p.mean((-2, -1)), q.mean((-2, -1))
            mean = p_mean + q_mean - 2 * product
            mean_square = (
                p.square().mean((-2, -1))
                + q.square().mean((-2, -1))
                + 2 * p_mean * q_mean
                + 4 * square
                - 4 * ((p * x).mean(-2) * y.mean(-2)).sum(-1)
                - 4 * ((q * y).mean(-2) * x.mean(-2)).sum(-1)
            )
            power = 2 if self.kind == "euclidean" else 1
        dtype = accumulate_dtype(self.x.dtype)
        factor = self.factor**power
        return (factor * mean).to(dtype), (factor**2 * mean_square).to(dtype)


def _product_moments(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means of x_i . y_j and of its square over all pairs."""
    n, m = x.shape[-2], y.shape[-2]
    return (
        (x.mean(-2) * y.mean(-2)).sum(-1),
        ((x.mT @ x) * (y.mT @ y)).sum((-2, -1)) / (n * m),
    )


def _total_cost(
    costs: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, epsilon: Tensor
) -> Tensor:
    plan = ops.transport_plan(costs, f, g, a, b, epsilon=epsilon)
    return torch.where(plan > 0, plan * costs, 0).sum((-2, -1))  # a cost of inf has no mass


def _divided(costs: Tensor, scale: float | Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        return costs / scale.to(costs.dtype)[..., None, None]
    return costs if scale == 1.0 else costs / scale


def _constant(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
