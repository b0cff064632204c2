"""Reducing one loss a row to what ``reduction`` asks for."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("none", "mean", "sum")  # the place is the number that kernels take


def reduce_rows(rows: Tensor, reduction: Reduction) -> Tensor:
    """Return the mean or the sum of the rows, or the rows themselves for ``"none"``."""
    if reduction == "none":
        return rows
    return rows.mean() if reduction == "mean" else rows.sum()
