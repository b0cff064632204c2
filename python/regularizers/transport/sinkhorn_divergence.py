"""The Sinkhorn divergence: entropic transport without its bias, a loss between samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from regularizers._shared.checks import check_one_of
from regularizers._shared.reductions import REDUCTIONS, Reduction, reduce_rows
from regularizers._shared.scheduled import ScheduledModule
from regularizers.transport._pairs import Memory, Pairs, own_pairs
from regularizers.transport.conventions import check_scaling, from_blur
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
    sinkhorn,
    solve,
)


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    cost: CostFn | Callable[[Tensor, Tensor], Tensor] = SqEuclidean(),  # noqa: B008  immutable
    epsilon: float | Tensor | None = None,
    relative_epsilon: RelativeEpsilon | None = None,
    scale_cost: ScaleCost = 1.0,
    share_epsilon: bool = True,
    static_y: bool = False,
    offset_yy: float | Tensor | None = None,
    reduction: Reduction = "mean",
    memory: Memory = "auto",
    check_finite: bool | None = None,
    **options: Any,
) -> Tensor:
    r"""Compare two sets of weighted points; 0 iff they are the same measure.

    .. math::
        S_\varepsilon = W_\varepsilon(x, y) - \tfrac12 W_\varepsilon(x, x)
        - \tfrac12 W_\varepsilon(y, y) + \tfrac\varepsilon2 \Big(\sum_i a_i - \sum_j b_j\Big)^2

    with :math:`W_\varepsilon = \min_P \langle P, C \rangle + \varepsilon\,\mathrm{KL}(P \| a
    b^\top)`. It goes from the optimal transport cost at :math:`\varepsilon \to 0` to the squared
    distance of the means (squared Euclidean cost) at :math:`\varepsilon \to \infty`. The terms of x
    with x and y with y take a few averaged updates of one potential each.

    Differentiable in x, y, a and b by the envelope theorem; never through iterations.

    The samples are those of one process. To compare samples spread over ranks, gather them first
    (``torch.distributed.nn.all_gather``): no sum of local divergences is the divergence of all.

    Args:
        x: ``[..., n, d]``; leading dimensions are a batch, solved at once.
        y: ``[..., m, d]``.
        a: ``[..., n]``, masses; 1/n when omitted.
        b: ``[..., m]``, masses; 1/m when omitted.
        cost: as for :func:`~regularizers.transport.sinkhorn`; symmetric, 0 from a point to itself.
        epsilon: as there.
        relative_epsilon: as there.
        scale_cost: as there; a statistic is that of the costs from x to y, for all three terms.
        share_epsilon: whether all terms take the relative epsilon of x and y, not each its own.
        static_y: y is fixed data: leave its own term out, a constant. The gradient in y then lacks
            a part.
        offset_yy: with ``static_y``, :math:`W_\varepsilon(y, y)` from before; half of it is
            subtracted. ``sinkhorn_cost(y, y, b, b, symmetric=True, epsilon=...)`` gives it.
        reduction: over the batch: ``"mean"``, ``"sum"`` or ``"none"``.
        memory: as for :func:`~regularizers.transport.sinkhorn`; ``"auto"`` streams the terms of x
            and of y, which take few iterations, up to 16 features.
        check_finite: as there.
        options: how to iterate, names and defaults as there: ``max_iter``, ``min_iter``,
            ``inner_iter``, ``tol``, ``norm_error``, ``eps_init``, ``eps_decay``, ``momentum``,
            ``tau_a`` and ``tau_b``, which are equal. Annealing and momentum serve the term of x and
            y alone.

    Returns:
        A tensor with no dimensions, or ``[...]`` for ``reduction="none"``; float32 for
        half-precision points.

    Raises:
        TypeError: as :func:`~regularizers.transport.sinkhorn`; an option is unknown.
        ValueError: likewise; or ``tau_a`` and ``tau_b`` differ, or there is an ``offset_yy``
            without ``static_y``.

    Example:
        >>> x = torch.randn(50, 2)
        >>> shift = torch.tensor([3.0, 4.0])
        >>> sinkhorn_divergence(x + shift, x, epsilon=5.0, tol=1e-5).round(decimals=3)  # |shift|^2
        tensor(25.)

    Source:
        A. Genevay, G. Peyré, M. Cuturi, 2018, arXiv 1706.00292; J. Feydy et al., 2019, arXiv
        1810.08278; soft marginals: T. Séjourné et al., 2019, arXiv 1910.12958. Conventions of
        OTT-JAX, but for the scale of costs, which there is each term's own.
    """
    check_points(x, y, check_finite)
    check_one_of("reduction", reduction, REDUCTIONS)
    check_solver_options(options)
    if offset_yy is not None and not static_y:
        raise ValueError("offset_yy needs static_y=True: the term of y is computed otherwise")
    pairs = scaled_pairs(as_cost(cost), x, y, memory, scale_cost)
    a, b = masses("a", a, x), masses("b", b, y)
    strength = entropic_strength(pairs, epsilon, relative_epsilon)
    if not share_epsilon:
        own = lambda pairs: entropic_strength(pairs, epsilon, relative_epsilon)  # noqa: E731
    else:
        own = lambda pairs: strength  # noqa: E731
    value, _ = divergence(pairs, a, b, strength, own, static_y, offset_yy, memory, options)
    return reduce_rows(value, reduction)


def divergence(
    pairs: Pairs,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    own_epsilon: Callable[[Pairs], Tensor],
    static_y: bool,
    offset_yy: float | Tensor | None,
    memory: Memory,
    options: dict[str, Any],
) -> tuple[Tensor, SinkhornSolution]:
    """Return the divergences ``[...]`` and the solution between x and y."""
    tau_a, tau_b = options.get("tau_a", 1.0), options.get("tau_b", 1.0)
    if tau_a != tau_b:
        raise ValueError(f"tau_b must equal tau_a = {tau_a} in a divergence, got {tau_b}")
    between = solve(pairs, a, b, epsilon, **options)
    of_one: dict[str, Any] = {**options, "eps_init": 1.0, "symmetric": True}

    def own(side: Literal[0, 1], weight: Tensor) -> Tensor:
        within = own_pairs(pairs, side, memory)
        return solve(within, weight, weight, own_epsilon(within), **of_one).value

    value = between.value - 0.5 * own(0, a)
    if not static_y:
        value = value - 0.5 * own(1, b)
    elif offset_yy is not None:
        value = value - 0.5 * offset_yy
    if tau_a < 1.0:
        excess = a.sum(-1) - b.sum(-1)
        value = value + 0.5 * epsilon.to(a.dtype) * excess.square()
    return value, between


class SinkhornDivergence(ScheduledModule):
    r"""The Sinkhorn divergence as a loss; with ``blur``, a stand-in for ``SamplesLoss``.

    .. math::
        S_\varepsilon(x, y) = W_\varepsilon(x, y) - \tfrac12 W_\varepsilon(x, x)
        - \tfrac12 W_\varepsilon(y, y)

    :func:`sinkhorn_divergence` with the options kept. With ``blur`` the cost is :math:`\frac1p \|x
    - y\|^p` and epsilon is ``blur**p``, as :func:`~regularizers.transport.from_blur` has it. What
    differs from GeomLoss: the iteration runs until it has converged (``tol``, ``max_iter``), and
    masses go last, ``loss(x, y, a, b)``. ``module.epsilon = 0.1`` changes a given epsilon between
    steps (``reach`` keeps the ``tau_a`` and ``tau_b`` that it gave for ``blur``).

    Args:
        blur: length scale in place of ``cost`` and ``epsilon``.
        p: with ``blur``: 1 or 2.
        reach: with ``blur``: length scale of soft marginals.
        scaling: with ``blur``: annealing, in (0, 1). GeomLoss's default 0.5 saves less here than it
            does there; 0.9 often takes fewest iterations where blur is small.
        diameter: with ``scaling``: largest distance of points. None: measured at every call as
            GeomLoss does, which synchronises with a GPU and does not compile.
        debias: whether to subtract the terms of x with x and of y with y; without, the value is
            :math:`W_\varepsilon(x, y)`.
        cost: as for :func:`sinkhorn_divergence`, here and below.
        epsilon: a number is a scheduled quantity.
        relative_epsilon: ``"mean"``, ``"std"`` or None.
        scale_cost: a number, ``"mean"``, ``"median"`` or ``"max"``.
        share_epsilon: one epsilon for all terms.
        static_y: leave the constant term of y out.
        reduction: over a batch.
        memory: ``"auto"``, ``"dense"`` or ``"streaming"``.
        check_finite: look for NaN and infinity in the points.
        options: how to iterate.

    Shape:
        ``[..., n, d]``, ``[..., m, d]`` (and masses ``[..., n]``, ``[..., m]``) to a loss with no
        dimensions, ``[...]`` for ``reduction="none"``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a number is out of range, or ``blur`` meets ``epsilon``, ``relative_epsilon`` or
            ``cost``, or an argument of ``blur`` comes without it.

    Example:
        >>> loss = SinkhornDivergence(blur=0.1)
        >>> x = torch.randn(64, 2, requires_grad=True)
        >>> loss(x, torch.randn(80, 2)).backward()
        >>> x.grad.shape
        torch.Size([64, 2])

    Source:
        J. Feydy et al., 2019, arXiv 1810.08278; GeomLoss for ``blur``, ``reach`` and ``scaling``.
    """

    epsilon: Tensor | None

    def __init__(
        self,
        *,
        blur: float | None = None,
        p: Literal[1, 2] = 2,
        reach: float | None = None,
        scaling: float | None = None,
        diameter: float | None = None,
        debias: bool = True,
        cost: CostFn | Callable[[Tensor, Tensor], Tensor] | None = None,
        epsilon: float | None = None,
        relative_epsilon: RelativeEpsilon | None = None,
        scale_cost: ScaleCost = 1.0,
        share_epsilon: bool = True,
        static_y: bool = False,
        reduction: Reduction = "mean",
        memory: Memory = "auto",
        check_finite: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_one_of("reduction", reduction, REDUCTIONS)
        settings: dict[str, Any] = {**options}
        self._measured: tuple[float, float, int] | None = None  # scaling, blur, p
        if blur is not None:
            for name, given in (("epsilon", epsilon), ("relative_epsilon", relative_epsilon)):
                if given is not None:
                    raise ValueError(f"{name} must not be given with blur, which sets epsilon")
            if cost is not None:
                raise ValueError("cost must not be given with blur, which comes with |x - y|^p / p")
            if scaling is not None and diameter is None:
                check_scaling(scaling)
                self._measured = (scaling, blur, p)
                scaling = None
            settings |= from_blur(blur, p=p, reach=reach, scaling=scaling, diameter=diameter)
            cost, epsilon = settings.pop("cost"), settings.pop("epsilon")
        else:
            for name, length in (("reach", reach), ("scaling", scaling), ("diameter", diameter)):
                if length is not None:
                    raise ValueError(f"{name} must not be given without blur")
        check_solver_options(settings)
        self.cost = as_cost(SqEuclidean() if cost is None else cost)
        self.debias = debias
        self.reduction: Reduction = reduction
        self.options: dict[str, Any] = {
            "relative_epsilon": relative_epsilon,
            "scale_cost": scale_cost,
            "memory": memory,
            "check_finite": check_finite,
            **settings,
        }
        self._debiasing: dict[str, Any] = {"share_epsilon": share_epsilon, "static_y": static_y}
        if epsilon is None:
            self.epsilon = None
        else:
            self.schedule("epsilon", epsilon, check_epsilon)

    def forward(
        self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None
    ) -> Tensor:
        """Return the loss."""
        options = {"cost": self.cost, "epsilon": self.epsilon, **self.options}
        if self._measured is not None:
            scaling, blur, p = self._measured
            options["eps_init"] = max((_diameter(x, y) / blur) ** p, 1.0)
            options["eps_decay"] = scaling**p
        if self.debias:
            return sinkhorn_divergence(
                x, y, a, b, reduction=self.reduction, **self._debiasing, **options
            )
        return reduce_rows(sinkhorn(x, y, a, b, **options).value, self.reduction)

    def extra_repr(self) -> str:
        """Describe the configuration."""
        epsilon = "None" if self.epsilon is None else f"{self.epsilon.item():g}"
        return f"cost={self.cost}, epsilon={epsilon}, debias={self.debias}"


def check_epsilon(name: str, value: float) -> None:
    """Raise unless ``value`` is positive and finite."""
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _diameter(x: Tensor, y: Tensor) -> float:
    """Return the diagonal of the box around all points."""
    points = torch.cat((x.detach().flatten(0, -2), y.detach().flatten(0, -2))).float()
    return max(float((points.amax(0) - points.amin(0)).norm()), 1e-30)
