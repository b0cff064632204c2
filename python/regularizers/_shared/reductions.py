"""How the losses of a batch become one number, and what the labels of a batch must look like."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from regularizers._shared.checks import check_tensor

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


def reduced(values: Tensor, reduction: Reduction) -> Tensor:
    """Return values of a batch, their mean or their sum."""
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()


def reduced_over(values: Tensor, counts: Tensor, reduction: Reduction) -> Tensor:
    """Reduce the values of the rows that count; the others are 0.

    Without a row that counts the result is 0 and keeps its graph. What stands in the rows that do
    not count must be finite: its gradient is multiplied by 0.

    Args:
        values: ``[N]``.
        counts: ``[N]``, boolean.
        reduction: over the rows that count.
    """
    kept = values.where(counts, 0 * values)
    if reduction == "mean":
        return kept.sum() / counts.sum().clamp_min(1)
    return reduced(kept, reduction)


def check_labels(name: str, labels: Tensor, size: int) -> None:
    """Raise unless ``labels`` is a vector of ``size`` integers."""
    check_tensor(name, labels)
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{name} must be integers, got {labels.dtype}")
    if labels.dtype == torch.bool or labels.dim() != 1 or labels.shape[0] != size:
        raise ValueError(
            f"{name} must be integers of shape [{size}], got {labels.dtype} of {list(labels.shape)}"
        )
