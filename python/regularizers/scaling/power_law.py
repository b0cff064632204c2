"""Saturating power laws of the loss: fits, asymptotes, and what they say about data."""

from __future__ import annotations

import functools
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regularizers._shared.checks import check_at_least, check_positive
from regularizers.scaling._least_squares import fit_curves

Numbers = Tensor | Sequence[float]


@dataclass(frozen=True)
class PowerLawFit:
    r"""A fitted law :math:`L(x) = E + A x^{-\alpha}`; :func:`fit_power_law` makes it.

    Attributes:
        E: the asymptote, loss for infinite x.
        A: the coefficient, above 0, in units of loss times those of x to the alpha.
        alpha: the exponent, above 0.
        stderr: bootstrap standard errors of (E, A, alpha); NaN where there are no more points than
            parameters or no bootstrap was asked for, 0 for an exponent that was given.
        residual: root of the mean squared log residual.
        identifiable: False where E ended on a bound, or alpha outside [1e-3, 1e3]: the data do not
            tell the asymptote.

    Example:
        >>> law = PowerLawFit(E=3.0, A=2.0, alpha=0.5)
        >>> law.predict(torch.tensor([1.0, 4.0])), law.inverse(4.0)
        (tensor([5., 4.]), tensor(4.))
    """

    E: float
    A: float
    alpha: float
    stderr: tuple[float, float, float] = (math.nan, math.nan, math.nan)
    residual: float = math.nan
    identifiable: bool = True

    @property
    def asymptote(self) -> float:
        """E, the loss for infinite x."""
        return self.E

    def predict(self, x: float | Tensor) -> Tensor:
        """Return the loss at ``x`` ``[*]``."""
        result: Tensor = self.E + self.A * torch.as_tensor(x) ** -self.alpha
        return result

    def inverse(self, loss: float | Tensor) -> Tensor:
        r"""Return the x of a loss, :math:`(A / (L - E))^{1 / \alpha}`; inf for L <= E."""
        above = torch.as_tensor(loss) - self.E
        found: Tensor = (self.A / above.clamp(min=0)) ** (1 / self.alpha)
        return found


