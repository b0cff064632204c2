"""Floors that benchmark files share: memory traffic alone, measured beside everything else."""

from __future__ import annotations

import ctypes
import functools
import mmap
from typing import Any

import torch
from torch import Tensor

from regularizers._bench.case import Call


def fresh_fill(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Call:
    """Write a new tensor once: what every operator with this output pays, page faults included."""

    def call() -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).fill_(1)

    return call


def fresh_fill_huge_pages(*shape: int, dtype: torch.dtype = torch.float32) -> Call:
    """Write a new CPU tensor once, on huge pages as our kernels do: how much those alone gain."""

    def call() -> Tensor:
        out = torch.empty(shape, dtype=dtype)
        _advise_huge_pages(out)
        return out.fill_(1)

    return call


def copy(bytes_moved: int, *, device: str = "cpu") -> Call:
    """Move so many bytes, half of them read, half written, without allocating: copy bandwidth."""
    source = torch.ones(bytes_moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _advise_huge_pages(tensor: Tensor) -> None:
    """Name the whole huge pages inside a tensor, as ``advise_huge_pages`` in csrc/cpu/common.h."""
    huge_page = 1 << 21
    first = -(-tensor.data_ptr() // huge_page) * huge_page
    last = (tensor.data_ptr() + tensor.nbytes) // huge_page * huge_page
    if first < last:
        length = ctypes.c_size_t(last - first)
        if _libc().madvise(ctypes.c_void_p(first), length, mmap.MADV_HUGEPAGE) != 0:
            raise OSError(ctypes.get_errno(), "madvise(MADV_HUGEPAGE)")


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
