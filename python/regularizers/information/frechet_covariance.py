"""Fréchet cumulative covariance: dependence on a response that is known by distances alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_floating,
    check_not_negative,
    check_one_of,
    check_same_device,
    check_shape,
    check_values,
)
from regularizers._shared.distributed import gather_batch, gather_rows
from regularizers._shared.moments import covariance
from regularizers._shared.scheduled import scheduled
from regularizers.ops._operator import accumulate_dtype, full_precision

Reduction = Literal["sum", "none"]
REDUCTIONS = ("sum", "none")
METRICS = ("euclidean", "sphere", "wasserstein1d", "spd_log")
Metric = Literal["euclidean", "sphere", "wasserstein1d", "spd_log"]
# How far distances may be from symmetric, in units of the largest.
_SYMMETRY = 1e-6


class FCCovKernel(NamedTuple):
    """What :func:`fccov` needs of the distances: a quadratic form.

    Attributes:
        matrix: ``[N, N]``, symmetric, positive semidefinite, with sums of 0 along rows and columns.

    Example:
        >>> y = torch.tensor([0.0, 1.0, 3.0])
        >>> (fccov_kernel((y[:, None] - y).abs()).matrix * 27).round()
        tensor([[ 4., -1., -3.],
                [-1.,  3., -2.],
                [-3., -2.,  5.]])
    """

    matrix: Tensor


@torch.no_grad()
def fccov_kernel(dist: Tensor) -> FCCovKernel:
    r"""Turn distances into the matrix of a quadratic form, once for all steps of a training.

    .. math::
        \sum_j 1\{d_{ki} < d_{ji}\} 1\{d_{li} < d_{ji}\} = \min(c_{ik}, c_{il}), \qquad
        c_{ik} = \#\{ j : d_{ji} > d_{ki} \}

    Written out, the squares of :func:`fccov` sum products :math:`u_k u_l` with these weights, so
    that FCCov is :math:`u^\top K u / n^2` with K the sum of the minima over the centres i, centred
    along both sides and over n^2. With :math:`\min(a, b) = (a + b - |a - b|) / 2` and the centring,
    K is minus half the centred distances of the columns of c in the 1-norm.

    Args:
        dist: distances ``[N, N]``, N at least 3, without gradient.

    Returns:
        :class:`FCCovKernel`, in the dtype of ``dist``, float32 for half types. It takes
        N^3 / 2 additions (0.2 s for N = 1000 on one core) and N^2 numbers.

    Raises:
        TypeError: ``dist`` is not a floating-point tensor.
        ValueError: ``dist`` is not square, negative, asymmetric or not 0 on the diagonal, or N is
            below 3.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> x, y = torch.randn(50, 4), torch.randn(50, 3)
        >>> kernel = fccov_kernel(metric_distances(y))
        >>> for _ in range(3):
        ...     fccov(net(x), kernel).backward()

    Source:
        Derived here from the definition of arXiv 2502.15374.
    """
    _check_distances(dist)
    count = len(dist)
    distances = dist.detach().to(accumulate_dtype(dist.dtype))
    ascending = distances.sort(dim=1).values
    farther = count - torch.searchsorted(ascending, distances, right=True)  # [centre, point]
    profile = farther.T.to(distances.dtype).contiguous()
    above = torch.ones(count, count, dtype=torch.bool, device=dist.device).triu(1)
    apart = torch.zeros_like(distances).masked_scatter_(above, F.pdist(profile, p=1))
    apart = apart + apart.T
    apart = apart - apart.mean(0)
    return FCCovKernel((apart - apart.mean(1, keepdim=True)) * (-0.5 / count**2))


def fccov(
    u: Tensor,
    dist: Tensor | FCCovKernel,
    *,
    reduction: Reduction = "sum",
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Measure how the conditional mean of ``u`` depends on a response known by its distances.

    .. math::
        \mathrm{FCCov}_n = \frac{1}{n^2} \sum_{i,j} \Big[ \frac1n \sum_k (u_k - \bar u)\,
        1\{ d_{ki} < d_{ji} \} \Big]^2

    0 for a ``u`` whose mean does not depend on the response, positive otherwise (in a metric space
    whose balls determine measures). The distances enter through their order alone, as a quadratic
    form that :func:`fccov_kernel` finds: n^2 products a component and step in the place of n^3
    terms.

    Args:
        u: ``[N]`` or ``[N, D]``, each component by itself.
        dist: distances of the responses ``[N, N]``, N at least 3; or :func:`fccov_kernel` of them,
            which saves most of the work of a step. Of the whole batch where there is a process
            group.
        reduction: over the components: ``"sum"``, or ``"none"``.
        process_group: processes whose ``u`` count as one batch, in the order of ranks.

    Returns:
        No dimensions, or ``[D]`` for ``"none"`` (``[1]`` for a ``u`` of ``[N]``); at least 0
        but for rounding, float32 for half types.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: ``dist`` is not as :func:`fccov_kernel` wants it, or of another N.

    Example:
        >>> u, y = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 3.0])
        >>> value = fccov(u, (y[:, None] - y).abs())
        >>> f"{value:.6f} = 5/81"
        '0.061728 = 5/81'

    Source:
        "Fréchet Cumulative Covariance Net for Deep Nonlinear Sufficient Dimension Reduction with
        Random Objects", 2025, arXiv 2502.15374. The definition is public; the estimator is
        reconstructed from it, and equals the triple sum. It is biased by O(1/n), so batches of some
        hundreds are due.
    """
    check_floating("u", u)
    check_one_of("reduction", reduction, REDUCTIONS)
    if u.dim() not in (1, 2):
        raise ValueError(f"u must have shape [N] or [N, D], got {list(u.shape)}")
    rows = u.reshape(len(u), -1).to(accumulate_dtype(u.dtype))
    rows = gather_batch(rows, process_group)
    kernel = dist if isinstance(dist, FCCovKernel) else fccov_kernel(dist)
    matrix = kernel.matrix
    check_same_device("dist", matrix, "u", u)
    if len(matrix) != len(rows):
        raise ValueError(f"dist must be of the N = {len(rows)} points of u, got {len(matrix)}")
    centred = (rows - rows.mean(0)).T.contiguous()
    with full_precision(rows.device):
        # The matrix is symmetric; a few long rows times it are read in its own order.
        products = centred @ matrix.to(rows.dtype)
    value = (centred * products).sum(1) / len(rows) ** 2
    return value if reduction == "none" else value.sum()


