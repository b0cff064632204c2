"""Ranking inside a batch: each row's positive against all other columns, and what that needs."""

from __future__ import annotations

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_floating,
    check_positive,
    check_same_device,
    check_same_dtype,
)
from regularizers.ops import OtherLabel, pairwise_logsumexp


def ranking_rows(
    queries: Tensor,
    columns: Tensor,
    *,
    scale: float = 1.0,
    positive: Tensor | None = None,
    column_bias: Tensor | None = None,
) -> Tensor:
    r"""Return the cross-entropy of each row's positive column, ``[N]``, without the logits.

    .. math::
        s_{ij} = \text{scale} \langle q_i, c_j \rangle + b_j, \qquad
        -\log \frac{e^{s_{i p_i}}}{\sum_j e^{s_{ij}}}
        = \log \Big(1 + e^{\operatorname{logsumexp}_{j \ne p_i} s_{ij} - s_{i p_i}}\Big)

    The right-hand side keeps the digits of a small loss, which the difference of two large numbers
    would lose, and is never negative.

    Args:
        queries: ``[N, D]``.
        columns: ``[M, D]``, M at least N.
        scale: of the inner products.
        positive: p, ``[N]`` int64; None for :math:`p_i = i`.
        column_bias: b, ``[M]``.
    """
    if positive is None:
        others = pairwise_logsumexp(
            queries, columns, scale=scale, column_bias=column_bias, exclude_self=True
        )
        chosen = columns[: len(queries)]
        bias = None if column_bias is None else column_bias[: len(queries)]
    else:
        index = torch.arange(len(columns), device=columns.device)
        others = pairwise_logsumexp(
            queries,
            columns,
            scale=scale,
            column_bias=column_bias,
            pairs=OtherLabel(positive, index),
        )
        chosen = columns[positive]
        bias = None if column_bias is None else column_bias[positive]
    score = scale * (queries * chosen).sum(1)
    if bias is not None:
        score = score + bias
    margin = others.logsumexp - score
    return torch.logaddexp(margin, torch.zeros_like(margin))


def check_rows(name: str, x: Tensor) -> None:
    """Raise unless ``x`` holds two or more embeddings."""
    check_floating(name, x)
    if x.dim() != 2 or x.shape[0] < 2:
        raise ValueError(f"{name} must have shape [batch >= 2, features], got {list(x.shape)}")


def check_pairs(a_name: str, a: Tensor, b_name: str, b: Tensor) -> None:
    """Raise unless two batches hold embeddings of the same kind, row by row."""
    check_rows(a_name, a)
    check_floating(b_name, b)
    check_same_dtype(b_name, b, a_name, a)
    check_same_device(b_name, b, a_name, a)
    if b.shape != a.shape:
        raise ValueError(f"{b_name} must have the shape of {a_name}, got {list(b.shape)}")


def fold_scale(a: Tensor, scale: float | Tensor) -> tuple[Tensor, float]:
    """Return ``a`` with a scale that is a tensor multiplied in, and what remains as a number."""
    if not isinstance(scale, Tensor):
        check_positive("scale", scale)
        return a, float(scale)
    if scale.dim() != 0 or not scale.is_floating_point():
        raise ValueError(
            "scale must be a number or a floating-point tensor with no dimensions, "
            f"got {scale.dtype} with {scale.dim()} dimensions"
        )
    return a * scale.to(a), 1.0
