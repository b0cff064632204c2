"""Sketches of an embedding batch: random directions and one-dimensional statistics along them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regularizers._shared.checks import check_at_least, check_floating, check_positive
from regularizers._shared.distributed import add_up, agree_on_seed, gather_batch
from regularizers._shared.randomness import draw_seed
from regularizers.ops._operator import accumulate_dtype, full_precision, loss_dtype
from regularizers.ops.philox import PHILOX_WORDS, WORDS_PER_CALL
from regularizers.ops.sketch import (
    epps_pulley_statistic,
    sliced_characteristic,
    sliced_epps_pulley,
    sliced_quantile,
)


def random_slices(
    dim: int,
    num_slices: int,
    *,
    groups: int | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Draw directions uniformly from the sphere: Gaussian columns, normalised.

    .. math::
        W_{dk} = \frac{g_{dk}}{\|g_{\cdot k}\|}, \qquad
        g = \sqrt{-2 \ln u}\,(\cos\theta, \sin\theta)

    with u and :math:`\theta` from Philox words of the seed. The same seed gives the same slices in
    every process, on every backend and device (to the rounding of its logarithm and sine).

    Args:
        dim: D, at least 1.
        num_slices: K, at least 1.
        groups: number G of independent sets; one without a leading dimension when omitted.
        seed: int or int64 tensor with no dimensions; drawn from the default generator when omitted.
        generator: generator to draw the seed from; not inside ``torch.compile`` or activation
            checkpointing.
        device: where the slices go.
        dtype: float32 or float64.

    Returns:
        ``[D, K]`` or ``[G, D, K]``, columns of norm 1.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> slices = random_slices(3, 5, seed=1)
        >>> torch.allclose(slices.norm(dim=0), torch.ones(5))
        True
        >>> torch.equal(slices, random_slices(3, 5, seed=1))
        True

    Source:
        As LeJEPA (R. Balestriero, Y. LeCun, 2025, arXiv 2511.08544) draws slices from a seed that
        all processes share, with this library's random bits.
    """
    check_at_least("dim", dim, 1)
    check_at_least("num_slices", num_slices, 1)
    if groups is not None:
        check_at_least("groups", groups, 1)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be float32 or float64, got {dtype}")
    bits = draw_seed(seed, generator, torch.empty(0, device=device))
    shape = (dim, num_slices) if groups is None else (groups, dim, num_slices)
    count = math.prod(shape)
    calls = -(-count // (2 * WORDS_PER_CALL)) * 2
    # The automatic kernel whatever is forced: the bits are the same.
    words = PHILOX_WORDS.kernel(None)(bits, 0, calls, 0, 0)
    first, second = words.view(2, -1)
    # 23 bits and a half lie strictly between 0 and 1 in float32 too.
    u = ((first >> 9) + 2**22).to(dtype).add(0.5) * 2.0**-23
    angle = second.to(dtype) * (math.tau * 2.0**-32)
    radius = torch.sqrt(-2 * torch.log(u))
    normal = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])
    g = normal[:count].view(shape)
    slices: Tensor = g / torch.linalg.vector_norm(g, dim=-2, keepdim=True)
    return slices


