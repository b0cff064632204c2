"""Checks of kept lengths k, shared by the operators and the methods that keep a prefix."""

from __future__ import annotations

import torch
from torch import Tensor

from regularizers._shared.checks import check_at_least, check_same_device, known_range


def check_prefix_length(k: int, size: int) -> None:
    """Raise unless ``k`` is an int in [1, size]."""
    check_at_least("k", k, 1)
    if k > size:
        raise ValueError(f"k must be at most the {size} there are, got {k}")


def check_prefix_lengths(k: Tensor, size: int, x: Tensor, leading: int) -> None:
    """Raise unless ``k`` holds int64 lengths in [1, size] for the ``leading`` dimensions of x."""
    if k.dtype != torch.int64:
        raise TypeError(f"k must be an int or an int64 tensor, got dtype {k.dtype}")
    check_same_device("k", k, "x", x)
    fits = k.dim() <= leading and all(
        have in (1, want) for have, want in zip(k.shape, x.shape, strict=False)
    )
    if not fits:
        raise ValueError(
            f"k must have the leading dimensions of x, {list(x.shape[:leading])}, "
            f"got shape {list(k.shape)}"
        )
    values = known_range(k)
    if values is not None and not 1 <= values[0] <= values[1] <= size:
        raise ValueError(f"k must lie in [1, {size}], got values from {values[0]} to {values[1]}")
