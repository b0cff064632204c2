"""Fréchet cumulative covariance: dependence on a response that is known by distances alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from regularizers._shared.checks import (
    check_floating,
    check_not_negative,
    check_one_of,
    check_same_device,
    check_shape,
    check_values,
)
from regularizers._shared.distributed import gather_batch, gather_rows
from regularizers._shared.scheduled import scheduled
from regularizers.ops._operator import accumulate_dtype, full_precision

Reduction = Literal["sum", "none"]
REDUCTIONS = ("sum", "none")
METRICS = ("euclidean", "sphere", "wasserstein1d", "spd_log")
Metric = Literal["euclidean", "sphere", "wasserstein1d", "spd_log"]
# How far distances may be from symmetric, in units of the largest.
_SYMMETRY = 1e-6


class FCCovRanks(NamedTuple):
    """What :func:`fccov` needs of the distances: the order of the points around every point.

    Attributes:
        order: ``[N, N]``, int32: the points from near to far, a row for each centre.
        group: ``[N, N]``, int32: at a place where a group of equally far points begins, the size
            of the group, elsewhere 0. None where no two points are equally far from a third.

    Example:
        >>> y = torch.tensor([0.0, 1.0, 1.0])
        >>> fccov_ranks((y[:, None] - y).abs()).group
        tensor([[1, 2, 0],
                [2, 0, 1],
                [2, 0, 1]], dtype=torch.int32)
    """

    order: Tensor
    group: Tensor | None


def fccov_ranks(dist: Tensor) -> FCCovRanks:
    """Sort the distances once, for all steps of a training.

    Args:
        dist: distances ``[N, N]``, N at least 3, without gradient.

    Returns:
        :class:`FCCovRanks`, 4 N^2 bytes, and as many again where there are ties.

    Raises:
        TypeError: ``dist`` is not a floating-point tensor.
        ValueError: ``dist`` is not square, negative, asymmetric or not 0 on the diagonal, or N is
            below 3.

    Example:
        >>> y = torch.tensor([0.0, 1.0, 3.0])
        >>> fccov_ranks((y[:, None] - y).abs()).order
        tensor([[0, 1, 2],
                [1, 0, 2],
                [2, 1, 0]], dtype=torch.int32)

    Source:
        arXiv 2502.15374; the estimator is derived here.
    """
    _check_distances(dist)
    ascending, order = dist.detach().sort(dim=1)
    tied = ascending[:, 1:] == ascending[:, :-1]
    if not bool(tied.any()):
        return FCCovRanks(order.int(), None)
    # The strict inequality reads the prefix before a group, for every point of the group.
    first = torch.cat([torch.ones_like(tied[:, :1]), ~tied], dim=1)
    number = first.cumsum(1) - 1
    size = torch.zeros_like(order).scatter_add_(1, number, torch.ones_like(order))
    return FCCovRanks(order.int(), torch.where(first, size.gather(1, number), 0).int())


def fccov(
    u: Tensor,
    dist: Tensor | FCCovRanks,
    *,
    reduction: Reduction = "sum",
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Measure how the conditional mean of ``u`` depends on a response known by its distances.

    .. math::
        \mathrm{FCCov}_n = \frac{1}{n^2} \sum_{i,j} \Big[ \frac1n \sum_k (u_k - \bar u)\,
        1\{ d_{ki} < d_{ji} \} \Big]^2

    0 for a ``u`` whose mean does not depend on the response, positive otherwise (in a metric space
    whose balls determine measures). The distances enter through their order alone. With the points
    sorted around each centre i, the inner sums are prefix sums: n^2 additions in the place of n^3.

    Args:
        u: ``[N]`` or ``[N, D]``, each component by itself.
        dist: distances of the responses ``[N, N]``, N at least 3; or :func:`fccov_ranks` of them,
            which saves the sorting and the checks at every step. Of the whole batch where there is
            a process group.
        reduction: over the components: ``"sum"``, or ``"none"``.
        process_group: processes whose ``u`` count as one batch, in the order of ranks.

    Returns:
        No dimensions, or ``[D]`` for ``"none"`` (``[1]`` for a ``u`` of ``[N]``); at least 0,
        float32 for half types.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: ``dist`` is not as :func:`fccov_ranks` wants it, or of another N.

    Example:
        >>> u, y = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 3.0])
        >>> value = fccov(u, (y[:, None] - y).abs())
        >>> f"{value:.6f} = 5/81"
        '0.061728 = 5/81'

    Source:
        "Fréchet Cumulative Covariance Net for Deep Nonlinear Sufficient Dimension Reduction with
        Random Objects", 2025, arXiv 2502.15374. The definition is public; the estimator is
        reconstructed from it. It is biased by O(1/n), so batches of some hundreds are due.
    """
    check_floating("u", u)
    check_one_of("reduction", reduction, REDUCTIONS)
    if u.dim() not in (1, 2):
        raise ValueError(f"u must have shape [N] or [N, D], got {list(u.shape)}")
    rows = u.reshape(len(u), -1).to(accumulate_dtype(u.dtype))
    rows = gather_batch(rows, process_group)
    ranks = dist if isinstance(dist, FCCovRanks) else fccov_ranks(dist)
    check_same_device("dist", ranks.order, "u", u)
    if len(ranks.order) != len(rows):
        raise ValueError(f"dist must be of the N = {len(rows)} points of u, got {len(ranks.order)}")
    value = _sums(rows, ranks) / len(rows) ** 4
    return value if reduction == "none" else value.sum()