def fit_power_law(
    x: Numbers,
    loss: Numbers,
    *,
    weights: Numbers | None = None,
    alpha: float | None = None,
    asymptote_bounds: tuple[float, float] | None = None,
    huber_delta: float | None = None,
    num_restarts: int = 16,
    num_bootstrap: int = 200,
    seed: int = 0,
) -> PowerLawFit:
    r"""Fit a power law that saturates: a straight line of logarithms would miss the asymptote.

    .. math:: L(x) = E + A x^{-\alpha}, \qquad
        \min_{\log A,\, \log \alpha,\, E} \sum_i w_i\, \rho(\log L(x_i) - \log L_i),
        \quad E < \min_i L_i

    in float64, from several exponents at once. Each start solves for E and A as they enter, which
    is linearly; damped Gauss-Newton steps follow. The standard errors are those of a bootstrap over
    residuals (of :math:`\log L`, enlarged for the parameters fitted): four points leave too few
    distinct ones to draw points instead.

    Args:
        x: model size, members, tokens ...: ``[n]``, above 0, in any unit.
        loss: ``[n]``, above 0.
        weights: of the points ``[n]``, at least 0; equal when omitted.
        alpha: a known exponent, above 0; fitted when omitted.
        asymptote_bounds: lowest and highest E; 0 and the lowest loss when omitted.
        huber_delta: log residuals above it count linearly (1e-3 is common for scaling laws); None:
            least squares.
        num_restarts: exponents to start from, between 0.02 and 8.
        num_bootstrap: fits behind the standard errors; 0: none.
        seed: of the bootstrap. The global generator is left alone.

    Returns:
        The fit. Predictions are in the units of ``x``.

    Raises:
        TypeError: ``num_restarts`` or ``num_bootstrap`` is not an int.
        ValueError: the points are fewer than the parameters (3, or 2 with ``alpha``) at distinct x,
            something is not positive or not finite, shapes differ, or the bounds leave no room.

    Warns:
        UserWarning: E ended on a bound, or alpha near 0 or infinity, as for losses that do not
            fall; ``identifiable`` is False.

    Example:
        >>> x = torch.tensor([0.15, 0.3, 0.6, 1.4]).double()
        >>> law = fit_power_law(x, 0.05 * x**-1.02 + 3.43)
        >>> round(law.E, 6), round(law.A, 6), round(law.alpha, 6)
        (3.43, 0.05, 1.02)

    Source:
        "Pre-training under infinite compute", 2025, arXiv 2509.14786: the law. How to fit it is
        reconstructed, in the manner of J. Hoffmann et al., 2022, arXiv 2203.15556.
    """
    points, losses = _vector("x", x), _vector("loss", loss)
    weight = torch.ones_like(points) if weights is None else _vector("weights", weights, least=0.0)
    for name, vector in (("loss", losses), ("weights", weight)):
        if vector.shape != points.shape:
            raise ValueError(f"{name} must have {points.numel()} entries as x, got {len(vector)}")
    check_at_least("num_restarts", num_restarts, 1)
    check_at_least("num_bootstrap", num_bootstrap, 0)
    for name, value in (("alpha", alpha), ("huber_delta", huber_delta)):
        if value is not None:
            check_positive(name, value)
    unknowns = 3 if alpha is None else 2
    distinct = points[weight > 0].unique().numel()
    if distinct < unknowns:
        raise ValueError(
            f"x must have at least {unknowns} distinct points of positive weight for "
            f"{unknowns} parameters, got {distinct}"
        )
    lowest = losses[weight > 0].min().item()
    low, high = (0.0, lowest) if asymptote_bounds is None else asymptote_bounds
    if not 0.0 <= low < min(high, lowest):
        raise ValueError(
            f"asymptote_bounds must be (low, high) with 0 <= low < high and low below the lowest "
            f"loss {lowest}, got {(low, high)}"
        )
    # E must stay below every loss, the law being above it.
    bounds = torch.tensor([low, min(high, lowest * (1 - 1e-12))], dtype=torch.float64)
    # In units of a typical x, A and alpha are nearly independent; the weights sum to n.
    unit = points.log().mean().exp()
    scaled = points / unit
    weight = weight * (weight.numel() / weight.sum())
    exponents = (
        torch.logspace(math.log10(0.02), math.log10(8.0), num_restarts, dtype=torch.float64)
        if alpha is None
        else torch.tensor([alpha], dtype=torch.float64)
    )
    start = _linear_starts(scaled, losses, weight, exponents, bounds)
    fit = functools.partial(fit_curves, fixed_exponent=alpha is not None, huber_delta=huber_delta)
    thetas, values = fit(scaled, losses.expand(len(start), -1), weight, start, bounds)
    theta = thetas[values.nan_to_num(math.inf).argmin()]
    log_fit = (theta[2] + (theta[0] - theta[1].exp() * scaled.log()).exp()).log()
    error = losses.log() - log_fit
    degrees = int((weight > 0).sum()) - unknowns
    stderr = [math.nan] * 3
    if num_bootstrap > 0 and degrees > 0:
        noise = _resampled(error, weight, num_bootstrap, seed)
        noise = noise * math.sqrt((degrees + unknowns) / degrees)
        around = theta.expand(num_bootstrap, 3)
        samples, _ = fit(scaled, (log_fit + noise).exp(), weight, around, bounds)
        stderr = _natural(samples, unit).std(0).tolist()
    E, A, exponent = _natural(theta[None], unit)[0].tolist()
    margin = 1e-6 * (bounds[1] - bounds[0]).item()
    inside = bounds[0].item() + margin < E < bounds[1].item() - margin
    if not inside:
        warnings.warn(
            f"the asymptote is not identifiable: E ended on a bound, {E:.6g} of "
            f"[{bounds[0].item():.6g}, {bounds[1].item():.6g}]",
            stacklevel=2,
        )
    elif not 1e-3 < exponent < 1e3:
        warnings.warn(
            f"the asymptote is not identifiable: the losses do not bend as a power law, alpha "
            f"went to {exponent:.3g}",
            stacklevel=2,
        )
        inside = False
    return PowerLawFit(
        E=E,
        A=A,
        alpha=exponent,
        stderr=(stderr[0], stderr[1], stderr[2]),
        residual=(weight * error.square()).mean().sqrt().item(),
        identifiable=inside,
    )


