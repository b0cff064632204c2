"""The Monge gap: how far a map is from being an optimal transport map, as a regularizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

from torch import Tensor

from regularizers._shared.checks import check_one_of
from regularizers._shared.reductions import REDUCTIONS, Reduction, reduce_rows
from regularizers._shared.scheduled import ScheduledModule
from regularizers.transport._pairs import Memory
from regularizers.transport.cost import CostFn, SqEuclidean, as_cost
from regularizers.transport.sinkhorn import (
    RelativeEpsilon,
    ScaleCost,
    SinkhornSolution,
    check_points,
    check_solver_options,
    entropic_strength,
    masses,
    scaled_pairs,
    solve,
)
from regularizers.transport.sinkhorn_divergence import check_epsilon, divergence

GapConvention = Literal["entropy", "kl", "sharp", "debiased"]
_CONVENTIONS = ("entropy", "kl", "sharp", "debiased")


@overload
def monge_gap(
    x: Tensor, Tx: Tensor, *, return_output: Literal[False] = False, **options: Any
) -> Tensor: ...


@overload
def monge_gap(
    x: Tensor, Tx: Tensor, *, return_output: Literal[True], **options: Any
) -> tuple[Tensor, SinkhornSolution]: ...


def monge_gap(
    x: Tensor,
    Tx: Tensor,
    *,
    cost: CostFn | Callable[[Tensor, Tensor], Tensor] = SqEuclidean(),  # noqa: B008  immutable
    epsilon: float | Tensor | None = None,
    relative_epsilon: RelativeEpsilon | None = None,
    scale_cost: ScaleCost = 1.0,
    scale_transport_only: bool = False,
    convention: GapConvention = "entropy",
    reduction: Reduction = "mean",
    memory: Memory = "auto",
    check_finite: bool | None = None,
    return_output: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, SinkhornSolution]:
    r"""Penalise a map that moves points at more cost than an optimal map to the same places would.

    .. math::
        M(T) = \frac1n \sum_i c(x_i, T(x_i))
        - W_\varepsilon\Big(\frac1n \sum_i \delta_{x_i}, \frac1n \sum_i \delta_{T(x_i)}\Big)

    In the limit of small epsilon it is not negative, and 0 iff T is optimal between the sample and
    its image. A network T is trained with :math:`\Delta(T_\sharp \mu, \nu) + \lambda M_\rho(T)`:
    a fitting loss, say :func:`~regularizers.transport.sinkhorn_divergence`, and the gap on a sample
    of any reference measure :math:`\rho`. T needs no special architecture.

    Differentiable in ``Tx`` and ``x`` by the envelope theorem (``"sharp"``: implicitly); epsilon
    and, with its statistic, what it is relative to are constants.

    The sample is that of one process. For a sample spread over ranks, gather x and Tx first
    (``torch.distributed.nn.all_gather``): the mean of local gaps is not the gap of all.

    Args:
        x: ``[..., n, d]``, the reference sample; leading dimensions are a batch, solved at once.
        Tx: ``[..., n, d]``, where the map takes it, point by point.
        cost: as for :func:`~regularizers.transport.sinkhorn`.
        epsilon: as there: None is 0.05 of the standard deviation of the costs between x and Tx. The
            paper's experiments take 0.01 of their mean once, and freeze it.
        relative_epsilon: as there.
        scale_cost: as there; divides both terms.
        scale_transport_only: divide the second term alone, as the released code does, which
            subtracts quantities in different units.
        convention: which value :math:`W_\varepsilon` is. ``"entropy"``, the released code's:
            :math:`\langle P, C \rangle - \varepsilon H(P)`; the gap is at least
            :math:`\varepsilon \log n`. ``"kl"``: less by :math:`2 \varepsilon \log n`, a constant.
            ``"sharp"``: :math:`\langle P, C \rangle`. ``"debiased"``: the Sinkhorn divergence (not
            in the paper).
        reduction: over the batch: ``"mean"``, ``"sum"`` or ``"none"``.
        memory: as for :func:`~regularizers.transport.sinkhorn`.
        check_finite: as there.
        return_output: return the :class:`~regularizers.transport.SinkhornSolution` between x and Tx
            as well.
        options: how to iterate, as for :func:`~regularizers.transport.sinkhorn_divergence`.

    Returns:
        A tensor with no dimensions, or ``[...]`` for ``reduction="none"``; float32 for
        half-precision points.

    Raises:
        TypeError: as :func:`~regularizers.transport.sinkhorn`; an option is unknown.
        ValueError: likewise; or ``Tx`` has not the shape of ``x``, or ``convention`` is unknown.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> swapped = x.flip(0)
        >>> monge_gap(x, x, epsilon=0.1), monge_gap(x, swapped, epsilon=0.1)
        (tensor(0.0693), tensor(1.0693))

    Source:
        T. Uscidda, M. Cuturi, "The Monge Gap: A Regularizer to Learn All Transport Maps", ICML
        2023, arXiv 2302.04953; from the authors' code in OTT-JAX.
    """
    check_points(x, Tx, check_finite, second="Tx")
    if Tx.shape != x.shape:
        raise ValueError(f"Tx must have the shape {list(x.shape)} of x, got {list(Tx.shape)}")
    check_one_of("convention", convention, _CONVENTIONS)
    check_one_of("reduction", reduction, REDUCTIONS)
    check_solver_options(options)
    pairs = scaled_pairs(as_cost(cost), x, Tx, memory, scale_cost)
    displacement = pairs.cost.paired(x, Tx).mean(-1)
    if not scale_transport_only:
        displacement = displacement / pairs.scale
    strength = entropic_strength(pairs, epsilon, relative_epsilon)
    weight = masses("a", None, x)
    if convention == "debiased":
        transport, solution = divergence(
            pairs, weight, weight, strength, lambda _: strength, False, None, memory, options
        )
    else:
        solution = solve(pairs, weight, weight, strength, **options)
        transport = solution.objective(convention)
    gap = reduce_rows(displacement - transport, reduction)
    return (gap, solution) if return_output else gap


class MongeGap(ScheduledModule):
    r"""The Monge gap of a map on a reference sample, as a loss.

    .. math::
        M(T) = \frac1n \sum_i c(x_i, T(x_i))
        - W_\varepsilon\Big(\frac1n \sum_i \delta_{x_i}, \frac1n \sum_i \delta_{T(x_i)}\Big)

    :func:`monge_gap` with the options kept. ``module.epsilon = 0.1`` changes a given epsilon.

    Args:
        cost: as for :func:`monge_gap`, here and below.
        epsilon: a number is a scheduled quantity.
        relative_epsilon: ``"mean"``, ``"std"`` or None.
        scale_cost: a number, ``"mean"``, ``"median"`` or ``"max"``.
        scale_transport_only: whether the first term is not divided by it.
        convention: ``"entropy"``, ``"kl"``, ``"sharp"`` or ``"debiased"``.
        reduction: over a batch.
        memory: ``"auto"``, ``"dense"`` or ``"streaming"``.
        check_finite: look for NaN and infinity in the points.
        options: how to iterate.

    Shape:
        A map and ``[..., n, d]``, or ``[..., n, d]`` twice, to a loss with no dimensions, ``[...]``
        for ``reduction="none"``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a number or a name is out of range.

    Example:
        >>> import torch
        >>> gap, T = MongeGap(epsilon=0.05), torch.nn.Linear(2, 2)
        >>> x = torch.randn(64, 2)
        >>> gap(T, x).backward()
        >>> torch.equal(gap(T, x), gap(x, T(x)))
        True

    Source:
        Uscidda and Cuturi, 2023, arXiv 2302.04953; from the authors' code in OTT-JAX.
    """

    epsilon: Tensor | None

    def __init__(
        self,
        *,
        cost: CostFn | Callable[[Tensor, Tensor], Tensor] = SqEuclidean(),  # noqa: B008
        epsilon: float | None = None,
        relative_epsilon: RelativeEpsilon | None = None,
        scale_cost: ScaleCost = 1.0,
        scale_transport_only: bool = False,
        convention: GapConvention = "entropy",
        reduction: Reduction = "mean",
        memory: Memory = "auto",
        check_finite: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_one_of("convention", convention, _CONVENTIONS)
        check_one_of("reduction", reduction, REDUCTIONS)
        check_solver_options(options)
        self.cost = as_cost(cost)
        self.convention: GapConvention = convention
        self.options: dict[str, Any] = {
            "relative_epsilon": relative_epsilon,
            "scale_cost": scale_cost,
            "scale_transport_only": scale_transport_only,
            "reduction": reduction,
            "memory": memory,
            "check_finite": check_finite,
            **options,
        }
        if epsilon is None:
            self.epsilon = None
        else:
            self.schedule("epsilon", epsilon, check_epsilon)

    def forward(self, source: Tensor | Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
        """Return the gap of a map, ``gap(T, x)``, or of points and images, ``gap(x, Tx)``."""
        if isinstance(source, Tensor):
            x, Tx = source, target
        elif callable(source):
            x, Tx = target, source(target)
        else:
            raise TypeError(f"source must be a map or a tensor, got {type(source).__name__}")
        gap: Tensor = monge_gap(
            x,
            Tx,
            cost=self.cost,
            epsilon=self.epsilon,
            convention=self.convention,
            **self.options,
        )
        return gap

    def extra_repr(self) -> str:
        """Describe the configuration."""
        epsilon = "None" if self.epsilon is None else f"{self.epsilon.item():g}"
        return f"cost={self.cost}, epsilon={epsilon}, convention={self.convention!r}"
