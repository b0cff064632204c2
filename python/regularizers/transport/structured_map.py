"""Transport maps for costs h(x - y), and the penalty that makes a vector field a gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from regularizers._shared.checks import check_at_least, check_floating, check_one_of
from regularizers._shared.randomness import draw_seed
from regularizers._shared.reductions import REDUCTIONS, Reduction, reduce_rows
from regularizers.ops.philox import rademacher
from regularizers.transport.cost import TICost


def conservative_penalty(
    F: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    num_probes: int = 1,
    reduction: Reduction = "mean",
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Penalise how far a vector field is from being the gradient of a potential.

    .. math::
        C(F) = \mathbb{E}_x \mathbb{E}_v \|J_F(x) v - J_F(x)^\top v\|_2^2
        = \mathbb{E}_x \|J_F(x) - J_F(x)^\top\|_F^2, \qquad v \in \{-1, 1\}^d

    A field on all of space is a gradient iff its Jacobian is symmetric everywhere. Each probe v
    takes one product with the Jacobian and one with its transpose, no Jacobian; probes run at once.

    Args:
        F: field ``[n, d] -> [n, d]``, row by row (a batch norm in training mode is not), with
            forward and backward derivatives.
        x: points ``[n, d]``.
        num_probes: random sign vectors for every point, at least 1; the variance falls as 1 over
            it.
        reduction: over the points: ``"mean"``, ``"sum"``, or ``"none"`` for ``[n]``.
        seed: of the sign vectors; int or int64 tensor with no dimensions.
        generator: to draw the seed from, where none is given; not inside ``torch.compile`` or
            activation checkpointing.

    Returns:
        A tensor with no dimensions, or ``[n]`` for ``reduction="none"``. Differentiable in x and in
        what F depends on.

    Raises:
        TypeError: ``F`` is not callable, or ``x`` is not a floating-point tensor.
        ValueError: a shape is wrong, ``num_probes`` is below 1, ``reduction`` is unknown, or both
            ``seed`` and ``generator`` are given.

    Example:
        >>> x = torch.randn(8, 2)
        >>> swirl = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> conservative_penalty(lambda x: x @ swirl.mT, x)  # |swirl - swirl^T|^2
        tensor(8.)
        >>> conservative_penalty(lambda x: 3 * x, x)
        tensor(0.)

    Source:
        T. Uscidda, M. Cuturi, "The Monge Gap: A Regularizer to Learn All Transport Maps", ICML
        2023, arXiv 2302.04953; reconstructed from the paper. Signs in place of normal probes have
        the lower variance (both are unbiased).
    """
    if not callable(F):
        raise TypeError(f"F must be callable, got {type(F).__name__}")
    _check_points(x)
    check_at_least("num_probes", num_probes, 1)
    check_one_of("reduction", reduction, REDUCTIONS)
    bits = draw_seed(seed, generator, x)
    probes = rademacher(tuple(x.shape), bits, num_probes, x.dtype)
    field = lambda points: _same_shape("F", F(points), points)  # noqa: E731
    x = x.contiguous()  # jvp takes no expanded tensors
    pullback = torch.func.vjp(field, x)[1]

    def asymmetry(v: Tensor) -> Tensor:
        difference: Tensor = torch.func.jvp(field, (x,), (v,))[1] - pullback(v)[0]
        return difference.square().sum(-1)

    penalties: Tensor = torch.func.vmap(asymmetry)(probes)
    penalty = penalties.mean(0)
    return reduce_rows(penalty, reduction)


class StructuredMap(nn.Module):
    r"""A map with the structure of optimal transport maps for a cost h(x - y).

    .. math:: T(x) = x - \nabla h^*(F(x))

    For strictly convex h every optimal map has this form with F the gradient of a potential. F is
    free here: :meth:`penalty` makes it a gradient, and the Monge gap makes T optimal. With
    ``potential=True`` F is the gradient of a scalar network, exactly.

    Built-in costs are the powers :math:`h(z) = \frac1p \|z\|_p^p`, for which
    :math:`\nabla h^*(z) = \operatorname{sign}(z) |z|^{q-1}` with :math:`1/p + 1/q = 1`; p = 2 is
    half the squared distance, and :math:`\nabla h^*` the identity. For p > 2 its derivative at 0
    is infinite; 0 is taken there.

    Args:
        field: module or function, ``[..., d] -> [..., d]`` (``[..., d] -> [...]`` or
            ``[..., 1]`` with ``potential=True``).
        cost: exponent p > 1 of a built-in cost, or a
            :class:`~regularizers.transport.TICost` with its ``grad_h_conj``.
        potential: whether ``field`` is a potential, whose gradient is F.

    Shape:
        ``[..., d] -> [..., d]``.

    Raises:
        TypeError: ``field`` is not callable, or ``cost`` is neither a number nor a ``TICost``.
        ValueError: ``cost`` is not above 1, or has no ``grad_h_conj``; or ``field`` returns another
            shape.

    Example:
        >>> transport = StructuredMap(nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)))
        >>> x = torch.randn(8, 2)
        >>> transport(x).shape
        torch.Size([8, 2])
        >>> transport.penalty(x, num_probes=4).backward()

    Source:
        Uscidda & Cuturi, 2023, arXiv 2302.04953; reconstructed from the paper.
    """

    def __init__(
        self,
        field: Callable[[Tensor], Tensor],
        cost: float | TICost = 2.0,
        *,
        potential: bool = False,
    ) -> None:
        super().__init__()
        if not callable(field):
            raise TypeError(f"field must be callable, got {type(field).__name__}")
        if isinstance(cost, bool) or not isinstance(cost, (int, float, TICost)):
            raise TypeError(f"cost must be a number or a TICost, got {type(cost).__name__}")
        if not isinstance(cost, TICost):
            if not cost > 1:
                raise ValueError(f"cost must be above 1 as an exponent, got {cost}")
            cost = TICost.power(cost)
        if cost.grad_h_conj is None:
            raise ValueError("cost must have grad_h_conj, the gradient of the conjugate of h")
        self.field = field
        self.cost = cost
        self.potential = potential
        self._grad_h_conj = cost.grad_h_conj

    def forward(self, x: Tensor) -> Tensor:
        """Return T(x)."""
        check_floating("x", x)
        return x - _same_shape("grad_h_conj", self._grad_h_conj(self.vector_field(x)), x)

    def vector_field(self, x: Tensor) -> Tensor:
        """Return F(x)."""
        if not self.potential:
            return _same_shape("field", self.field(x), x)
        gradient: Tensor = torch.func.grad(self._total_potential)(x)
        return gradient

    def _total_potential(self, x: Tensor) -> Tensor:
        values = self.field(x)
        if values.shape not in (x.shape[:-1], (*x.shape[:-1], 1)):
            raise ValueError(
                f"field must return shape {list(x.shape[:-1])} or {[*x.shape[:-1], 1]}, "
                f"got {list(values.shape)}"
            )
        return values.sum()

    def penalty(
        self,
        x: Tensor,
        *,
        num_probes: int = 1,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return :func:`conservative_penalty` of F on ``x``, ``[n, d]``."""
        return conservative_penalty(
            self.vector_field, x, num_probes=num_probes, seed=seed, generator=generator
        )

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return f"cost={self.cost}, potential={self.potential}"


def _same_shape(name: str, value: Tensor, x: Tensor) -> Tensor:
    if value.shape != x.shape:
        raise ValueError(
            f"{name} must return the shape {list(x.shape)} of its input, got {list(value.shape)}"
        )
    return value


def _check_points(x: Tensor) -> None:
    check_floating("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must have shape [n, d], got {list(x.shape)}")
