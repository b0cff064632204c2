"""Meters of similarity scores: the best F1 over thresholds, and how far positives stand out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_floating,
    check_not_negative,
    check_same_device,
    check_shape,
    check_tensor,
)
from regularizers.ops._operator import accumulate_dtype


class SimilarityF1(NamedTuple):
    """What :func:`similarity_f1` finds, tensors with no dimensions.

    Attributes:
        f1: the largest F1 of all thresholds.
        precision: at that threshold.
        recall: at that threshold.
        threshold: scores of at least this count as positive.

    Example:
        >>> similarity_f1(torch.tensor([0.9, 0.1]), torch.tensor([1, 0])).threshold
        tensor(0.9000)
    """

    f1: Tensor
    precision: Tensor
    recall: Tensor
    threshold: Tensor


@torch.no_grad()
def similarity_f1(sim: Tensor, label: Tensor) -> SimilarityF1:
    r"""Find the threshold on similarities that tells pairs from non-pairs best.

    .. math::
        F_1(t) = \frac{2\, \mathrm{TP}(t)}{|\{p : s_p \ge t\}| + |\{p : l_p = 1\}|}, \qquad
        t \in \{s_p\}

    Of several thresholds with the largest F1 the lowest is returned, the one of largest recall.
    One sort, no loop; equal scores are never told apart.

    Args:
        sim: s, scores of pairs, ``[P]``, P at least 1; any range.
        label: l, ``[P]``, 1 or True for positive pairs, of which there is at least one.

    Returns:
        F1, precision, recall and threshold, in the dtype of ``sim`` (float32 for half types),
        without gradient. The threshold is the lowest score that counts as positive. NaN in ``sim``
        makes all four NaN.

    Raises:
        TypeError: ``sim`` is not floating point, or ``label`` is not a tensor.
        ValueError: shapes do not fit, or labels are not 0 and 1 or hold no 1.

    Example:
        >>> found = similarity_f1(torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([1, 0, 1, 0]))
        >>> round(found.f1.item(), 4), round(found.threshold.item(), 4)
        (0.8, 0.7)

    Source:
        L. Hallee et al., 2024, arXiv 2401.15713; authors' code read. It adds 1e-8 to a
        denominator, which makes 0.999999995 of a perfect score, and clips scores to [-1, 1], which
        makes all scores beyond equal.
    """
    check_floating("sim", sim)
    check_tensor("label", label)
    if sim.dim() != 1 or len(sim) < 1:
        raise ValueError(f"sim must have shape [pairs >= 1], got {list(sim.shape)}")
    check_shape("label", label, tuple(sim.shape), "[pairs] as sim has")
    check_same_device("label", label, "sim", sim)
    if not bool(((label == 0) | (label == 1)).all()) or not bool(label.any()):
        raise ValueError("label must hold 0 and 1, and at least one 1")
    scores, order = sim.to(accumulate_dtype(sim.dtype)).sort(descending=True)
    hits = label[order].to(torch.float64).cumsum(0)
    selected = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=sim.device)
    f1 = 2 * hits / (selected + hits[-1])
    last_of_equals = torch.ones_like(scores, dtype=torch.bool)
    last_of_equals[:-1] = scores[:-1] > scores[1:]
    f1 = torch.where(last_of_equals, f1, -1)
    best = len(f1) - 1 - f1.flip(0).argmax()
    found = (f1[best], hits[best] / selected[best], hits[best] / hits[-1], scores[best])
    spoilt = scores.isnan().any()
    return SimilarityF1(*(torch.where(spoilt, torch.nan, x).to(scores.dtype) for x in found))


def similarity_ratio(pos: Tensor, neg: Tensor, eps: float = 1e-8) -> Tensor:
    r"""Compare the mean similarity of pairs with that of non-pairs.

    .. math:: \left| \frac{\bar s^+}{\bar s^- + \varepsilon} \right|

    A meter, not a loss: it has no upper bound, and says little where the mean of the non-pairs is
    near 0, as it is for centred embeddings.

    Args:
        pos: similarities of pairs, any shape but not empty.
        neg: of non-pairs, likewise.
        eps: added to the denominator, at least 0.

    Returns:
        A tensor with no dimensions; float64 for float64, else float32.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: a tensor is empty, or ``eps`` is below 0.

    Example:
        >>> similarity_ratio(torch.tensor([0.75, 0.75]), torch.tensor([0.5, 0.0]))
        tensor(3.)

    Source:
        L. Hallee et al., 2024, arXiv 2401.15713; authors' code read.
    """
    for name, values in (("pos", pos), ("neg", neg)):
        check_floating(name, values)
        if values.numel() == 0:
            raise ValueError(f"{name} must not be empty, got shape {list(values.shape)}")
    check_not_negative("eps", eps)
    wide = accumulate_dtype(pos.dtype)
    return (pos.to(wide).mean() / (neg.to(wide).mean() + eps)).abs()
