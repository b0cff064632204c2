"""Log-sum-exp over the pairs of a batch, by rows, with rules for which pairs count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_floating,
    check_not_negative,
    check_one_of,
    check_same_device,
    check_same_dtype,
)
from regularizers.ops._operator import accumulate_dtype, full_precision

Kind = Literal["dot", "sqdist", "dist"]
Pushing = Literal["exp", "linear"]
KINDS = ("dot", "sqdist", "dist")
PUSHING = ("exp", "linear")


@dataclass(frozen=True)
class SameLabel:
    """Pairs of equal labels.

    Args:
        labels: of the rows, ``[N]``, integers.
        column_labels: of the columns, ``[M]``; None where the columns are the rows.
    """

    labels: Tensor
    column_labels: Tensor | None = None


@dataclass(frozen=True)
class OtherLabel:
    """Pairs of different labels; arguments as in :class:`SameLabel`."""

    labels: Tensor
    column_labels: Tensor | None = None


@dataclass(frozen=True)
class LabelWindow:
    r"""Pairs whose targets are near: :math:`|y_i - y_j| \le w`.

    Args:
        targets: of the rows, ``[N]`` or ``[N, L]`` (the mean absolute difference over L counts);
            the columns are the rows.
        window: w, in units of the targets.
    """

    targets: Tensor
    window: float


@dataclass(frozen=True)
class FalselyNear:
    r"""Pairs whose targets are far and whose predictions are near, weighted by how far.

    Pairs with :math:`l_{ij} = |y_i - y_j| > w` and :math:`|\hat y_i - \hat y_j| \le w`, with a
    weight in the sum of exponentials of :math:`e^{\eta l_{ij}}` (``"exp"``) or
    :math:`\eta l_{ij}` (``"linear"``).

    Args:
        targets: of the rows, ``[N]`` or ``[N, L]``; the columns are the rows.
        predictions: of the same shape.
        window: w, in units of the targets.
        push: :math:`\eta`.
        pushing: the form of the weight.
    """

    targets: Tensor
    predictions: Tensor
    window: float
    push: float = 0.0
    pushing: Pushing = "exp"


PairRule = SameLabel | OtherLabel | LabelWindow | FalselyNear


class PairwiseSums(NamedTuple):
    """What :func:`pairwise_logsumexp` finds for every row.

    Attributes:
        logsumexp: of the scores over the row's pairs, ``[N]``; -inf for a row without pairs.
        total: the sum of the scores themselves, without the rule's weights, ``[N]``.
        pair_count: how many pairs the row has, ``[N]``, int64.
    """

    logsumexp: Tensor
    total: Tensor
    pair_count: Tensor


def pairwise_logsumexp(
    x: Tensor,
    y: Tensor | None = None,
    *,
    kind: Kind = "dot",
    scale: float = 1.0,
    pairs: PairRule | None = None,
    column_bias: Tensor | None = None,
    exclude_self: bool | None = None,
) -> PairwiseSums:
    r"""Reduce the scores of all pairs of rows of ``x`` and ``y``, without the matrix of scores.

    .. math::
        s_{ij} = \text{scale} \cdot d(x_i, y_j) + b_j, \qquad
        \text{logsumexp}_i = \log \sum_{j \in A_i} w_{ij} e^{s_{ij}}, \qquad
        \text{total}_i = \sum_{j \in A_i} s_{ij}

    with :math:`d` the inner product, the squared distance or the distance, and :math:`A_i` the
    pairs that the rule allows.

    Args:
        x: ``[N, D]``, floating point.
        y: ``[M, D]``, of the same type; None for ``x`` itself.
        kind: ``"dot"``, ``"sqdist"`` or ``"dist"``.
        scale: of the scores; negative for a distance that repels.
        pairs: the rule for which pairs count, with what weight; None for all.
        column_bias: ``[M]``, added to the scores of a column.
        exclude_self: leave out the pairs i = j; by default where ``y`` is None.

    Returns:
        Log-sum-exp, sum and number of the scores of each row, float32 for half types. A row
        without pairs gets -inf, 0 and 0, and gives no gradient.

    Raises:
        TypeError: tensors are not floating point, or differ in type.
        ValueError: a shape or an option is out of range.

    Example:
        >>> import torch
        >>> from regularizers.ops import SameLabel, pairwise_logsumexp
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> same = SameLabel(torch.tensor([0, 0, 1]))
        >>> pairwise_logsumexp(z, pairs=same)  # doctest: +NORMALIZE_WHITESPACE
        PairwiseSums(logsumexp=tensor([1., 1., -inf]), total=tensor([1., 1., 0.]),
                     pair_count=tensor([1, 1, 0]))
    """
    check_floating("x", x)
    check_one_of("kind", kind, KINDS)
    own = y is None
    columns = x if y is None else y
    if not own:
        check_same_dtype("y", columns, "x", x)
        check_same_device("y", columns, "x", x)
    if x.dim() != 2 or columns.dim() != 2 or x.shape[1] != columns.shape[1]:
        raise ValueError(
            "x and y must have shapes [N, D] and [M, D], "
            f"got {list(x.shape)} and {list(columns.shape)}"
        )
    exclude = own if exclude_self is None else exclude_self
    return PairwiseSums(
        *_reference(x, columns, kind, float(scale), pairs, column_bias, exclude),
    )


def _scores(x: Tensor, y: Tensor, kind: str) -> Tensor:
    if kind == "dot":
        return x @ y.T
    # About the mean, so that far-away origins cost no digits.
    center = y.mean(0).detach() if len(y) else y.new_zeros(y.shape[1])
    x, y = x - center, y - center
    squares = (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * (x @ y.T)).clamp_min(0)
    if kind == "sqdist":
        return squares
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)


def _difference(values: Tensor) -> Tensor:
    values = values.detach().reshape(len(values), -1)
    return (values[:, None] - values[None]).abs().mean(-1)


def _allowed(
    pairs: PairRule | None, shape: tuple[int, int], like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return which pairs count, and the logarithms of their weights."""
    if pairs is None:
        return like.new_ones(shape, dtype=torch.bool), None
    if isinstance(pairs, (SameLabel, OtherLabel)):
        columns = pairs.labels if pairs.column_labels is None else pairs.column_labels
        same = pairs.labels[:, None] == columns
        return (same if isinstance(pairs, SameLabel) else ~same), None
    check_not_negative("window", pairs.window)
    far = _difference(pairs.targets)
    if isinstance(pairs, LabelWindow):
        return far <= pairs.window, None
    allowed = (far > pairs.window) & (_difference(pairs.predictions) <= pairs.window)
    if pairs.pushing == "exp":
        return allowed, pairs.push * far.to(like.dtype)
    return allowed, (pairs.push * far).log().to(like.dtype)