def fccov_loss(
    f: Tensor,
    dist: Tensor | FCCovKernel,
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
        dist: distances of the responses, or their kernel, as for :func:`fccov`.
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
        >>> kernel = fccov_kernel(metric_distances(y))
        >>> fccov_loss(net(x), kernel, lam=0.1).backward()

    Source:
        As :func:`fccov`; the variance has 1 / n.
    """
    check_floating("f", f)
    check_shape("f", f, (None, None), "[N, D]")
    strength = scheduled("lam", lam, f, check_not_negative)
    rows = gather_batch(f.to(accumulate_dtype(f.dtype)), process_group)
    unit = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    penalty = (covariance(rows, correction=0) - unit).square().sum()
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
        >>> loss(f, fccov_kernel(metric_distances(torch.randn(50)))).backward()

    Source:
        arXiv 2502.15374, as :func:`fccov`.
    """

    def __init__(self, *, lam: float = 1.0, process_group: ProcessGroup | None = None) -> None:
        super().__init__()
        check_not_negative("lam", lam)
        self.lam = lam
        self.process_group = process_group

    def forward(self, f: Tensor, dist: Tensor | FCCovKernel) -> Tensor:
        """Return the loss of predictors ``[N, D]`` and distances ``[N, N]`` or their kernel."""
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
        unit = F.normalize(y)
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
