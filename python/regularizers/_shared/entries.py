"""Reducing a loss over the entries that count, in one process or over all of a group."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from regularizers._shared.distributed import add_up


def reduce_entries(
    values: Tensor,
    reduction: str,
    *,
    valid: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the mean or the sum of the valid entries, or the entries with 0 for the others.

    Without any valid entry the mean is 0, with a live graph. With a group, entries of all processes
    count alike, however many a process has; gradients follow the convention of
    :mod:`regularizers._shared.distributed`.

    Args:
        values: the loss of every entry, any shape.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        valid: bool, broadcastable to ``values``; None for all.
        group: processes whose entries are one batch; ``"none"`` gives those of this process.
    """
    if valid is not None:
        valid = valid.expand_as(values)
        values = values.where(valid, 0)
    if reduction == "none":
        return values
    total = values.sum()
    if group is not None:
        total = add_up(total, group)
    if reduction == "sum":
        return total
    count = values.new_full((), values.numel()) if valid is None else valid.sum().to(values)
    if group is not None:
        dist.all_reduce(count, group=group)
    return total / count.clamp_min(1)