def _reference(
    x: Tensor,
    y: Tensor,
    kind: str,
    scale: float,
    pairs: PairRule | None,
    column_bias: Tensor | None,
    exclude_self: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(x.dtype)
    with full_precision(x.device):
        scores = scale * _scores(x.to(dtype), y.to(dtype), kind)
    if column_bias is not None:
        scores = scores + column_bias.to(dtype)
    allowed, log_weight = _allowed(pairs, (len(x), len(y)), scores)
    if exclude_self:
        allowed = allowed & ~torch.eye(len(x), len(y), dtype=torch.bool, device=x.device)
    if log_weight is not None:
        # A pair of weight 0 (nothing pushes it) counts, and adds nothing.
        weighted = scores + log_weight
        weighted = torch.where(log_weight == -torch.inf, -torch.inf, weighted)
    else:
        weighted = scores
    weighted = torch.where(allowed, weighted, -torch.inf)
    top = weighted.detach().amax(1) if len(y) else scores.new_full((len(x),), -torch.inf)
    finite = top > -torch.inf
    shifted = torch.where(
        finite[:, None], weighted - torch.where(finite, top, 0)[:, None], -torch.inf
    )
    summed = shifted.exp().sum(1)
    logsumexp = torch.where(
        finite | top.isnan(), torch.where(finite, summed, 1).log() + top, -torch.inf
    )
    total = torch.where(allowed, scores, 0).sum(1)
    return logsumexp, total, allowed.sum(1)
