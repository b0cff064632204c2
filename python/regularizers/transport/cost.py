"""Ground costs between points: all pairs, matched pairs, and plan-weighted gradients."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regularizers._shared.checks import check_floating, check_same_device, check_same_dtype
from regularizers.ops._operator import accumulate_dtype, full_precision, transformed

# Up to here distances come from differences, exact also for points that coincide; beyond it from
# one matrix product, 5 to 15 times as fast, with an error of about 3e-4 |x| (float32) near 0.
_DIRECT_FEATURES = 32


class CostFn(ABC):
    r"""A cost :math:`c(x, y)` between points, the one interface that solvers use.

    A cost is immutable: it hashes, compares by value and prints as it is built. Leading dimensions
    of ``x`` and ``y`` are batches and broadcast. bfloat16 and float16 points are widened, and their
    costs are float32: a rounded cost is useless inside :math:`\exp(-c / \epsilon)`. Everything is
    differentiable, to any order; where a cost has a kink its gradient is 0, never NaN.

    A cost of your own needs ``pairwise`` and ``paired``; a plain function goes through
    :func:`as_cost`.

    Attributes:
        streaming: which streaming kernel computes this cost from dot products and norms without
            an ``[n, m]`` array (``"sqeuclidean"``, ``"euclidean"``, ``"cosine"``), or None.
        scale: factor in front of the streaming kernel's cost.

    Example:
        >>> cost = SqEuclidean(scale=0.5)
        >>> cost.pairwise(torch.zeros(2, 3), torch.ones(4, 3)).shape
        torch.Size([2, 4])
        >>> cost.paired(torch.zeros(2, 3), torch.ones(2, 3))
        tensor([1.5000, 1.5000])
    """

    streaming: ClassVar[str | None] = None
    scale: float = 1.0

    @abstractmethod
    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the costs ``[..., n, m]`` of all pairs of ``[..., n, d]`` and ``[..., m, d]``."""

    @abstractmethod
    def paired(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the costs ``[..., n]`` of matched points, ``[..., n, d]`` both."""

    def grad_x_weighted(self, x: Tensor, y: Tensor, P: Tensor) -> Tensor:
        r"""Return :math:`\sum_j P_{ij} \nabla_1 c(x_i, y_j)`, the gradient that a plan passes on.

        Args:
            x: ``[..., n, d]``.
            y: ``[..., m, d]``.
            P: ``[..., n, m]``, weights of the pairs.

        Returns:
            ``[..., n, d]``, differentiable in all three arguments.
        """
        x, y, P = _plan(x, y, P)
        with full_precision(x.device):
            pullback = torch.func.vjp(lambda points: self.pairwise(points, y), x)[1]
            gradient: Tensor = pullback(P)[0]
            return gradient


@dataclass(frozen=True)
class SqEuclidean(CostFn):
    r"""The squared Euclidean distance.

    .. math:: c(x, y) = \mathrm{scale} \cdot \|x - y\|_2^2

    ``scale=0.5`` is the cost that GeomLoss calls ``p=2``.

    Args:
        scale: factor s > 0.

    Raises:
        TypeError: ``scale`` is not a number.
        ValueError: ``scale`` is not positive and finite.

    Example:
        >>> SqEuclidean().pairwise(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0]]))
        tensor([[9.],
                [4.]])
    """

    streaming: ClassVar[str | None] = "sqeuclidean"
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("scale", self.scale)

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the costs of all pairs from one matrix product, never negative."""
        return _squared_distances(*_centred(*_pairs(x, y)), self.scale)

    def paired(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the costs of matched points."""
        x, y = _pairs(x, y, matched=True)
        return self.scale * (x - y).square().sum(-1)

    def grad_x_weighted(self, x: Tensor, y: Tensor, P: Tensor) -> Tensor:
        r"""Return :math:`2 s (r_i x_i - \sum_j P_{ij} y_j)` with the row sums r of P."""
        x, y, P = _plan(x, y, P)
        return 2 * self.scale * _weighted_differences(*_centred(x, y), P)


@dataclass(frozen=True)
class Euclidean(CostFn):
    r"""The Euclidean distance; its gradient at distance 0 is 0.

    .. math:: c(x, y) = \|x - y\|_2

    Up to 32 features distances are summed from differences and exact for points that coincide;
    beyond, they come from a matrix product, with an error near 0 of about 3e-4 of the points' norm
    in float32.

    Example:
        >>> Euclidean().pairwise(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([[5.]])
    """

    streaming: ClassVar[str | None] = "euclidean"

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the costs of all pairs."""
        return _distances(*_centred(*_pairs(x, y)))

    def paired(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the costs of matched points."""
        x, y = _pairs(x, y, matched=True)
        return _power((x - y).square().sum(-1), 0.5)

    def grad_x_weighted(self, x: Tensor, y: Tensor, P: Tensor) -> Tensor:
        r"""Return :math:`\sum_j P_{ij} (x_i - y_j) / \|x_i - y_j\|_2`, 0 for 0 / 0."""
        return _norm_power_gradient(x, y, P, 1.0)


@dataclass(frozen=True)
class Lp(CostFn):
    r"""A power of the Euclidean distance; its gradient at distance 0 is 0.

    .. math:: c(x, y) = \|x - y\|_2^p

    The *norm* is Euclidean for every p; :meth:`TICost.power` is the p-norm to the power p.

    Args:
        p: exponent > 0. Costs with p > 1 are strictly convex, those with p < 1 concave.

    Raises:
        TypeError: ``p`` is not a number.
        ValueError: ``p`` is not positive and finite.

    Example:
        >>> Lp(3.0).pairwise(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([[125.]])
    """

    p: float

    def __post_init__(self) -> None:
        _check_positive("p", self.p)

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the costs of all pairs."""
        if self.p == 2:  # the power of a distance would lose the curvature at distance 0
            return SqEuclidean().pairwise(x, y)
        return _power(_distances(*_centred(*_pairs(x, y))), self.p)

    def paired(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the costs of matched points."""
        if self.p == 2:
            return SqEuclidean().paired(x, y)
        x, y = _pairs(x, y, matched=True)
        return _power((x - y).square().sum(-1), self.p / 2)

    def grad_x_weighted(self, x: Tensor, y: Tensor, P: Tensor) -> Tensor:
        r"""Return :math:`\sum_j P_{ij} p \|x_i - y_j\|_2^{p-2} (x_i - y_j)`, 0 at distance 0."""
        if self.p == 2:
            return SqEuclidean().grad_x_weighted(x, y, P)
        return _norm_power_gradient(x, y, P, self.p)


@dataclass(frozen=True)
class Cosine(CostFn):
    r"""One minus the cosine of the angle between two vectors.

    .. math:: c(x, y) = 1 - \frac{\langle x, y \rangle}{\|x\|_2 \|y\|_2}

    The cosine with a zero vector is 0 and has gradient 0.

    Example:
        >>> Cosine().pairwise(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0], [-3.0, 0.0]]))
        tensor([[1., 2.]])
    """

    streaming: ClassVar[str | None] = "cosine"

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the costs of all pairs from one matrix product, never negative."""
        x, y = _pairs(x, y)
        with full_precision(x.device):
            return _without_rounding_below_0(1 - _unit(x) @ _unit(y).mT)

    def paired(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the costs of matched points."""
        x, y = _pairs(x, y, matched=True)
        return _without_rounding_below_0(1 - (_unit(x) * _unit(y)).sum(-1))


@dataclass(frozen=True)
class Arccos(CostFn):
    r"""The angle between two vectors, which is the geodesic distance on the sphere.

    .. math::
        c(x, y) = \arccos \langle \hat x, \hat y \rangle
        = 2 \operatorname{atan2}(\|\hat x - \hat y\|_2, \|\hat x + \hat y\|_2),
        \qquad \hat x = x / \|x\|_2

    The second form is computed: the first loses half of the digits near 0 and :math:`\pi` and has
    infinite derivatives there. Gradients at the angles 0 and :math:`\pi` are 0; the angle with a
    zero vector is :math:`\pi / 2`.

    Example:
        >>> Arccos().pairwise(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([[0.0000, 1.5708]])
    """

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the costs of all pairs."""
        x, y = map(_unit, _pairs(x, y))
        return 2 * torch.atan2(_distances(x, y), _distances(x, -y))

    def paired(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the costs of matched points."""
        x, y = map(_unit, _pairs(x, y, matched=True))
        apart, opposed = ((x + sign * y).square().sum(-1) for sign in (-1, 1))
        return 2 * torch.atan2(_power(apart, 0.5), _power(opposed, 0.5))


@dataclass(frozen=True)
class TICost(CostFn):
    r"""A translation-invariant cost.

    .. math:: c(x, y) = h(x - y)

    All pairs take an ``[n, m, d]`` array of differences. For strictly convex h an optimal map is
    :math:`x - \nabla h^*(\nabla\varphi(x))`; see
    :class:`~regularizers.transport.StructuredMap`.

    Args:
        h: function of the last dimension, ``[..., d] -> [...]``; convex, differentiable.
        grad_h_conj: the gradient :math:`\nabla h^* = (\nabla h)^{-1}` of its convex conjugate,
            ``[..., d] -> [..., d]``; only maps need it.

    Raises:
        TypeError: an argument is not callable.

    Example:
        >>> cost = TICost.power(3.0)
        >>> cost.pairwise(torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]))
        tensor([[3.]])
        >>> cost.grad_h_conj(torch.tensor([1.0, -4.0]))
        tensor([ 1., -2.])
    """

    h: Callable[[Tensor], Tensor]
    grad_h_conj: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not callable(self.h):
            raise TypeError(f"h must be callable, got {type(self.h).__name__}")
        if self.grad_h_conj is not None and not callable(self.grad_h_conj):
            raise TypeError(
                f"grad_h_conj must be callable or None, got {type(self.grad_h_conj).__name__}"
            )

    @classmethod
    def power(cls, p: float) -> TICost:
        r"""Return the cost :math:`h(z) = \frac1p \|z\|_p^p`; half the squared distance for p = 2.

        :math:`\nabla h^*(z) = \operatorname{sign}(z) |z|^{q-1}` with :math:`1/p + 1/q = 1`.

        Args:
            p: exponent > 1.

        Raises:
            TypeError: ``p`` is not a number.
            ValueError: ``p`` is not finite or not above 1.
        """
        _check_positive("p", p)
        if p <= 1:
            raise ValueError(f"p must be above 1 (h is not strictly convex otherwise), got {p}")
        return cls(_PowerSum(p), _SignedPower(1 / (p - 1)))

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the costs of all pairs."""
        x, y = _pairs(x, y)
        shape = (*torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-2])
        return _expected("h", self.h(x[..., :, None, :] - y[..., None, :, :]), shape)

    def paired(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the costs of matched points."""
        x, y = _pairs(x, y, matched=True)
        differences = x - y
        return _expected("h", self.h(differences), tuple(differences.shape[:-1]))


@dataclass(frozen=True)
class _PowerSum:
    """h(z) = sum |z|^p / p."""

    p: float

    def __call__(self, z: Tensor) -> Tensor:
        if self.p == 2:  # curvature 1 at 0, which a guarded power would lose
            return z.square().sum(-1) / 2
        return _power(z.abs(), self.p).sum(-1) / self.p


@dataclass(frozen=True)
class _SignedPower:
    """z -> sign(z) |z|^exponent, elementwise."""

    exponent: float

    def __call__(self, z: Tensor) -> Tensor:
        return z if self.exponent == 1 else z.sign() * _power(z.abs(), self.exponent)


@dataclass(frozen=True)
class _CallableCost(CostFn):
    """A user's function ``(x [n, d], y [m, d]) -> [n, m]``."""

    function: Callable[[Tensor, Tensor], Tensor]

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = _pairs(x, y)
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        shape = (x.shape[-2], y.shape[-2])
        if not batch:
            return _expected("cost", self.function(x, y), shape)
        # A loop, since a function for two matrices need not survive vmap.
        xs, ys = (side.expand(*batch, -1, -1).flatten(0, -3) for side in (x, y))
        items = [
            _expected("cost", self.function(*item), shape) for item in zip(xs, ys, strict=True)
        ]
        return torch.stack(items).unflatten(0, batch) if items else x.new_empty(*batch, *shape)

    def paired(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = _pairs(x, y, matched=True)
        return self.pairwise(x, y).diagonal(dim1=-2, dim2=-1)


def as_cost(cost: CostFn | Callable[[Tensor, Tensor], Tensor]) -> CostFn:
    """Return ``cost`` as a :class:`CostFn`.

    A plain function takes the dense path only. It is called once for each item of a batch, and
    ``paired`` is the diagonal of all pairs.

    Args:
        cost: a cost, or a differentiable function ``(x [n, d], y [m, d]) -> [n, m]``.

    Returns:
        The cost itself, or the function wrapped.

    Raises:
        TypeError: ``cost`` is a class, or not callable.

    Example:
        >>> manhattan = as_cost(lambda x, y: torch.cdist(x, y, p=1))
        >>> manhattan.pairwise(torch.zeros(1, 2), torch.ones(3, 2))
        tensor([[2., 2., 2.]])
    """
    if isinstance(cost, CostFn):
        return cost
    if isinstance(cost, type):
        raise TypeError(f"cost must be an instance, got the class {cost.__name__}")
    if not callable(cost):
        raise TypeError(f"cost must be a CostFn or a callable, got {type(cost).__name__}")
    return _CallableCost(cost)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the Euclidean distances of all pairs of centred points, differentiable to any order.

    torch.cdist differentiates once. Its value therefore replaces that of the matrix product, whose
    derivatives are right and whose rounding would be the square root of epsilon near distance 0.
    """
    direct = x.shape[-1] <= _DIRECT_FEATURES
    mode = "donot_use_mm_for_euclid_dist" if direct else "use_mm_for_euclid_dist"
    with full_precision(x.device):
        if not (_differentiated(x, y) or transformed()):
            return torch.cdist(x, y, compute_mode=mode)
        squares = _squared_distances(x, y, 1.0)
        if direct:
            values = torch.cdist(x.detach(), y.detach(), compute_mode=mode)
            squares.detach().copy_(values.square())
        return _power(squares, 0.5)


def _squared_distances(x: Tensor, y: Tensor, scale: float) -> Tensor:
    # One product writes the whole cost: [-2 s x, s |x|^2, 1] . [y, 1, s |y|^2].
    with full_precision(x.device):
        left = [-2 * scale * x, scale * _square(x), torch.ones_like(x[..., :1])]
        right = [y, torch.ones_like(y[..., :1]), scale * _square(y)]
        return _without_rounding_below_0(torch.cat(left, -1) @ torch.cat(right, -1).mT)


def _norm_power_gradient(x: Tensor, y: Tensor, P: Tensor, p: float) -> Tensor:
    """Return sum_j P_ij p |x_i - y_j|^(p - 2) (x_i - y_j)."""
    x, y, P = _plan(x, y, P)
    x, y = _centred(x, y)
    return _weighted_differences(x, y, p * P * _power(_distances(x, y), p - 2))


def _weighted_differences(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Return sum_j weight_ij (x_i - y_j)."""
    with full_precision(x.device):
        return weight.sum(-1, keepdim=True) * x - weight @ y


def _differentiated(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _power(base: Tensor, exponent: float) -> Tensor:
    """Return base^exponent for base >= 0, with value and all derivatives 0 at base 0."""
    positive = base > 0
    return torch.where(positive, torch.where(positive, base, 1).pow(exponent), 0)


def _unit(x: Tensor) -> Tensor:
    return x * _power(_square(x), -0.5)


def _square(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True)


def _centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract one point from all: differences stay, cancellation in |x|^2 + |y|^2 - 2xy goes."""
    total = x.detach().sum(-2, keepdim=True) + y.detach().sum(-2, keepdim=True)
    centre = total / max(x.shape[-2] + y.shape[-2], 1)
    return x - centre, y - centre


def _without_rounding_below_0(cost: Tensor) -> Tensor:
    """Clamp the value alone: derivatives pass, also of second order, where rounding went below."""
    cost.detach().relu_()
    return cost


def _pairs(x: Tensor, y: Tensor, *, matched: bool = False) -> tuple[Tensor, Tensor]:
    """Check two sets of points and widen half types."""
    check_floating("x", x)
    check_floating("y", y)
    check_same_dtype("y", y, "x", x)
    check_same_device("y", y, "x", x)
    if x.dim() < 2 or y.dim() < 2:
        name, points = ("x", x) if x.dim() < 2 else ("y", y)
        raise ValueError(f"{name} must have shape [..., points, d], got {list(points.shape)}")
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"y must have d = {x.shape[-1]} as x has, got {list(y.shape)}")
    if matched and x.shape[-2] != y.shape[-2]:
        raise ValueError(f"y must have n = {x.shape[-2]} points as x has, got {list(y.shape)}")
    dtype = accumulate_dtype(x.dtype)
    return x.to(dtype), y.to(dtype)


def _plan(x: Tensor, y: Tensor, P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check and widen points and weights; expand x to the batch of the result."""
    x, y = _pairs(x, y)
    check_floating("P", P)
    if P.dim() < 2 or P.shape[-2:] != (x.shape[-2], y.shape[-2]):
        raise ValueError(
            f"P must have shape [..., n, m] = [..., {x.shape[-2]}, {y.shape[-2]}], "
            f"got {list(P.shape)}"
        )
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2], P.shape[:-2])
    P = P.to(x.dtype).expand(*batch, -1, -1)
    return x.expand(*batch, -1, -1), y.expand(*batch, -1, -1), P


def _expected(name: str, cost: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(cost.shape) != shape:
        raise ValueError(f"{name} must return shape {list(shape)}, got {list(cost.shape)}")
    return cost


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")
