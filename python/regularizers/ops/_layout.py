"""Which memory layouts elementwise operators keep: row-major and channels_last."""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def empty_dense(x: Tensor) -> Tensor:
    """Return a new tensor like ``x``: channels_last where ``x`` is, row-major otherwise."""
    if keeps_channels_last(x):
        return torch.empty_like(x)
    return x.new_empty(x.shape)


def keeps_channels_last(x: Tensor) -> bool:
    """Tell whether ``x`` is channels_last, in two or three dimensions, and not row-major too."""
    layout = _CHANNELS_LAST.get(x.dim())
    return layout is not None and not x.is_contiguous() and x.is_contiguous(memory_format=layout)


def in_layout_of(like: Tensor, x: Tensor) -> Tensor:
    """Return ``x`` with its elements in memory as those of ``like``, an ``empty_dense`` tensor."""
    if keeps_channels_last(like):
        return x.contiguous(memory_format=_CHANNELS_LAST[x.dim()])
    return x.contiguous()
