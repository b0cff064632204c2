"""The parameters that one launch steps: their states, their vectors of scalars, their table."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regularizers.ops.decay import CHUNK_SIZES
from regularizers.ops.tensor_table import TensorTable, addresses, is_dense, same_layout

State = dict[str, Any]
# State tensors of a parameter's shape that the fused pass reads: their columns in the table.
COLUMNS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "reference", "mask")


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a DTensor, and any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    shard: Tensor = to_local()
    return shard


class Batch:
    """Parameters of one group on one device and of one dtype that have a gradient.

    Scalars of the state (``step``, ``delta``) are kept as elements of one vector, so that a step
    changes all of them at once; ``state[p][name]`` are views of it. The batch is kept from step to
    step and rebuilt where a parameter or an entry of its state is another one.

    Attributes:
        group: the parameter group.
        params: as the user sees them, perhaps DTensors.
        states: their states.
        grads: the gradients of this step, as ``params``.
        sharded: whether some of the parameters are DTensors.
        vectors: the scalars of the states, a vector ``[n]`` for each name.
        sums: float64 ``[n]``, sums of ``|param|`` over this process's shards after the step.
        counts: float64 ``[n]``, elements of each parameter over all processes.
    """

    def __init__(self, group: dict[str, Any], params: list[Tensor], states: list[State]) -> None:
        self.group = group
        self.params = params
        self.states = states
        self.grads: list[Tensor] = []
        self.device = params[0].device
        self.dtype = params[0].dtype
        self.sharded = any(hasattr(param, "device_mesh") for param in params)
        self.vectors: dict[str, Tensor] = {}
        self._entries: list[Any] = []
        self._table: TensorTable | None = None
        self.sums = torch.zeros(len(params), dtype=torch.float64, device=self.device)
        sizes = [max(param.numel(), 1) for param in params]
        self.counts = torch.tensor(sizes, dtype=torch.float64, device=self.device)

    def settle(self) -> None:
        """Take note of the entries of the states: the batch fits while they are these."""
        self._entries = self._flat_states()

    def _flat_states(self) -> list[Any]:
        return [entry for state in self.states for entry in state.values()]

    def fits(self, params: Sequence[Tensor], states: Sequence[State]) -> bool:
        """Whether the batch still is about these parameters and entries of their states."""
        return (
            len(params) == len(self.params)
            and all(map(operator.is_, params, self.params))
            and all(map(operator.is_, states, self.states))
            and len(entries := self._flat_states()) == len(self._entries)
            and all(map(operator.is_, entries, self._entries))
        )

    def vector(self, name: str) -> Tensor:
        """Return the vector whose elements are the entries ``name`` of the states."""
        if name not in self.vectors:
            entries = [state[name].to(self.device) for state in self.states]
            vector = torch.stack(entries)
            for state, element in zip(self.states, vector.unbind(), strict=True):
                state[name] = element
            self.vectors[name] = vector
            self.settle()
        return self.vectors[name]

    def locals(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return this process's shards."""
        return [local(tensor) for tensor in tensors] if self.sharded else list(tensors)

    def columns(self) -> dict[str, list[Tensor]]:
        """Return the state tensors that the pass reads, as local shards."""
        return {
            name: self.locals([state[name] for state in self.states])
            for name in COLUMNS
            if name in self.states[0]
        }

    def table(self, grads: Sequence[Tensor]) -> TensorTable | None:
        """Return the table of this step, or None where some tensor has another layout in memory."""
        params, columns = self.locals(self.params), self.columns()
        if self._table is None:
            dense = all(map(is_dense, params))
            if not dense or not all(
                all(map(same_layout, column, params)) for column in columns.values()
            ):
                return None
            self._table = TensorTable(
                [param.numel() for param in params],
                self.device,
                CHUNK_SIZES.get(self.device.type, 4096),
            )
        if not all(map(same_layout, grads, params)):
            return None
        self._table.set("param", addresses(params))
        self._table.set("grad", addresses(grads))
        for name, column in columns.items():
            self._table.set(name, addresses(column))
        return self._table


def over_shards(
    values: Sequence[Tensor], params: Sequence[Any], *, largest: bool = False
) -> list[Tensor]:
    """Return sums, or largest values, over the shards of DTensors; values of others as they are.

    One all-reduce of one vector for each mesh dimension; ``values`` have one shape and belong to
    ``params`` one to one.
    """
    found = list(values)
    by_mesh: dict[Any, list[int]] = {}
    for i, param in enumerate(params):
        if hasattr(param, "device_mesh"):
            by_mesh.setdefault(param.device_mesh, []).append(i)
    for mesh, members in by_mesh.items():
        for dimension in range(mesh.ndim):
            shared = [i for i in members if params[i].placements[dimension].is_shard()]
            if shared:
                vector = torch.stack([found[i] for i in shared])
                kinds = torch.distributed.ReduceOp
                operation = kinds.MAX if largest else kinds.SUM
                torch.distributed.all_reduce(vector, operation, group=mesh.get_group(dimension))
                for i, value in zip(shared, vector.unbind(), strict=True):
                    found[i] = value.to(found[i].dtype)
    return found


def global_sums(batches: Sequence[Batch]) -> None:
    """Add up ``sums`` over the shards of DTensors: one all-reduce of one vector a mesh dimension.

    Every process takes part with all its batches, in the order of groups. A parameter that several
    processes hold in full is counted once.
    """
    sharded = [batch for batch in batches if batch.sharded]
    meshes = {p.device_mesh: None for b in sharded for p in b.params if hasattr(p, "device_mesh")}
    for mesh in meshes:
        weights = [_weight(param, mesh) for batch in sharded for param in batch.params]
        vector = torch.cat([batch.sums for batch in sharded])
        vector *= torch.tensor(weights, dtype=vector.dtype).to(vector.device)
        for dimension in range(mesh.ndim):
            torch.distributed.all_reduce(vector, group=mesh.get_group(dimension))
        sizes = [len(batch.params) for batch in sharded]
        for batch, total in zip(sharded, vector.split(sizes), strict=True):
            batch.sums.copy_(total)


def _weight(param: Any, mesh: Any) -> float:
    """Return what part of a local sum counts: the others hold the same values."""
    if getattr(param, "device_mesh", None) != mesh:
        return 1 / float(mesh.size())
    copies = 1
    for dimension, placement in enumerate(param.placements):
        if placement.is_replicate():
            copies *= mesh.size(dimension)
    return 1 / copies
