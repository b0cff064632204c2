"""One launch for many tensors: a table of their addresses, cut into chunks of equal size.

A kernel gets the table and a list that says to which tensor each chunk belongs. Reading addresses
in Python costs about 0.2 us a tensor and column, a list of tensors through the dispatcher 0.5 us,
so an optimizer keeps its table and rewrites the columns that changed. csrc/decay_table.h names the
columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COLUMNS = (
    "param",
    "grad",
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "master",
    "reference",
    "mask",
    "numel",
    "first_chunk",
)

# What captured CUDA graphs go on reading; a graph does not keep memory alive that is not its own.
_READ_BY_GRAPHS: list[tuple[Tensor | None, ...]] = []


class TensorTable:
    """Addresses and sizes of a list of parameters and of what belongs to each of them.

    Args:
        numels: elements of each parameter.
        device: where the kernel runs.
        chunk_size: elements of a chunk.

    Attributes:
        rows: int64 ``[n, columns]`` on the device, what the kernel reads.
        chunks: int64 ``[c]`` on the device, the tensor of each chunk.
    """

    def __init__(self, numels: Sequence[int], device: torch.device, chunk_size: int) -> None:
        self.device = device
        self.chunk_size = chunk_size
        sizes = torch.tensor(numels, dtype=torch.int64)
        counts = (sizes + chunk_size - 1) // chunk_size
        self._host = torch.zeros(len(numels), len(COLUMNS), dtype=torch.int64)
        self._host[:, COLUMNS.index("numel")] = sizes
        self._host[:, COLUMNS.index("first_chunk")] = counts.cumsum(0) - counts
        self.chunks, _ = _beside(torch.repeat_interleave(counts), device)
        self._rows: Tensor | None = None
        self._addresses: dict[str, list[int]] = {}

    @property
    def rows(self) -> Tensor:
        """The table beside the tensors; uploaded again, without waiting, where it changed."""
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self._rows is not None and not capturing:
            return self._rows
        rows, pinned = self._rows, None
        if rows is None:
            rows, pinned = _beside(self._host, self.device)
        if capturing:
            # A replayed graph copies from `pinned` and reads the others. What is uploaded inside a
            # graph is there only after its replay, so it is not kept for steps outside.
            _READ_BY_GRAPHS.append((rows, self.chunks, pinned))
        else:
            self._rows = rows
        return rows

    def set(self, column: str, addresses: list[int]) -> None:
        """Set the addresses of a column; nothing happens where they are what they were."""
        if self._addresses.get(column) != addresses:
            self._addresses[column] = addresses
            self._host[:, COLUMNS.index(column)] = torch.tensor(addresses, dtype=torch.int64)
            self._rows = None


def _beside(host: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return a tensor on the device, and the page-locked copy that it is being copied from."""
    if device.type == "cpu":
        return host, None
    pinned = host.pin_memory()
    return pinned.to(device, non_blocking=True), pinned


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Return where the elements of each tensor begin."""
    return [tensor.data_ptr() for tensor in tensors]


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements of a tensor fill one piece of memory, in any order, each once."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether equal offsets in memory mean equal elements, for tensors of one shape."""
    return (a.is_contiguous() and b.is_contiguous()) or a.stride() == b.stride()


class Aligned:
    """Tensors of one row brought to one dense layout, with copies written back at the end.

    A parameter that is dense in any order of dimensions stays as it is, and so do the tensors laid
    out as it is.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._backs: list[tuple[Tensor, Tensor]] = []
        self._copies: list[Tensor] = []  # kept alive while the kernel may read them
        self.params = [
            param if is_dense(param) else self._copied(param, param.contiguous(), True)
            for param in params
        ]

    def _copied(self, tensor: Tensor, copy: Tensor, written: bool) -> Tensor:
        self._copies.append(copy)
        if written:
            self._backs.append((tensor, copy))
        return copy

    def align(self, tensors: Sequence[Tensor], *, written: bool) -> list[Tensor]:
        """Return the tensors in the layout of the parameters."""
        return [
            tensor
            if same_layout(tensor, param)
            else self._copied(
                tensor, torch.empty_like(param, dtype=tensor.dtype).copy_(tensor), written
            )
            for tensor, param in zip(tensors, self.params, strict=True)
        ]

    def write_back(self) -> None:
        """Copy what the kernel wrote to where it belongs."""
        for tensor, copy in self._backs:
            tensor.copy_(copy)
