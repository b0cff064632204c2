"""Directions of vectors and the cosine between them; a vector of no length has none."""

from __future__ import annotations

import torch
from torch import Tensor

from regularizers.ops._operator import accumulate_dtype

SHORTEST = 1e-12


def unit(x: Tensor, *, eps: float = SHORTEST) -> Tensor:
    """Return the vectors along the last axis with length 1, computed in float32 for half types.

    A vector of length at most ``eps`` becomes 0 and takes no gradient: dividing it by ``eps``, as
    ``F.normalize`` does, gives it a gradient of some 1e12.
    """
    x = x.to(accumulate_dtype(x.dtype))
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    none = length <= eps
    return torch.where(none, 0, x / torch.where(none, 1, length))


def cosine(a: Tensor, b: Tensor, *, dim: int = -1, eps: float = SHORTEST) -> Tensor:
    """Return the cosine between vectors along ``dim``, computed in float32 for half types.

    0, without gradient, where one of them has length at most ``eps``. No normalised copy is made.
    """
    a, b = a.to(accumulate_dtype(a.dtype)), b.to(accumulate_dtype(b.dtype))
    lengths = [torch.linalg.vector_norm(vector, dim=dim) for vector in (a, b)]
    none = (lengths[0] <= eps) | (lengths[1] <= eps)
    scale = torch.where(none, 1, lengths[0] * lengths[1])
    return torch.where(none, 0, (a * b).sum(dim) / scale)