def _vector(name: str, values: Numbers, *, least: float | None = None) -> Tensor:
    vector = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if vector.dim() != 1 or vector.numel() == 0:
        raise ValueError(f"{name} must have shape [n], n >= 1, got {list(vector.shape)}")
    fits = vector > 0 if least is None else vector >= least
    if not bool((fits & vector.isfinite()).all()):
        bad = vector[~(fits & vector.isfinite())][0].item()
        wanted = "above 0" if least is None else f"at least {least:g}"
        raise ValueError(f"{name} must be finite and {wanted}, got {bad}")
    return vector


def _linear_starts(
    x: Tensor, loss: Tensor, weight: Tensor, exponents: Tensor, bounds: Tensor
) -> Tensor:
    """Return (log A, log alpha, E) for given exponents, by linear least squares in (E, A)."""
    power = x ** -exponents[:, None]  # [exponents, n]
    total = weight.sum()
    mean_power = (weight * power).sum(-1, keepdim=True) / total
    mean_loss = (weight * loss).sum() / total
    offset = power - mean_power
    slope = (weight * offset * (loss - mean_loss)).sum(-1) / (weight * offset.square()).sum(-1)
    # Half a step inside, so that every start can move both ways.
    room = bounds[1] - bounds[0]
    E = (mean_loss - slope * mean_power[:, 0]).clamp(
        bounds[0] + 0.01 * room, bounds[1] - 0.01 * room
    )
    A = ((weight * power * (loss - E[:, None])).sum(-1) / (weight * power.square()).sum(-1)).clamp(
        min=1e-12
    )
    return torch.stack([A.log(), exponents.log(), E], -1)


def _resampled(error: Tensor, weight: Tensor, count: int, seed: int) -> Tensor:
    """Return ``[count, n]`` draws from the centred residuals."""
    generator = torch.Generator().manual_seed(seed)
    draws = count * len(error)
    drawn = torch.multinomial(weight, draws, replacement=True, generator=generator)
    return (error - (weight * error).mean())[drawn].reshape(count, -1)


def _natural(theta: Tensor, unit: Tensor) -> Tensor:
    """Return (E, A, alpha) in the caller's unit of x."""
    alpha = theta[:, 1].exp()
    return torch.stack([theta[:, 2], (theta[:, 0] + alpha * unit.log()).exp(), alpha], -1)


@dataclass(frozen=True)
class JointFit:
    """Two limits, one after the other; :func:`fit_joint_asymptote` makes it.

    Attributes:
        E: the loss of infinitely many members of infinite size.
        by_members: for each size N the law over the number of members.
        by_size: the law over sizes of the asymptotes of ``by_members``.
        identifiable: whether every asymptote lies inside its bounds.

    Example:
        >>> law = PowerLawFit(E=3.0, A=1.0, alpha=1.0)
        >>> JointFit(E=3.0, by_members={}, by_size=law, identifiable=True).asymptote
        3.0
    """

    E: float
    by_members: Mapping[float, PowerLawFit]
    by_size: PowerLawFit
    identifiable: bool

    @property
    def asymptote(self) -> float:
        """E, the limit over members and then sizes."""
        return self.E


