"""Floors that benchmark files share: memory traffic alone, measured in the same rounds as everything else."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

from regularizers._bench.case import Call


def fresh_fill(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Call:
    """Write a new tensor once: what every operator with this output pays, page faults included."""

    def call() -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).fill_(1)

    return call


def fresh_fill_huge_pages(*shape: int, dtype: torch.dtype = torch.float32) -> Call:
    """Write a new CPU tensor once after asking for huge pages, as our kernels do: how much of an advantage that is alone."""

    def call() -> Tensor:
        out = torch.empty(shape, dtype=dtype)
        _advise_huge_pages(out)
        return out.fill_(1)

    return call


def copy(bytes_moved: int, *, device: str = "cpu") -> Call:
    """Move so many bytes, half of them read and half written, between two tensors that exist: bytes over copy bandwidth."""
    source = torch.ones(bytes_moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _advise_huge_pages(tensor: Tensor) -> None:
    """Do what ``advise_huge_pages`` in csrc/cpu/common.h does: name the whole huge pages inside the tensor."""
    huge_page = 1 << 21
    first = -(-tensor.data_ptr() // huge_page) * huge_page
    last = (tensor.data_ptr() + tensor.nbytes) // huge_page * huge_page
    if first < last:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        if madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_HUGEPAGE):
            raise OSError(ctypes.get_errno(), "madvise(MADV_HUGEPAGE)")
