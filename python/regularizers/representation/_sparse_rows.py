"""Weighted sums of a few rows of a matrix, for each token its own: the sparse side of a product."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from regularizers.ops._operator import transformed

# A token that uses more than one row in so many has them faster from the dense product: measured
# forward and backward on one core, with 2048 to 16384 rows of 512 to 768 numbers.
_DENSE_FROM = 12


def weighted_rows(values: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    r"""Return :math:`y_b = \sum_j v_{bj} W_{i_{bj}}`, the product of a sparse matrix and ``rows``.

    Only the k rows of a token are read, and only they get a gradient. Where k is a large part of
    all rows, the product with the zeros written out is faster, and is used.

    Args:
        values: v, ``[B, k]``.
        indices: i, int64 ``[B, k]``, different within a token.
        rows: W, ``[M, D]``, of the dtype of ``values``.

    Returns:
        ``[B, D]``. A second derivative of the sparse form raises.
    """
    if transformed() or indices.shape[1] * _DENSE_FROM > rows.shape[0]:
        return values.new_zeros(len(values), len(rows)).scatter(1, indices, values) @ rows
    return F.embedding_bag(indices, rows, per_sample_weights=values, mode="sum")