def fit_joint_asymptote(
    losses: Mapping[tuple[float, int], float], *, member_exponent: float | None = 1.0
) -> JointFit:
    r"""Extrapolate ensembles: first to infinitely many members, then to infinite size.

    .. math:: L_N(K) = E_N + A_N / K \text{ for each } N, \qquad E_N = E + B N^{-\beta}

    The limit is iterated in this order; one fit in (N, K) at once would tie the laws together.

    Args:
        losses: the loss of K members of size N, by (N, K). Three sizes at least, with two K each
            (three where the exponent is free).
        member_exponent: of 1 / K; None fits one for each size.

    Returns:
        The fits.

    Raises:
        TypeError: ``losses`` is no mapping.
        ValueError: there are too few sizes or members, or a number is not positive or not finite.

    Warns:
        UserWarning: an asymptote ended on a bound; ``identifiable`` is False.

    Example:
        >>> losses = {
        ...     (n, k): 3.17 + 0.1 * n**-0.8 + 0.2 / k
        ...     for n in (0.15, 0.3, 0.6, 1.4) for k in (1, 2, 4)
        ... }
        >>> round(fit_joint_asymptote(losses).E, 6)
        3.17

    Source:
        "Pre-training under infinite compute", 2025, arXiv 2509.14786; the order of the limits is
        the paper's, the fits are reconstructed.
    """
    if not isinstance(losses, Mapping):
        raise TypeError(f"losses must be a mapping, got {type(losses).__name__}")
    by_size: defaultdict[float, dict[int, float]] = defaultdict(dict)
    for (size, members), loss in losses.items():
        by_size[float(size)][members] = float(loss)
    if len(by_size) < 3:
        raise ValueError(f"losses must hold at least 3 sizes N, got {len(by_size)}")
    fits: dict[float, PowerLawFit] = {}
    for size in sorted(by_size):
        curve = by_size[size]
        try:
            fits[size] = fit_power_law(
                [float(members) for members in curve],
                list(curve.values()),
                alpha=member_exponent,
                num_bootstrap=0,
            )
        except ValueError as error:
            raise ValueError(f"losses of size N = {size:g} do not make a law: {error}") from None
    over_size = fit_power_law(list(fits), [fit.E for fit in fits.values()])
    identifiable = over_size.identifiable and all(fit.identifiable for fit in fits.values())
    return JointFit(E=over_size.E, by_members=fits, by_size=over_size, identifiable=identifiable)


def data_efficiency(loss: float | Tensor, baseline: PowerLawFit, tokens: float | Tensor) -> Tensor:
    r"""Return how many times more data the baseline needs for the same loss.

    .. math:: D_{eff} / D, \qquad D_{eff} = \bigl(A / (L - E)\bigr)^{1 / \alpha}

    Args:
        loss: L that was reached, a number or ``[*]``.
        baseline: the baseline's law over tokens.
        tokens: D that were used, above 0, in the units of that law; of a shape that broadcasts.

    Returns:
        ``[*]``; inf where the baseline never reaches the loss (L <= E), NaN for a loss that is NaN.

    Raises:
        TypeError: ``baseline`` is no fit.
        ValueError: ``tokens`` is not positive.

    Example:
        >>> baseline = PowerLawFit(E=3.0, A=2.0, alpha=0.3)
        >>> loss = baseline.predict(torch.tensor(0.2)) - 0.3
        >>> round(data_efficiency(loss, baseline, 0.2).item(), 2)
        1.38

    Source:
        "Pre-training under infinite compute", 2025, arXiv 2509.14786.
    """
    if not isinstance(baseline, PowerLawFit):
        raise TypeError(f"baseline must be a PowerLawFit, got {type(baseline).__name__}")
    used = torch.as_tensor(tokens)
    if not bool((used > 0).all()):
        raise ValueError(f"tokens must be above 0, got {tokens}")
    return baseline.inverse(loss) / used