class SlicedStatistic(ABC):
    """A statistic of one-dimensional samples against N(0, 1), taken along slices of a batch.

    Example:
        >>> class Variance(SlicedStatistic):
        ...     def __call__(self, z, slices, *, process_group=None):
        ...         return ((z @ slices).var(1) - 1).square().mean()
        >>> regularizer = SlicedRegularizer(Variance(), num_slices=16)
        >>> regularizer(torch.zeros(8, 4))
        tensor(1.)
    """

    @abstractmethod
    def __call__(
        self, z: Tensor, slices: Tensor, *, process_group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """Return the mean over views and slices; ``z`` ``[V, B, D]``, ``slices`` ``[D, K]``."""


@dataclass(frozen=True)
class EppsPulley(SlicedStatistic):
    r"""The distance of characteristic functions under a Gaussian weight.

    .. math:: B \sum_l w_l \varphi_l \big[ (c_l - \varphi_l)^2 + s_l^2 \big]

    as :func:`regularizers.ops.sliced_epps_pulley` says. Its mean under N(0, 1) is
    :math:`\sum_l w_l \varphi_l (1 - \varphi_l^2)`, 1.052 with the defaults, for any batch size.

    Args:
        num_knots: L, at least 2.
        t_max: last knot, above 0.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> statistic = EppsPulley()
        >>> statistic(torch.randn(2, 64, 8), random_slices(8, 32)).shape
        torch.Size([])

    Source:
        LeJEPA (R. Balestriero, Y. LeCun, 2025, arXiv 2511.08544), code read.
    """

    num_knots: int = 17
    t_max: float = 3.0

    def __post_init__(self) -> None:
        check_at_least("num_knots", self.num_knots, 2)
        check_positive("t_max", self.t_max)

    def __call__(
        self, z: Tensor, slices: Tensor, *, process_group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """Return the mean over views and slices."""
        if process_group is None:
            return sliced_epps_pulley(z, slices, num_knots=self.num_knots, t_max=self.t_max)
        return self.each(z, slices, process_group=process_group).mean().to(loss_dtype(z))

    def each(
        self, z: Tensor, slices: Tensor, *, process_group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """Return the statistic of every view and slice, ``[V, K]``, in the accumulation type."""
        sums = sliced_characteristic(z, slices, num_knots=self.num_knots, t_max=self.t_max)
        spacing = self.t_max / (self.num_knots - 1)
        if process_group is None:
            return epps_pulley_statistic(sums, z.shape[1], spacing)
        # One collective for the sums and the number of rows, which processes may differ in.
        packed = torch.cat([sums.flatten(), sums.new_full((1,), z.shape[1])])
        packed = add_up(packed, process_group)
        return epps_pulley_statistic(packed[:-1].view_as(sums), packed[-1].detach(), spacing)


@dataclass(frozen=True)
class GaussianQuantile(SlicedStatistic):
    r"""The squared 2-Wasserstein distance to N(0, 1), by quantiles.

    .. math:: \frac1B \sum_i \big( p_{(i)} - q_i \big)^2, \qquad
        q_i = \Phi^{-1}\big(\tfrac{i}{B + 1}\big)

    Over a process group the batch is gathered and every process takes its share of the slices.

    Args:
        clamp: the probabilities i / (B + 1) are kept in [clamp, 1 - clamp]; in [0, 0.5).

    Raises:
        ValueError: ``clamp`` is out of range.

    Example:
        >>> statistic = GaussianQuantile()
        >>> print(f"{statistic(torch.tensor([[[-1.0], [1.0]]]), torch.ones(1, 1)).item():.4f}")
        0.3241

    Source:
        The shape term of VISReg (2026, arXiv 2606.02572), code read.
    """

    clamp: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.clamp < 0.5:
            raise ValueError(f"clamp must lie in [0, 0.5), got {self.clamp}")

    def __call__(
        self, z: Tensor, slices: Tensor, *, process_group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """Return the mean over views and slices."""
        if process_group is None:
            return sliced_quantile(z, slices, self.quantiles(z.shape[1], z))
        z = gather_batch(z, process_group)
        rank, size = process_group.rank(), process_group.size()
        count = slices.shape[-1]
        if count < size:
            raise ValueError(
                f"num_slices must be at least the number of processes, {size}, got {count}"
            )
        share = slices[..., rank::size]
        part = sliced_quantile(z, share, self.quantiles(z.shape[1], z))
        return add_up(part * (share.shape[-1] / count), process_group)

    def quantiles(self, rows: int, like: Tensor) -> Tensor:
        """Return the quantiles ``[rows]``, ascending, in the accumulation type of ``like``."""
        dtype = accumulate_dtype(like.dtype)
        i = torch.arange(1, rows + 1, dtype=dtype, device=like.device)
        # From the lower tail: 1 - u has lost the digits of a small u.
        tail = torch.minimum(i, rows + 1 - i) / (rows + 1)
        quantile = torch.special.ndtri(tail.clamp(min=self.clamp))
        return torch.where(2 * i > rows + 1, -quantile, quantile)


@dataclass(frozen=True)
class CramerVonMises(SlicedStatistic):
    r"""The distance of distribution functions.

    .. math:: \frac{1}{12 B} + \sum_i \Big( \Phi(p_{(i)}) - \frac{2 i - 1}{2 B} \Big)^2

    Its mean under N(0, 1) is 1/6. The gradient vanishes far from the origin with the density there.
    Plain PyTorch: projections of batch x slices are kept. Over a process group the batch is
    gathered.

    Example:
        >>> statistic = CramerVonMises()
        >>> print(f"{statistic(torch.zeros(1, 1, 1), torch.ones(1, 1)).item():.4f}")
        0.0833

    Source:
        H. Cramer, R. von Mises; one of the tests that LeJEPA (2025, arXiv 2511.08544) compares.
    """

    def __call__(
        self, z: Tensor, slices: Tensor, *, process_group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """Return the mean over views and slices."""
        dtype = loss_dtype(z)
        z = gather_batch(z, process_group)
        ordered = torch.sort(_projections(z, slices), dim=1).values
        rows = z.shape[1]
        i = torch.arange(1, rows + 1, dtype=ordered.dtype, device=z.device)[:, None]
        distance: Tensor = torch.special.ndtr(ordered) - (2 * i - 1) / (2 * rows)
        return (1 / (12 * rows) + (distance**2).sum(1)).mean().to(dtype)


@dataclass(frozen=True)
class Moments(SlicedStatistic):
    r"""Neyman's smooth test: the means of Hermite polynomials, which are 0 under N(0, 1).

    .. math:: B \sum_{j=1}^{J} \frac{1}{j!} \Big( \frac1B \sum_n \mathrm{He}_j(p_n) \Big)^2

    Its mean under N(0, 1) is J. The first two terms ask for mean 0 and variance 1, the next ones
    for no skewness and no excess kurtosis. Plain PyTorch: projections of batch x slices are kept.

    Args:
        order: J, at least 1.

    Raises:
        TypeError: ``order`` is not an int.
        ValueError: ``order`` is below 1.

    Example:
        >>> statistic = Moments(order=2)  # mean 0, variance 0: 4 (0 + 1 / 2)
        >>> print(f"{statistic(torch.zeros(1, 4, 1), torch.ones(1, 1)).item():.4f}")
        2.0000

    Source:
        J. Neyman, 1937. LeJEPA (2025, arXiv 2511.08544) compares a test of moments; this form,
        orthogonal under N(0, 1), is the library's choice.
    """

    order: int = 4

    def __post_init__(self) -> None:
        check_at_least("order", self.order, 1)

    def __call__(
        self, z: Tensor, slices: Tensor, *, process_group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """Return the mean over views and slices."""
        p = _projections(z, slices)
        below, hermite, sums = torch.zeros_like(p), torch.ones_like(p), []
        for j in range(self.order):
            below, hermite = hermite, p * hermite - j * below
            sums.append(hermite.sum(1) / math.sqrt(math.factorial(j + 1)))
        total, rows = torch.stack(sums), p.new_full((), p.shape[1])
        if process_group is not None:
            total = add_up(total, process_group)
            rows = add_up(rows, process_group)
        return ((total**2).sum(0) / rows).mean().to(loss_dtype(z))


def _projections(z: Tensor, slices: Tensor) -> Tensor:
    """Return p = z A [V, B, K] in the accumulation type, autocast or not."""
    wide = accumulate_dtype(z.dtype)
    with full_precision(z.device):
        return z.to(wide) @ slices.to(wide)


class SlicedRegularizer(nn.Module):
    r"""A regularizer that asks an embedding batch to be N(0, I), by a statistic along slices.

    .. math:: L = \frac{1}{V K} \sum_{v,k} T(\{ \langle z_{vn}, w_k \rangle \}_n), \qquad
        w_k \text{ uniform on the sphere, new at every call}

    The module has no parameters and does the same in ``eval()``.

    Args:
        statistic: the one-dimensional statistic T.
        num_slices: K, at least 1.
        process_group: processes whose batches are one, or None; see
            :func:`regularizers.transport.sigreg`.

    Shape:
        ``[V, B, D]`` views x batch x dim, or ``[B, D]``, B at least 2, to a loss with no
        dimensions.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or the input is of the wrong shape.

    Example:
        >>> regularizer = SlicedRegularizer(CramerVonMises(), num_slices=64)
        >>> z = torch.randn(2, 32, 8, requires_grad=True)
        >>> regularizer(z).backward()

    Source:
        LeJEPA (R. Balestriero, Y. LeCun, 2025, arXiv 2511.08544), code read.
    """

    def __init__(
        self,
        statistic: SlicedStatistic,
        *,
        num_slices: int = 256,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(statistic, SlicedStatistic):
            raise TypeError(f"statistic must be a SlicedStatistic, got {type(statistic).__name__}")
        check_at_least("num_slices", num_slices, 1)
        self.statistic = statistic
        self.num_slices = num_slices
        self.process_group = process_group

    def forward(self, z: Tensor) -> Tensor:
        """Return the loss."""
        z = as_views(z)
        slices = slices_for(z, self.num_slices, process_group=self.process_group)
        return self.statistic(z, slices, process_group=self.process_group)

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return f"{self.statistic}, num_slices={self.num_slices}"


def as_views(z: Tensor) -> Tensor:
    """Check an embedding batch and return it as ``[V, B, D]``."""
    check_floating("z", z)
    if z.dim() not in (2, 3):
        raise ValueError(
            f"z must have shape [views, batch, dim] or [batch, dim], got {list(z.shape)}"
        )
    z = z[None] if z.dim() == 2 else z
    if z.shape[1] < 2:
        raise ValueError(f"z must have a batch of at least 2, got {z.shape[1]}")
    if min(z.shape) < 1:
        raise ValueError(f"z must not be empty, got {list(z.shape)}")
    return z


def slices_for(
    z: Tensor,
    num_slices: int,
    *,
    slices: Tensor | None = None,
    groups: int | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the given slices, or draw some for ``z`` that all processes of a group share."""
    if slices is not None:
        if seed is not None or generator is not None:
            raise ValueError("slices must not be given together with seed or generator")
        return slices
    bits = agree_on_seed(draw_seed(seed, generator, z), process_group)
    return random_slices(
        z.shape[-1],
        num_slices,
        groups=groups,
        seed=bits,
        device=z.device,
        dtype=accumulate_dtype(z.dtype),
    )
