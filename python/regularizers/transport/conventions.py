"""Options of the solvers here that mean what GeomLoss's and OTT-JAX's arguments mean there."""

from __future__ import annotations

import math
from typing import Any, Literal

from regularizers._shared.checks import check_one_of
from regularizers.transport.cost import CostFn, Euclidean, SqEuclidean


def from_blur(
    blur: float = 0.05,
    *,
    p: Literal[1, 2] = 2,
    reach: float | None = None,
    scaling: float | None = None,
    diameter: float | None = None,
) -> dict[str, Any]:
    r"""Return the options that stand for GeomLoss's arguments.

    .. math::
        c(x, y) = \tfrac1p \|x - y\|_2^p, \qquad \varepsilon = \mathrm{blur}^p, \qquad
        \rho = \mathrm{reach}^p, \qquad \tau = \frac{\rho}{\rho + \varepsilon}

    GeomLoss runs as many iterations as its annealing takes and stops, which at its default
    ``scaling`` can be several per cent from the solution. Here the iteration goes on until the
    marginals fit: values agree with GeomLoss's as its ``scaling`` goes to 1.

    Args:
        blur: length below which points are not told apart, > 0.
        p: 1 (Euclidean distance) or 2 (half its square).
        reach: length above which mass is rather created and destroyed than moved, > 0; None: never.
        scaling: with ``diameter``, anneal epsilon from ``diameter**p`` by ``scaling**p`` an
            iteration, in (0, 1). Saves iterations where epsilon is small against the costs. None:
            no annealing.
        diameter: largest distance between points, > 0.

    Returns:
        Keyword arguments for :func:`~regularizers.transport.sinkhorn`,
        :func:`~regularizers.transport.sinkhorn_divergence` and the others.

    Raises:
        ValueError: a number is out of range, or ``scaling`` and ``diameter`` are not given
            together.

    Example:
        >>> from_blur(0.5, reach=2.0)
        {'cost': SqEuclidean(scale=0.5), 'epsilon': 0.25, 'tau_a': 0.9411..., 'tau_b': 0.9411...}

    Source:
        GeomLoss, ``SamplesLoss("sinkhorn")`` (J. Feydy, 2019, arXiv 1810.08278).
    """
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p}")
    lengths = {"blur": blur, "reach": reach, "diameter": diameter}
    for name, length in lengths.items():
        if length is not None and not 0.0 < length < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {length}")
    if (scaling is None) != (diameter is None):
        raise ValueError(f"scaling and diameter go together, got {scaling} and {diameter}")
    cost: CostFn = SqEuclidean(scale=0.5) if p == 2 else Euclidean()
    epsilon = float(blur**p)
    options: dict[str, Any] = {"cost": cost, "epsilon": epsilon}
    if reach is not None:
        rho = reach**p
        options["tau_a"] = options["tau_b"] = rho / (rho + epsilon)
    if scaling is not None and diameter is not None:
        check_scaling(scaling)
        options["eps_init"] = max((diameter / blur) ** p, 1.0)
        options["eps_decay"] = scaling**p
    return options


def check_scaling(scaling: float) -> None:
    """Raise unless ``scaling`` lies in (0, 1)."""
    if not 0.0 < scaling < 1.0:
        raise ValueError(f"scaling must lie in (0, 1), got {scaling}")


def from_ott(
    *,
    epsilon: float | None = None,
    relative_epsilon: Literal["mean", "std"] | None = None,
    scale_cost: float | Literal["mean", "median", "max_cost"] = 1.0,
    threshold: float = 1e-3,
    norm_error: float = 1,
    inner_iterations: int = 10,
    min_iterations: int = 0,
    max_iterations: int = 2000,
    init: float = 1.0,
    decay: float = 1.0,
    momentum: float = 1.0,
    tau_a: float = 1.0,
    tau_b: float = 1.0,
) -> dict[str, Any]:
    r"""Return the options that stand for OTT-JAX's arguments, with OTT-JAX's defaults.

    Strengths mean the same, costs too (``PointCloud``'s default is :math:`\|x - y\|^2`), and what
    is called ``entropy`` here is OTT-JAX's ``ent_reg_cost``, ``kl`` its ``reg_ot_cost`` of a
    balanced problem. Potentials differ by the masses, :math:`f_{\mathrm{OTT}} = f + \varepsilon
    \log a`; OTT-JAX starts from :math:`f = -\varepsilon \log a`. Its *unbalanced* problem has an
    entropy without masses and is another one.

    Args:
        epsilon: of ``Geometry``.
        relative_epsilon: of ``Geometry``.
        scale_cost: of ``Geometry``.
        threshold: of ``Sinkhorn``; here and below.
        norm_error: 1 or ``math.inf``.
        inner_iterations: how often convergence is tested.
        min_iterations: do not stop before.
        max_iterations: stop at the latest.
        init: of ``Epsilon``, the factor that annealing starts from.
        decay: of ``Epsilon``.
        momentum: over-relaxation; ``"auto"`` here takes far fewer iterations.
        tau_a: of ``LinearProblem``.
        tau_b: of ``LinearProblem``.

    Returns:
        Keyword arguments for :func:`~regularizers.transport.sinkhorn` and the others.

    Raises:
        ValueError: ``norm_error`` or ``scale_cost`` has no counterpart.

    Example:
        >>> options = from_ott(epsilon=0.1, threshold=1e-5, scale_cost="max_cost")
        >>> options["tol"], options["scale_cost"], options["norm_error"]
        (1e-05, 'max', 'l1')

    Source:
        OTT-JAX 0.6, ``ott.geometry`` and ``ott.solvers.linear`` (M. Cuturi et al., 2022,
        arXiv 2201.12324).
    """
    if norm_error not in (1, math.inf):
        raise ValueError(f"norm_error must be 1 or math.inf, got {norm_error}")
    scales = {"mean": "mean", "median": "median", "max_cost": "max"}
    if isinstance(scale_cost, str):
        check_one_of("scale_cost", scale_cost, tuple(scales))
    return {
        "epsilon": epsilon,
        "relative_epsilon": relative_epsilon,
        "scale_cost": scales[scale_cost] if isinstance(scale_cost, str) else scale_cost,
        "tol": threshold,
        "norm_error": "l1" if norm_error == 1 else "linf",
        "inner_iter": inner_iterations,
        "min_iter": min_iterations,
        "max_iter": max_iterations,
        "eps_init": init,
        "eps_decay": decay,
        "momentum": momentum,
        "tau_a": tau_a,
        "tau_b": tau_b,
    }
