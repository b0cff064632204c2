"""Reducing one loss a row to what ``reduction`` asks for."""

from __future__ import annotations

from torch import Tensor

from regularizers.ops.masked_linear_cross_entropy import Reduction


def reduce_rows(rows: Tensor, reduction: Reduction) -> Tensor:
    """Return the mean or the sum of the rows, or the rows themselves for ``"none"``."""
    if reduction == "none":
        return rows
    return rows.mean() if reduction == "mean" else rows.sum()
