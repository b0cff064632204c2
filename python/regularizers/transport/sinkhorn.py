"""Entropic optimal transport between sets of points: potentials, plans, values and maps."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from regularizers import ops
from regularizers._shared.checks import (
    check_floating,
    check_one_of,
    check_same_device,
    check_same_dtype,
)
from regularizers.ops._operator import accumulate_dtype, transformed
from regularizers.ops._sinkhorn_arguments import check_options
from regularizers.transport._pairs import MEMORIES, SCALES, Memory, Pairs, make_pairs
from regularizers.transport.cost import CostFn, SqEuclidean, as_cost

Convention = Literal["kl", "entropy", "sharp", "dual"]
Differentiate = Literal["envelope", "implicit", "unroll"]
RelativeEpsilon = Literal["mean", "std"]
ScaleCost = float | Literal["mean", "median", "max"]
CONVENTIONS = ("kl", "entropy", "sharp", "dual")
_DIFFERENTIATE = ("envelope", "implicit", "unroll")
_RELATIVE = ("mean", "std")
_DEFAULTS: dict[str, Any] = {  # of the options that losses hand on
    "max_iter": 2000,
    "min_iter": 0,
    "inner_iter": 1,
    "tol": 1e-3,
    "norm_error": "l1",
    "eps_init": 1.0,
    "eps_decay": 1.0,
    "momentum": "auto",
    "tau_a": 1.0,
    "tau_b": 1.0,
}
_INSIDE = ("regularizers.", "torch.")  # a warning is about the code that called from outside


def sinkhorn(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    cost: CostFn | Callable[[Tensor, Tensor], Tensor] = SqEuclidean(),  # noqa: B008  immutable
    epsilon: float | Tensor | None = None,
    relative_epsilon: RelativeEpsilon | None = None,
    scale_cost: ScaleCost = 1.0,
    max_iter: int = 2000,
    min_iter: int = 0,
    inner_iter: int = 1,
    tol: float = 1e-3,
    norm_error: Literal["l1", "linf"] = "l1",
    eps_init: float = 1.0,
    eps_decay: float = 1.0,
    symmetric: bool = False,
    momentum: float | Literal["auto"] = "auto",
    tau_a: float = 1.0,
    tau_b: float = 1.0,
    memory: Memory = "auto",
    differentiate: Differentiate = "envelope",
    check_finite: bool | None = None,
    f0: Tensor | None = None,
    g0: Tensor | None = None,
) -> SinkhornSolution:
    r"""Transport one set of weighted points onto another at least entropic cost.

    .. math::
        \min_{P \ge 0} \langle P, C \rangle + \varepsilon \, \mathrm{KL}(P \,\|\, a b^\top)
        \quad\text{with}\quad P 1 = a, \; P^\top 1 = b, \qquad C_{ij} = c(x_i, y_j) / s

    with the solution :math:`P_{ij} = a_i b_j \exp((f_i + g_j - C_{ij}) / \varepsilon)`. With
    ``tau_a`` or ``tau_b`` below 1 the marginals are soft: a penalty :math:`\rho\,\mathrm{KL}(P 1
    \| a)`, :math:`\rho = \varepsilon \tau / (1 - \tau)`, takes the place of the constraint.

    The value is differentiable in ``x``, ``y``, ``a`` and ``b`` by the envelope theorem, to any
    order, and never goes back through the iterations. ``epsilon`` is a constant.

    Args:
        x: ``[..., n, d]``; float32, float64, bfloat16 or float16 (computed in float32).
        y: ``[..., m, d]``, dtype and leading dimensions of ``x``; one call solves the batch.
        a: ``[..., n]``, masses of x, not negative; 1/n when omitted. A point of mass 0 takes no
            part and has gradient 0.
        b: ``[..., m]``, masses of y; their total is that of ``a`` in a balanced problem.
        cost: a :class:`~regularizers.transport.CostFn`, or a function
            ``(x [n, d], y [m, d]) -> [n, m]``.
        epsilon: entropic strength, the number in :math:`\exp(-C / \varepsilon)`, in units of C.
            None takes 0.05 of the statistic that ``relative_epsilon`` names, or of ``"std"``.
        relative_epsilon: ``"mean"`` or ``"std"`` of all entries of C (points of mass 0 count too):
            a multiple of it is meant. The statistic is not differentiated.
        scale_cost: s, a positive number or ``"mean"``, ``"median"`` or ``"max"`` of the costs, and
            then differentiated. Values come out in the rescaled units.
        max_iter: as for ``regularizers.ops.sinkhorn``, down to ``tau_b``.
        min_iter: do not stop before.
        inner_iter: test for convergence every so many iterations.
        tol: stop when the error of the marginals is at most this; 0 runs all iterations.
        norm_error: ``"l1"`` or ``"linf"``, how errors are measured.
        eps_init: with ``eps_decay``, anneal ``epsilon`` from this multiple.
        eps_decay: in (0, 1].
        symmetric: ``y`` is ``x`` and ``b`` is ``a``: averaged updates, a few iterations.
        momentum: over-relaxation in (0, 2), or ``"auto"``.
        tau_a: softness of the rows' marginals in (0, 1]; 1 holds them exactly.
        tau_b: the same for the columns.
        memory: ``"dense"`` stores the n m costs; ``"streaming"`` computes them tile by tile in each
            iteration (squared Euclidean, Euclidean and cosine cost); ``"auto"`` streams above
            2^26 costs where the cost can.
        differentiate: what the derivative of ``f``, ``g`` and all that is made of them is.
            ``"envelope"``: constants. ``"implicit"``: that of the exact solution, by one linear
            system. ``"unroll"``: that of ``max_iter`` plain iterations, differentiated one by one
            (``"dense"`` only; their memory adds up).
        check_finite: look for NaN and infinity in the points first. By default on a CPU only; on a
            GPU it takes a synchronisation.
        f0: ``[..., n]``, where to start, say the ``f`` of a similar problem.
        g0: ``[..., m]``, where to start; if given, the first update is that of f.

    Returns:
        A :class:`SinkhornSolution`. Where it has not converged, and ``tol`` is not 0, a
        ``RuntimeWarning`` says so on a CPU (elsewhere it would take a synchronisation).

    Raises:
        TypeError: a tensor or number is of the wrong type.
        ValueError: a shape does not fit, a number or name is out of range, ``memory`` does not
            suit; on a CPU also: masses are negative or their totals differ, a point is not finite,
            or all costs are equal and ``epsilon`` is relative to their deviation.

    Example:
        >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.5]])
        >>> found = sinkhorn(x, y, epsilon=0.05, tol=1e-5)
        >>> found.value, found.objective("sharp")
        (tensor(5.1597), tensor(5.1250))
        >>> found.transport()
        tensor([[2.0000],
                [3.5000]])

    Source:
        M. Cuturi, "Sinkhorn Distances", 2013, arXiv 1306.0895. Rules for ``epsilon`` and
        ``scale_cost`` from OTT-JAX, the code of the Monge gap (Uscidda and Cuturi, 2023, arXiv
        2302.04953).
    """
    check_points(x, y, check_finite)
    check_one_of("differentiate", differentiate, _DIFFERENTIATE)
    check_one_of("memory", memory, MEMORIES)
    if differentiate == "unroll":
        if memory == "streaming":
            raise ValueError("memory must not be 'streaming' with differentiate='unroll'")
        memory = "dense"
    pairs = scaled_pairs(as_cost(cost), x, y, memory, scale_cost)
    strength = entropic_strength(pairs, epsilon, relative_epsilon)
    return solve(
        pairs, masses("a", a, x), masses("b", b, y), strength,
        differentiate=differentiate, max_iter=max_iter, min_iter=min_iter, inner_iter=inner_iter,
        tol=tol, norm_error=norm_error, eps_init=eps_init, eps_decay=eps_decay, momentum=momentum,
        tau_a=tau_a, tau_b=tau_b, symmetric=symmetric, f0=f0, g0=g0,
    )  # fmt: skip


class SinkhornSolution:
    r"""Potentials of entropic transport between points, and what follows from them.

    :func:`sinkhorn` makes it. The plan :math:`P_{ij} = a_i b_j \exp((f_i + g_j - C_{ij}) /
    \varepsilon)` is written out by :meth:`plan` alone; everything else multiplies by it. Whether
    ``f``, ``g``, the plan and maps are constants is what ``differentiate`` says (products and maps
    are differentiable in what they are applied to all the same); values always have derivatives,
    the right ones.

    Attributes:
        f: ``[..., n]``, potential of x.
        g: ``[..., m]``, potential of y.
        value: ``[...]``, ``objective("kl")``.
        n_iter: ``[...]`` int64, iterations that were run.
        marginal_error: ``[...]``, distance of the marginals from what they should be.
        converged: ``[...]`` bool, whether that is at most ``tol``.
        epsilon: the strength that was used, float64, ``[]`` or ``[...]``; to freeze a relative one.

    Example:
        >>> x, y = torch.randn(30, 2), torch.randn(40, 2) + 1
        >>> found = sinkhorn(x, y)
        >>> found.plan().shape, found.apply(y).shape, bool(found.converged)
        (torch.Size([30, 40]), torch.Size([30, 2]), True)
        >>> found.transport(torch.randn(5, 2)).shape
        torch.Size([5, 2])
    """

    f: Tensor
    g: Tensor
    value: Tensor
    n_iter: Tensor
    marginal_error: Tensor
    converged: Tensor
    epsilon: Tensor

    def __init__(
        self,
        pairs: Pairs,
        a: Tensor,
        b: Tensor,
        epsilon: Tensor,
        found: ops.SinkhornOutput,
        *,
        balanced: bool,
        constant: bool,
    ) -> None:
        self._values = (pairs, a, b, found.f, found.g)  # what values are differentiated through
        self._balanced = balanced
        self._pairs, self._a, self._b = pairs, a, b
        self.f, self.g = found.f, found.g
        if constant:
            self._pairs, self._a, self._b = pairs.detached(), a.detach(), b.detach()
            self.f, self.g = found.f.detach(), found.g.detach()
        self.value, self.n_iter = found.value, found.n_iter
        self.marginal_error, self.converged = found.marginal_error, found.converged
        self.epsilon = epsilon

    def objective(self, convention: Convention = "kl") -> Tensor:
        r"""Return one of four values that are called the cost of entropic transport.

        For masses that sum to 1, with :math:`H(p) = -\sum p \log p`:

        - ``"kl"``: :math:`\langle P, C \rangle + \varepsilon\,\mathrm{KL}(P \| a b^\top)`, for soft
          marginals plus their penalties.
        - ``"entropy"``: :math:`\langle P, C \rangle - \varepsilon H(P)`, which is
          ``"kl"`` :math:`- \varepsilon (H(a) + H(b))`.
        - ``"sharp"``: :math:`\langle P, C \rangle`.
        - ``"dual"``: :math:`\sum_i a_i (f_i + \varepsilon \log a_i) + \sum_j b_j (g_j +
          \varepsilon \log b_j)`, the dual objective that ``"entropy"`` equals on convergence.

        The derivatives of ``"kl"`` and ``"entropy"`` are those of the envelope theorem, those of
        ``"sharp"`` and ``"dual"`` implicit (a linear system in the backward pass), whatever
        ``differentiate`` says.

        Returns:
            ``[...]``.

        Raises:
            ValueError: the name is unknown, or the value is not defined for soft marginals
                (``"entropy"``, ``"dual"``).
        """
        check_one_of("convention", convention, CONVENTIONS)
        if convention == "kl":
            return self.value
        pairs, a, b, f, g = self._values
        if convention == "sharp":
            return pairs.total_cost(f, g, a, b, self.epsilon)
        if not self._balanced:
            raise ValueError(
                f"convention must be 'kl' or 'sharp' with soft marginals, got {convention!r}"
            )
        strength = self.epsilon.to(a.dtype)
        entropies = strength * (_entropy(a) + _entropy(b))
        if convention == "dual":
            return (a * f).sum(-1) + (b * g).sum(-1) - entropies
        mass = a.sum(-1)
        return self.value - entropies + strength * (mass - mass * b.sum(-1))

    def plan(self) -> Tensor:
        """Return the plan, ``[..., n, m]``."""
        return self._pairs.plan(self.f, self.g, self._a, self._b, self.epsilon)

    def apply(self, v: Tensor) -> Tensor:
        """Return P v, ``[..., n, k]``, for v ``[..., m, k]``; streamed where the costs are."""
        return self._pairs.apply(self.f, self.g, v, self._a, self._b, self.epsilon)

    def apply_transposed(self, u: Tensor) -> Tensor:
        """Return P^T u, ``[..., m, k]``, for u ``[..., n, k]``."""
        return self._pairs.apply(self.f, self.g, u, self._a, self._b, self.epsilon, transposed=True)

    def potential(self, points: Tensor) -> Tensor:
        r"""Return the potential f at points that need not be those of the problem.

        .. math:: f(z) = -\varepsilon \log \sum_j b_j \exp((g_j - c(z, y_j)) / \varepsilon)

        With soft marginals the potential of the problem is ``tau_a`` times this.

        Args:
            points: ``[..., k, d]``, differentiable.

        Returns:
            ``[..., k]``.
        """
        check_points(points, self._pairs.points[1], None, "points")
        return self._pairs.between(points).rows(self.g, self._b, self.epsilon)

    def transport(self, points: Tensor | None = None) -> Tensor:
        r"""Return where points go on average: the barycentric map of the plan.

        .. math::
            T(z) = \frac{\sum_j b_j e^{(g_j - c(z, y_j)) / \varepsilon} y_j}
            {\sum_j b_j e^{(g_j - c(z, y_j)) / \varepsilon}}

        At a point :math:`x_i` it is row i of the plan, normalised, times y. Elsewhere it is the map
        that the potential g extends to; for the squared Euclidean cost the entropic map
        :math:`z - \tfrac12 \nabla f(z)`.

        Args:
            points: ``[..., k, d]``, by default x; differentiable.

        Returns:
            ``[..., k, d]``.

        Source:
            A. Pooladian and J. Niles-Weed, 2021, arXiv 2109.12004.
        """
        pairs, f = self._pairs, self.f
        if points is not None:
            check_points(points, pairs.points[1], None, "points")
            pairs = pairs.between(points)
        if points is not None or not self._balanced:
            f = pairs.rows(self.g, self._b, self.epsilon)
        # Whatever f is, it cancels in the quotient, with its derivative.
        f = f.detach()
        targets = pairs.points[1].to(f.dtype)
        values = torch.cat((targets, torch.ones_like(targets[..., :1])), -1)
        sums = pairs.apply(f, self.g, values, torch.ones_like(f), self._b, self.epsilon)
        return sums[..., :-1] / sums[..., -1:]

    def __repr__(self) -> str:
        shape = [*self.f.shape, self.g.shape[-1]]
        return f"{type(self).__name__}({shape}, n_iter={self.n_iter.tolist()})"


def sinkhorn_cost(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    convention: Convention = "kl",
    **options: Any,
) -> Tensor:
    r"""Return a value of entropic transport between two sets of points, differentiable.

    .. math::
        W_\varepsilon = \min_P \langle P, C \rangle + \varepsilon\,\mathrm{KL}(P \| a b^\top)

    Args:
        x: ``[..., n, d]``.
        y: ``[..., m, d]``.
        a: ``[..., n]``; 1/n when omitted.
        b: ``[..., m]``; 1/m when omitted.
        convention: which of the four values :meth:`SinkhornSolution.objective` lists.
        options: those of :func:`sinkhorn`.

    Returns:
        ``[...]``; float32 for half-precision points.

    Raises:
        TypeError: as :func:`sinkhorn`.
        ValueError: likewise, or ``convention`` is unknown.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> sinkhorn_cost(x, x, epsilon=1.0), sinkhorn_cost(x, x, epsilon=1.0, convention="sharp")
        (tensor(0.3799), tensor(0.2689))

    Source:
        As :func:`sinkhorn`.
    """
    check_one_of("convention", convention, CONVENTIONS)
    return sinkhorn(x, y, a, b, **options).objective(convention)


# --- Shared by the losses -------------------------------------------------------------------------


def solve(
    pairs: Pairs,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    *,
    differentiate: Differentiate = "envelope",
    **options: Any,
) -> SinkhornSolution:
    """Solve between pairs whose arguments have been checked, and warn where that failed."""
    if differentiate == "unroll":
        options["unroll"] = True
    found = pairs.solve(a, b, epsilon, **options)
    if options.get("tol", _DEFAULTS["tol"]) > 0.0 and _is_visible(found.converged):
        _warn_unless_converged(found)
    return SinkhornSolution(
        pairs,
        a,
        b,
        epsilon,
        found,
        balanced=options.get("tau_a", 1.0) == options.get("tau_b", 1.0) == 1.0,
        constant=differentiate == "envelope",
    )


def _warn_unless_converged(found: ops.SinkhornOutput) -> None:
    if bool(found.converged.all()):
        return
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(_INSIDE):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(
        f"Sinkhorn's iteration has not converged: marginal error "
        f"{found.marginal_error.max().item():.1e} after {int(found.n_iter.max())} iterations; "
        "raise max_iter or epsilon, or anneal with eps_init and eps_decay",
        RuntimeWarning,
        stacklevel=depth + 1,
    )


def check_points(
    x: Tensor, y: Tensor, check_finite: bool | None, first: str = "x", second: str = "y"
) -> None:
    """Check two sets of points, called so in errors."""
    for label, points in ((first, x), (second, y)):
        check_floating(label, points)
        if points.dim() < 2 or 0 in points.shape[-2:]:
            raise ValueError(
                f"{label} must have shape [..., points, d] and hold points, "
                f"got {list(points.shape)}"
            )
    check_same_dtype(second, y, first, x)
    check_same_device(second, y, first, x)
    if y.shape[:-2] != x.shape[:-2] or y.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"{second} must have shape {[*x.shape[:-2], 'm', x.shape[-1]]} to fit {first}, "
            f"got {list(y.shape)}"
        )
    for label, points in ((first, x), (second, y)):
        if check_finite is False or not (check_finite or _is_visible(points)):
            continue
        if not bool(points.isfinite().all()):
            raise ValueError(f"{label} must be finite, got NaN or infinity")


def check_solver_options(options: dict[str, Any]) -> None:
    """Check the options of a loss that say how to iterate, names and values."""
    for name in options:
        if name not in _DEFAULTS:
            raise TypeError(f"{name} is not an option here; there are {', '.join(_DEFAULTS)}")
    check_options(symmetric=False, **{**_DEFAULTS, **options})


def masses(name: str, weight: Tensor | None, points: Tensor) -> Tensor:
    """Return masses ``[..., n]``; 1/n each when none are given. The solver checks them."""
    dtype = accumulate_dtype(points.dtype)
    if weight is None:
        n = points.shape[-2]
        return torch.full(points.shape[:-1], 1 / n, dtype=dtype, device=points.device)
    check_floating(name, weight)
    return weight.to(dtype)


def scaled_pairs(
    cost: CostFn, x: Tensor, y: Tensor, memory: Memory, scale_cost: ScaleCost | Tensor
) -> Pairs:
    """Return the pairs of two sets of points with their costs divided by ``scale_cost``."""
    if isinstance(scale_cost, str):
        check_one_of("scale_cost", scale_cost, SCALES)
    elif not isinstance(scale_cost, Tensor):
        if isinstance(scale_cost, bool) or not isinstance(scale_cost, (int, float)):
            raise TypeError(
                f"scale_cost must be a number or a name, got {type(scale_cost).__name__}"
            )
        if not 0.0 < scale_cost < float("inf"):
            raise ValueError(f"scale_cost must be positive and finite, got {scale_cost}")
    pairs = make_pairs(cost, x, y, memory)
    scale = pairs.statistic(scale_cost)
    return pairs if not isinstance(scale, Tensor) and scale == 1.0 else pairs.rescaled(scale)


def entropic_strength(
    pairs: Pairs, epsilon: float | Tensor | None, relative: RelativeEpsilon | None
) -> Tensor:
    """Return epsilon as a float64 tensor without derivatives, from a number or a statistic."""
    x = pairs.points[0]
    if relative is not None:
        check_one_of("relative_epsilon", relative, _RELATIVE)
    elif epsilon is None:
        relative = "std"
    if epsilon is None:
        epsilon = 0.05
    if not isinstance(epsilon, Tensor):
        if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float, torch.SymFloat)):
            raise TypeError(f"epsilon must be a number or a tensor, got {type(epsilon).__name__}")
        if not 0.0 < epsilon < float("inf"):
            raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
        epsilon = torch.full((), epsilon, dtype=torch.float64, device=x.device)
    if not epsilon.is_floating_point() or epsilon.shape not in ((), x.shape[:-2]):
        raise ValueError(
            f"epsilon must be a number or a floating-point tensor of shape [] or "
            f"{list(x.shape[:-2])}, got {epsilon.dtype} of shape {list(epsilon.shape)}"
        )
    strength = epsilon.detach().double()
    if relative is None:
        return strength
    with torch.no_grad():
        return strength * (pairs.mean() if relative == "mean" else pairs.std())


def _is_visible(values: Tensor) -> bool:
    """Tell whether values can be looked at without stopping a GPU or breaking a graph."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()


def _entropy(weight: Tensor) -> Tensor:
    # The derivative at mass 0, minus infinity, is taken as 0: such points take no part.
    positive = torch.where(weight > 0, weight, 1)
    return -(positive * positive.log()).sum(-1)
