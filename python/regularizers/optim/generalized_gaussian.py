"""The generalized Gaussian law of weights: a distribution, its fit to a tensor, an initialiser.

Notation: nu is the shape, alpha the scale (not the standard deviation), a = 1 / nu.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.utils import broadcast_all

from regularizers._shared.checks import (
    check_floating,
    check_one_of,
    check_positive,
    check_values,
)
from regularizers._shared.randomness import check_caller_draws
from regularizers.ops._operator import accumulate_dtype

LARGEST_SHAPE = 10.0
SMALLEST_FIT = 0.1  # estimated shapes lie between these two
HALLEY_STEPS = 12
BISECTIONS = 26  # of log(nu): a relative error of 1e-7


class _ShapeRange(Constraint):
    def check(self, value: Tensor) -> Tensor:
        return (value > 0) & (value <= LARGEST_SHAPE)

    def __repr__(self) -> str:
        return f"0 < shape <= {LARGEST_SHAPE:g}"


class GeneralizedGaussian(Distribution):
    r"""The generalized Gaussian distribution: Laplace at shape 1, normal at 2, heavier tails below.

    .. math::
        p(x) = \frac{\nu}{2\alpha\Gamma(1/\nu)} \exp\left(-\left(\frac{|x - \mu|}{\alpha}
        \right)^{\nu}\right), \qquad \mathrm{Var} = \alpha^2 \frac{\Gamma(3/\nu)}{\Gamma(1/\nu)}

    ``rsample`` is differentiable in all three parameters, ``log_prob``, ``entropy`` and the moments
    too; ``cdf`` and ``icdf`` in all but the shape, where backward raises (torch has no derivative
    of the incomplete gamma function in its first argument). The derivative of ``log_prob`` at
    ``loc``, infinite for shapes below 1, is 0.

    Args:
        loc: :math:`\mu`, the centre.
        alpha: :math:`\alpha`, the scale, above 0. Not the standard deviation: that is
            ``stddev``; :meth:`from_stddev` starts there.
        shape: :math:`\nu`, in (0, 10].
        validate_args: as for every distribution of torch.

    Raises:
        ValueError: ``alpha`` or ``shape`` is out of its range.

    Example:
        >>> law = GeneralizedGaussian(0.0, 1.0, 1.0)
        >>> law.log_prob(torch.tensor([0.0, 2.0]))  # Laplace
        tensor([-0.6931, -2.6931])
        >>> law.icdf(law.cdf(torch.tensor(0.3)))
        tensor(0.3000)
        >>> GeneralizedGaussian.from_stddev(0.0, 1.0, 0.5).alpha
        tensor(0.0913)

    Source:
        Textbook; the prior of arXiv 2506.00486.
    """

    arg_constraints = {  # noqa: RUF012 -- as every distribution of torch declares it
        "loc": constraints.real,
        "alpha": constraints.positive,
        "shape": _ShapeRange(),
    }
    support = constraints.real
    has_rsample = True

    def __init__(
        self,
        loc: float | Tensor,
        alpha: float | Tensor,
        shape: float | Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.alpha, self.shape = broadcast_all(loc, alpha, shape)
        super().__init__(self.loc.size(), validate_args=validate_args)

    @classmethod
    def from_stddev(
        cls, loc: float | Tensor, stddev: float | Tensor, shape: float | Tensor
    ) -> GeneralizedGaussian:
        """Return the distribution with a given standard deviation."""
        loc, stddev, shape = broadcast_all(loc, stddev, shape)
        if not bool(_ShapeRange().check(shape).all()):
            raise ValueError(f"shape must lie in (0, {LARGEST_SHAPE:g}], got {shape}")
        return cls(loc, stddev * alpha_of_unit_variance(shape), shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> GeneralizedGaussian:
        """Return the distribution with its parameters expanded."""
        new: GeneralizedGaussian = self._get_checked_instance(  # type: ignore[no-untyped-call]
            GeneralizedGaussian, _instance
        )
        batch_shape = torch.Size(batch_shape)
        for name in ("loc", "alpha", "shape"):
            setattr(new, name, getattr(self, name).expand(batch_shape))
        super(GeneralizedGaussian, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """The centre."""
        return self.loc

    @property
    def mode(self) -> Tensor:
        """The centre."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """The variance, ``alpha^2 Gamma(3 / nu) / Gamma(1 / nu)``."""
        return (self.alpha / alpha_of_unit_variance(self.shape)).square()

    def _standard(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return z = (x - loc) / alpha and |z|^nu, whose derivative at 0 is 0."""
        z = (value - self.loc) / self.alpha
        size = z.abs()
        return z, torch.where(size > 0, torch.where(size > 0, size, 1) ** self.shape, 0)

    def _log_peak(self) -> Tensor:
        return (self.shape / (2 * self.alpha)).log() - torch.lgamma(1 / self.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, ``[*, batch]``, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        return self._log_peak() - self._standard(value)[1]

    def entropy(self) -> Tensor:
        """Return the differential entropy in nats."""
        return 1 / self.shape - self._log_peak()

    def rsample(
        self,
        sample_shape: Any = torch.Size(),  # noqa: B008 -- as in torch
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""Draw samples that can be differentiated through.

        A uniform variable on (-1, 1) times :math:`G^{1/\nu}`, :math:`G \sim \Gamma(1 + 1/\nu)`, has
        this law with unit scale. Unlike a signed :math:`\Gamma(1/\nu)^{1/\nu}` it does not
        underflow for large shapes.
        """
        shape = self._extended_shape(sample_shape)
        nu = self.shape.expand(shape)
        size = torch._standard_gamma(1 + 1 / nu, generator=generator) ** (1 / nu)
        uniform = torch.empty(shape, dtype=nu.dtype, device=nu.device)
        return self.loc + self.alpha * uniform.uniform_(-1, 1, generator=generator) * size

    def cdf(self, value: Tensor) -> Tensor:
        """Return the probability below ``value``; accurate far into the lower tail."""
        if self._validate_args:
            self._validate_sample(value)
        return self._cdf((value - self.loc) / self.alpha)

    def _cdf(self, z: Tensor) -> Tensor:
        a = 1 / self.shape
        # Around 0 the chain through |z|^nu is 0 times infinity; there the curve is a line.
        near = z.abs() ** self.shape < torch.finfo(z.dtype).tiny
        size = torch.where(near, 1, z.abs())
        tail = torch.special.gammaincc(a, size**self.shape) / 2
        line = 0.5 + z * (self.shape / 2 * (-torch.lgamma(a)).exp())
        return torch.where(near, line, torch.where(z > 0, 1 - tail, tail))

    def icdf(self, value: Tensor) -> Tensor:
        """Return the quantile of a probability in [0, 1]; infinite at 0 and 1."""
        if self._validate_args and not bool(((value >= 0) & (value <= 1)).all()):
            raise ValueError(f"value must lie in [0, 1], got {value}")
        with torch.no_grad():
            wide, nu = torch.broadcast_tensors(value.double(), self.shape.double())
            centred = 2 * wide - 1
            size = half_quantile(centred.abs(), 2 * torch.minimum(wide, 1 - wide), nu)
            z = (centred.sign() * size).to(self.loc.dtype)
        if value.requires_grad or self.shape.requires_grad:
            # A Newton step of value 0 carries the derivative, that of the inverse function.
            density = (self._log_peak() - z.abs() ** self.shape).exp() * self.alpha
            step = (value - self._cdf(z)) / density.detach()
            z = z + (step - step.detach())
        quantile: Tensor = self.loc + self.alpha * z
        return quantile


def alpha_of_unit_variance(shape: Tensor) -> Tensor:
    """Return the scale alpha at which the variance is 1: sqrt(Gamma(1 / nu) / Gamma(3 / nu))."""
    return ((torch.lgamma(1 / shape) - torch.lgamma(3 / shape)) / 2).exp()


def half_quantile(lower: Tensor, upper: Tensor, shape: Tensor) -> Tensor:
    """Return z with P(|Z| < z) = ``lower`` = 1 - ``upper`` for unit scale; float64 tensors.

    Both probabilities come in, so that neither end loses digits. Halley's iteration on the
    regularised incomplete gamma function from the starts of Numerical Recipes, 6.2.1.
    """
    a = 1 / shape
    log_gamma = torch.lgamma(a)
    # Wilson and Hilferty's normal approximation for a > 1.
    t = (-2 * torch.minimum(lower, upper).log()).sqrt()
    normal = (2.30753 + t * 0.27061) / (1 + t * (0.99229 + t * 0.04481)) - t
    normal = torch.where(lower < 0.5, -normal, normal)
    large = (a * (1 - 1 / (9 * a) - normal / (3 * a.sqrt())) ** 3).clamp(min=1e-3)
    # Below the knee a power, above it an exponential tail, for a <= 1.
    knee = 1 - a * (0.253 + a * 0.12)
    small = torch.where(lower < knee, (lower / knee) ** shape, 1 - (upper / (1 - knee)).log())
    x = torch.where(a > 1, large, small)
    for _ in range(HALLEY_STEPS):
        error = torch.where(
            upper < 0.5,
            upper - torch.special.gammaincc(a, x),
            torch.special.gammainc(a, x) - lower,
        )
        step = error * (log_gamma + x - (a - 1) * x.log()).exp()
        step = step / (1 - 0.5 * (step * ((a - 1) / x - 1)).clamp(max=1))
        x = torch.where(x > step, x - step, x / 2)
    z = torch.where(lower > 0, x, 0) ** a
    return torch.where(upper > 0, z, math.inf)


def estimate_shape(
    w: Tensor, *, method: Literal["ratio", "mle"] = "ratio"
) -> tuple[Tensor, Tensor]:
    r"""Fit a generalized Gaussian centred at 0 to the entries of a tensor.

    .. math::
        \rho(\nu) = \frac{\Gamma(1/\nu)\Gamma(3/\nu)}{\Gamma(2/\nu)^2}
        = \frac{\mathrm{E}\,x^2}{(\mathrm{E}|x|)^2}

    ``"ratio"`` solves this for the shape and takes the scale from the variance: one pass over the
    tensor. ``"mle"`` maximises the likelihood, with
    :math:`\alpha^\nu = \nu\,\overline{|x|^\nu}`: some 30 passes, less variance where the tails are
    heavy.

    Args:
        w: ``[*]``, a floating-point tensor with an entry other than 0; fit each tensor of a model
            by itself.
        method: ``"ratio"`` or ``"mle"``.

    Returns:
        The shape, clamped to [0.1, 10], and the scale alpha: tensors with no dimensions, float64 or
        (on a device without it) float32, detached.

    Raises:
        TypeError: ``w`` is not a floating-point tensor.
        ValueError: ``w`` is empty, all zero or not finite, or ``method`` is unknown. On a GPU the
            values are asserted on the device.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> w = torch.distributions.Laplace(0.0, 0.02).sample((100_000,))
        >>> nu, alpha = estimate_shape(w)
        >>> print(f"{nu:.1f} {alpha:.3f}")
        1.0 0.020

    Source:
        arXiv 2506.00486 (its read-me: a table over the shape). ``"mle"`` is the textbook's. Entries
        are taken about 0, not about their mean, as the penalties built on the fit are.
    """
    check_floating("w", w)
    check_one_of("method", method, ("ratio", "mle"))
    if w.numel() == 0:
        raise ValueError(f"w must not be empty, got shape {list(w.shape)}")
    with torch.no_grad():
        largest = w.detach().abs().amax()
        check_values(largest.isfinite(), lambda: "w must be finite, got NaN or infinity")
        check_values(largest > 0, lambda: "w must have an entry other than 0, got zeros only")
        return fit_ratio(w) if method == "ratio" else fit_likelihood(w)


def fit_ratio(w: Tensor) -> tuple[Tensor, Tensor]:
    """Fit by the ratio of moments, unchecked; zeros only give the largest shape and scale 0."""
    size = w.detach().abs().to(accumulate_dtype(w.dtype))
    largest = size.amax()
    size = size / torch.where(largest > 0, largest, 1)  # squares of tiny weights underflow
    return fit_moments(largest, size.mean(), size.square().mean())


def fit_moments(largest: Tensor, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Fit to the largest size, and to means of sizes and their squares relative to it."""
    wide = torch.float32 if largest.device.type == "mps" else torch.float64
    mean, square = mean.to(wide), square.to(wide)
    log_ratio = torch.where(mean > 0, (square / mean.square()).log(), 0)
    nu = _invert_ratio(log_ratio)
    return nu, square.sqrt() * alpha_of_unit_variance(nu) * largest.to(wide)


def _log_ratio(nu: Tensor) -> Tensor:
    a = 1 / nu
    return torch.lgamma(a) + torch.lgamma(3 * a) - 2 * torch.lgamma(2 * a)


def _invert_ratio(log_ratio: Tensor) -> Tensor:
    # A table of shapes in steps of two per cent, from large to small so that the ratios ascend.
    log_nus = torch.linspace(
        math.log(LARGEST_SHAPE),
        math.log(SMALLEST_FIT),
        257,
        dtype=log_ratio.dtype,
        device=log_ratio.device,
    )
    ratios = _log_ratio(log_nus.exp())
    upper = torch.searchsorted(ratios, log_ratio).clamp(1, ratios.numel() - 1)
    lower = upper - 1
    share = (log_ratio - ratios.take(lower)) / (ratios.take(upper) - ratios.take(lower))
    nu = torch.lerp(log_nus.take(lower), log_nus.take(upper), share.clamp(0, 1)).exp()
    a = 1 / nu
    # One Newton step, of log(rho) in log(nu).
    slope = -a * (torch.digamma(a) + 3 * torch.digamma(3 * a) - 4 * torch.digamma(2 * a))
    nu = nu * (-(_log_ratio(nu) - log_ratio) / slope).exp()
    return nu.clamp(SMALLEST_FIT, LARGEST_SHAPE)


def fit_likelihood(w: Tensor) -> tuple[Tensor, Tensor]:
    """Fit by maximum likelihood, unchecked: bisection of the derivative in the shape."""
    wide = torch.float32 if w.device.type == "mps" else torch.float64
    size = w.detach().abs().to(wide)
    scale = size.square().mean().sqrt()
    # Zeros have |x|^nu log|x| = 0; a finite logarithm gives that without 0 times infinity.
    log_size = (size / scale).clamp(min=torch.finfo(wide).tiny).log()
    low = torch.full_like(scale, math.log(SMALLEST_FIT))
    high = torch.full_like(scale, math.log(LARGEST_SHAPE))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        nu = middle.exp()
        power = (nu * log_size).exp()
        moment = power.mean()
        slope = nu + torch.digamma(1 / nu) + (nu * moment).log()
        rising = slope > nu * (power * log_size).mean() / moment
        low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
    nu = ((low + high) / 2).exp()
    return nu, scale * (nu * (nu * log_size).exp().mean()) ** (1 / nu)


def gg_init_(
    w: Tensor,
    *,
    shape: float = 1.0,
    xi: float = 1.0,
    fan: Literal["in", "out"] = "in",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Fill a weight with generalized Gaussian samples of variance :math:`\xi / \mathrm{fan}`.

    .. math:: \alpha = \sqrt{\frac{\xi}{\mathrm{fan}} \frac{\Gamma(1/\nu)}{\Gamma(3/\nu)}}

    The convention of ``torch.nn.init.kaiming_normal_`` with its gain squared as ``xi``: shape 2 and
    ``xi=2`` is that initialiser for ReLU.

    Args:
        w: ``[out, in, *]``, a floating-point tensor with at least two dimensions; written.
        shape: :math:`\nu`, in (0, 10].
        xi: :math:`\xi`, above 0; 1 for linear layers, 2 before a ReLU.
        fan: ``"in"`` keeps the variance of activations, ``"out"`` that of gradients.
        generator: a generator of the tensor's device; the default one when omitted.

    Returns:
        ``w``.

    Raises:
        TypeError: ``w`` is not a floating-point tensor, or ``generator`` not a generator.
        ValueError: an option is out of its range, or ``w`` has fewer than two dimensions.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> w = gg_init_(torch.empty(256, 512), shape=1.0, xi=2.0)
        >>> print(f"{w.std() ** 2 * 512:.1f}")
        2.0

    Source:
        arXiv 2506.00486: the law and its shape from the paper's read-me, the reading of ``xi`` as
        variance times fan reconstructed.
    """
    check_floating("w", w)
    check_shape_parameter(shape)
    check_positive("xi", xi)
    check_one_of("fan", fan, ("in", "out"))
    if w.dim() < 2:
        raise ValueError(f"w must have at least two dimensions, got shape {list(w.shape)}")
    if generator is not None:
        check_caller_draws(generator)
    if w.numel() == 0:
        return w
    fan_size = w[0].numel() if fan == "in" else w.shape[0] * w[0, 0].numel()
    wide = accumulate_dtype(w.dtype)
    nu = torch.tensor(shape, dtype=wide, device=w.device)
    law = GeneralizedGaussian.from_stddev(torch.zeros_like(nu), math.sqrt(xi / fan_size), nu)
    with torch.no_grad():
        return w.copy_(law.rsample(w.shape, generator=generator))


def check_shape_parameter(shape: float, name: str = "shape") -> None:
    """Raise unless ``shape`` is a number in (0, 10]."""
    check_positive(name, shape)
    if shape > LARGEST_SHAPE:
        raise ValueError(f"{name} must lie in (0, {LARGEST_SHAPE:g}], got {shape}")
