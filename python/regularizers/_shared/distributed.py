"""Batch statistics over a process group: differentiable collectives with one convention.

Every process holds its rows of one large batch and computes the same loss of all of them. Gradients
are added up over the processes on their way back, so an embedding gets ``world_size`` times its
gradient in the loss of the whole batch, and the parameters, which ``DistributedDataParallel``
averages over the processes, get exactly theirs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def add_up(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of a tensor over the processes of a group, differentiably."""
    total: Tensor = _AddUp.apply(tensor, group)  # type: ignore[no-untyped-call]
    return total


def gather_batch(z: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the batch of all processes ``[..., B x world_size, D]``, in the order of ranks.

    Differentiable. Every process must have the same number of rows.
    """
    if group is None:
        return z
    batch: Tensor = _GatherBatch.apply(z, group)  # type: ignore[no-untyped-call]
    return batch


# torch.distributed.nn.functional has both, deprecated; what is to replace them is private.
class _AddUp(torch.autograd.Function):
    """A sum over processes: what comes back to each is added up over them again."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return add_up(grad, ctx.group), None


class _GatherBatch(torch.autograd.Function):
    """Rows of all processes; each gets back the sum of what all of them say of its own."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.rows = group, z.shape[-2]
        parts = [z.new_empty(z.shape) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, z.contiguous(), group=group)
        return torch.cat(parts, dim=-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = dist.get_rank(ctx.group) * ctx.rows
        return add_up(grad, ctx.group).narrow(-2, own, ctx.rows), None


def agree_on_seed(seed: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return one seed for all processes of a group: the largest."""
    if group is None:
        return seed
    seed = seed.clone()
    dist.all_reduce(seed, dist.ReduceOp.MAX, group=group)
    return seed


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the rows ``[B, *]`` of all processes, in the order of ranks; no gradient.

    Every process must have the same number of rows.
    """
    rows = rows.detach()
    if group is None:
        return rows
    rows = rows.contiguous()
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, rows, group=group)
    return torch.cat(parts)