def _sums(rows: Tensor, ranks: FCCovRanks) -> Tensor:
    """Return the sum over centres and radii of the squared prefix sums, [D]."""
    n, components = rows.shape
    centred = (rows - rows.mean(0)).T
    sorted_rows = centred.index_select(1, ranks.order.flatten()).view(components, n, n)
    # The prefix before place r is the sum through place r - 1; all of them sum to 0.
    prefix = sorted_rows[..., :-1].cumsum(-1)
    if ranks.group is None:
        return prefix.square().sum((1, 2))
    return (ranks.group[:, 1:] * prefix.square()).sum((1, 2))


def fccov_loss(
    f: Tensor,
    dist: Tensor | FCCovRanks,
    *,
    lam: float | Tensor = 1.0,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Train sufficient predictors: make the components of ``f`` depend on the response.

    .. math:: -\sum_t \mathrm{FCCov}(f_t \mid Y) + \lambda \, \| \mathrm{Var}(f) - I \|_F^2

    The penalty keeps the components uncorrelated and of variance 1, without which the first term
    has no bound.

    Args:
        f: predictors ``[N, D]``.
        dist: distances of the responses, or their ranks, as for :func:`fccov`.
        lam: :math:`\lambda`, at least 0; a number or a tensor with no dimensions. FCCov of a
            predictor of variance 1 is some 0.04, so 0.1 leaves the penalty in command.
        process_group: processes whose ``f`` count as one batch, in the order of ranks.

    Returns:
        No dimensions; float32 for half types.

    Raises:
        TypeError: as :func:`fccov`.
        ValueError: likewise; or ``lam`` is negative or ``f`` not of two dimensions.

    Example:
        >>> x, y = torch.randn(50, 5), torch.randn(50, 2)
        >>> net = nn.Linear(5, 1)
        >>> ranks = fccov_ranks(metric_distances(y))
        >>> fccov_loss(net(x), ranks, lam=0.1).backward()

    Source:
        As :func:`fccov`; the variance has 1 / n.
    """
    check_floating("f", f)
    check_shape("f", f, (None, None), "[N, D]")
    strength = scheduled("lam", lam, f, check_not_negative)
    rows = gather_batch(f.to(accumulate_dtype(f.dtype)), process_group)
    centred = rows - rows.mean(0)
    with full_precision(rows.device):
        covariance = centred.T @ centred / len(rows)
    unit = torch.eye(len(covariance), dtype=rows.dtype, device=rows.device)
    penalty = (covariance - unit).square().sum()
    return strength.to(rows.dtype) * penalty - fccov(rows, dist)


class FCCovLoss(nn.Module):
    """:func:`fccov_loss` with its strength.

    Args:
        lam: strength of the penalty, at least 0.
        process_group: processes whose batches count as one.

    Raises:
        ValueError: ``lam`` is negative.

    Example:
        >>> loss = FCCovLoss(lam=0.1)
        >>> f = torch.randn(50, 2, requires_grad=True)
        >>> loss(f, fccov_ranks(metric_distances(torch.randn(50)))).backward()

    Source:
        arXiv 2502.15374, as :func:`fccov`.
    """

    def __init__(self, *, lam: float = 1.0, process_group: ProcessGroup | None = None) -> None:
        super().__init__()
        check_not_negative("lam", lam)
        self.lam = lam
        self.process_group = process_group

    def forward(self, f: Tensor, dist: Tensor | FCCovRanks) -> Tensor:
        """Return the loss of predictors ``[N, D]`` and distances ``[N, N]`` or their ranks."""
        return fccov_loss(f, dist, lam=self.lam, process_group=self.process_group)


@torch.no_grad()
def metric_distances(
    y: Tensor,
    *,
    metric: Metric | Callable[[Tensor, Tensor], Tensor] = "euclidean",
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Return the distances of all pairs of responses.

    =================  ==============  ==================================================
    metric             responses       distance
    =================  ==============  ==================================================
    ``euclidean``      ``[N, *]``      norm of the difference
    ``sphere``         ``[N, d]``      angle between two vectors, in radians
    ``wasserstein1d``  ``[N, m]``      2-Wasserstein distance of two samples of m numbers
    ``spd_log``        ``[N, p, p]``   norm of the difference of two matrix logarithms
    a callable         ``[N, *]``      called with ``[N, 1, *]`` and ``[1, N, *]``
    =================  ==============  ==================================================

    Args:
        y: responses, floating point.
        metric: one of these.
        process_group: processes whose responses count as one batch, in the order of ranks.

    Returns:
        ``[N, N]``, N of the whole batch; no gradient; float32 for half types.

    Raises:
        TypeError: ``y`` is not a floating-point tensor.
        ValueError: ``metric`` is unknown, or ``y`` is not of its shape; a matrix is not symmetric
            and positive.

    Example:
        >>> angle = torch.tensor([0.0, 1.0, 3.0])
        >>> circle = torch.stack([angle.cos(), angle.sin()], dim=1)
        >>> metric_distances(circle, metric="sphere")
        tensor([[0., 1., 3.],
                [1., 0., 2.],
                [3., 2., 0.]])

    Source:
        Metric spaces that arXiv 2502.15374 and the literature on Fréchet regression use.
    """
    check_floating("y", y)
    if y.dim() == 0:
        raise ValueError("y must have shape [N, ...], got []")
    y = gather_rows(y, process_group).to(accumulate_dtype(y.dtype))
    if callable(metric):
        found: Tensor = metric(y[:, None], y[None])
        return found
    check_one_of("metric", metric, METRICS)
    if metric == "euclidean":
        return _euclidean(y.reshape(len(y), -1))
    if metric == "spd_log":
        return _euclidean(_matrix_logarithm(y).flatten(1))
    check_shape("y", y, (None, None), "[N, d]")
    if metric == "sphere":
        unit = nn.functional.normalize(y)
        # Accurate at 0 and at pi, where the arc cosine of the product is not.
        angle: Tensor = 2 * torch.atan2(_euclidean(unit), _euclidean(unit, -unit))
        return angle
    return _euclidean(y.sort(dim=1).values / math.sqrt(y.shape[1]))


def _euclidean(a: Tensor, b: Tensor | None = None) -> Tensor:
    # From differences: a distance of a point to itself is exactly 0.
    b = a if b is None else b
    distances: Tensor = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return distances


def _matrix_logarithm(y: Tensor) -> Tensor:
    if y.dim() != 3 or y.shape[1] != y.shape[2]:
        raise ValueError(f"y must have shape [N, p, p] for spd_log, got {list(y.shape)}")
    check_values((y - y.mT).abs().max() <= _SYMMETRY * y.abs().max(), lambda: "y must be symmetric")
    eigenvalue, vector = torch.linalg.eigh(y)
    check_values(
        (eigenvalue > 0).all(),
        lambda: f"y must have eigenvalues above 0, got {eigenvalue.min().item()}",
    )
    logarithm: Tensor = (vector * eigenvalue.log()[:, None]) @ vector.mT
    return logarithm


def _check_distances(dist: Tensor) -> None:
    check_floating("dist", dist)
    if dist.dim() != 2 or dist.shape[0] != dist.shape[1] or len(dist) < 3:
        raise ValueError(f"dist must have shape [N, N], N >= 3, got {list(dist.shape)}")
    check_values((dist >= 0).all(), lambda: f"dist must be at least 0, got {dist.min().item()}")
    check_values((dist.diagonal() == 0).all(), lambda: "dist must be 0 on the diagonal")
    check_values(
        (dist - dist.T).abs().max() <= _SYMMETRY * dist.max(), lambda: "dist must be symmetric"
    )
