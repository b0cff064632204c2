"""Moments of a batch: centred values, Gram matrices, covariances; never summed in a half type."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from regularizers._shared.distributed import add_up
from regularizers.ops._operator import accumulate_dtype, full_precision


def center(
    x: Tensor, dims: tuple[int, ...], process_group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, float | Tensor]:
    """Return ``x`` about its mean over ``dims``, that mean, and over how many values it goes.

    Half types are widened. With a process group the mean is that of all processes, whose batches
    may differ in size, and only sums travel; the number of values is then a tensor.
    """
    x = x.to(accumulate_dtype(x.dtype))
    count: float | Tensor = math.prod([x.shape[dim] for dim in dims])
    if process_group is None:
        mean = x.mean(dims, keepdim=True)
    else:
        count = add_up(x.new_tensor(count), process_group)
        mean = add_up(x.sum(dims, keepdim=True), process_group) / count
    return x - mean, mean, count


def gram(x: Tensor) -> Tensor:
    """Return the inner products ``[..., C, C]`` of the columns of ``x``, ``[..., N, C]``."""
    x = x.to(accumulate_dtype(x.dtype))
    # Both triangles, and two products more in the backward pass where one would do: a symmetric
    # kernel would save about a third of the three (measured), of a term that is small beside the
    # encoder in front of it.
    with full_precision(x.device):
        return x.mT @ x


def covariance(
    x: Tensor, *, correction: int = 1, process_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return the covariance ``[..., C, C]`` of the columns of ``x``, ``[..., N, C]``.

    From centred values, so that a large mean costs no digits. With a process group it is that of
    the rows of all processes.
    """
    centered, _, count = center(x, (-2,), process_group)
    products = gram(centered)
    if process_group is not None:
        products = add_up(products, process_group)
    return products / (count - correction)


def off_diagonal(matrix: Tensor) -> Tensor:
    """Return square matrices ``[..., C, C]`` with zeros on their diagonals."""
    return matrix - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))
