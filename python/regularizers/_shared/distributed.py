"""Batch statistics over a process group: differentiable collectives with one convention.

Every process holds its rows of one large batch and computes the same loss of all of them. Gradients
are added up over the processes on their way back, so an embedding gets ``world_size`` times its
gradient in the loss of the whole batch, and the parameters, which ``DistributedDataParallel``
averages over the processes, get exactly theirs.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def add_up(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of a tensor over the processes of a group, differentiably."""
    from torch.distributed.nn.functional import all_reduce

    total: Tensor = all_reduce(tensor, group=group)
    return total


def gather_batch(z: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the batch of all processes ``[..., B x world_size, D]``, in the order of ranks.

    Differentiable. Every process must have the same number of rows.
    """
    if group is None:
        return z
    from torch.distributed.nn.functional import all_gather

    whole = torch.cat(all_gather(z, group=group), dim=-2)
    if whole.requires_grad:
        # On its way back torch receives into buffers with the strides of the gradient, which the
        # collective ignores: a transposed gradient would arrive in another order.
        whole.register_hook(Tensor.contiguous)
    return whole


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
