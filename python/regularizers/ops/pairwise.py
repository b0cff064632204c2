"""Log-sum-exp over the pairs of a batch, by rows, with rules for which pairs count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_finite,
    check_floating,
    check_not_negative,
    check_one_of,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
)
from regularizers._shared.scheduled import scheduled
from regularizers.ops._operator import (
    Operator,
    accumulate_dtype,
    autocast_dtype,
    differentiate_backward,
    full_precision,
    transformed,
)

Kind = Literal["dot", "sqdist", "dist"]
Pushing = Literal["exp", "linear"]
KINDS = ("dot", "sqdist", "dist")  # the place is the number that kernels take
_DOT, _SQDIST, _DIST = range(3)
PUSHING = ("exp", "linear")
# Rules as kernels take them.
_EVERY, _SAME, _OTHER, _WINDOW, _FALSE_EXP, _FALSE_LINEAR = range(6)


@dataclass(frozen=True)
class SameLabel:
    """Pairs of equal labels.

    Args:
        labels: of the rows, ``[N]``, integers.
        column_labels: of the columns, ``[M]``; None where they are those of the rows.
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
        targets: of the rows, floating point, ``[N]`` or ``[N, L]`` (the mean absolute difference
            over L counts); the columns have the same. Compared in the type that the scores have
            (float32 for half types).
        window: w, in units of the targets, at least 0.
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
        targets: as in :class:`LabelWindow`.
        predictions: of the same shape; not differentiated through.
        window: w, in units of the targets, at least 0.
        push: :math:`\eta`, at least 0.
        pushing: the form of the weight. A pair of weight 0 counts and adds nothing.
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
    scale: float | Tensor = 1.0,
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
    pairs that the rule allows, of weight :math:`w_{ij}` (1 but for :class:`FalselyNear`).

    Scores live for a tile. The backward pass makes them again: memory grows with N + M. Where
    ``y`` is None, the CPU kernel meets every pair of points once and takes it for both.

    Distances come from :math:`|x|^2 + |y|^2 - 2 x \cdot y` about the mean of ``y``, so that their
    origin does not matter. Of a squared distance a rounding of some
    :math:`10^{-7} (|x|^2 + |y|^2)` remains in float32, norms taken about that mean: points nearer
    than a thousandth of the spread of the batch have no digit. The derivative of a distance is
    taken for 0 where the distance is 0.

    Args:
        x: ``[N, D]``; float32, float64, bfloat16 or float16.
        y: ``[M, D]``, of the same type (outside of autocast); None for ``x`` itself.
        kind: ``"dot"``, ``"sqdist"`` or ``"dist"``.
        scale: of the scores, finite; negative for a distance that repels. A number or a tensor
            with no dimensions; not differentiated through (for a learned temperature multiply
            ``x`` by it).
        pairs: the rule for which pairs count, with what weight; None for all.
        column_bias: ``[M]``, floating point, added to the scores of a column; differentiable.
        exclude_self: leave out the pairs i = j; by default where ``y`` is None.

    Returns:
        Log-sum-exp, sum and number of the scores of each row, float32 for half types and under
        autocast. A row without pairs gets -inf, 0 and 0, and gives no gradient; NaN gives NaN.

    Raises:
        TypeError: a tensor or number is of the wrong type, or ``y`` of another type than ``x``.
        ValueError: a shape does not fit, or an option is out of range.

    Example:
        >>> import torch
        >>> from regularizers.ops import SameLabel, pairwise_logsumexp
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> same = SameLabel(torch.tensor([0, 0, 1]))
        >>> found = pairwise_logsumexp(z, pairs=same)
        >>> found.logsumexp, found.total, found.pair_count
        (tensor([1.0000, 1.0000,   -inf]), tensor([1., 1., 0.]), tensor([1, 1, 0]))

    Source:
        The denominators of contrastive losses since InfoNCE (A. van den Oord et al., 2018, arXiv
        1807.03748) and of dispersive ones; exact. Streaming with a running maximum as in flash
        attention (T. Dao et al., 2022, arXiv 2205.14135).
    """
    check_floating("x", x)
    check_one_of("kind", kind, KINDS)
    exclude = y is None if exclude_self is None else exclude_self
    if not isinstance(exclude, bool):
        raise TypeError(f"exclude_self must be a bool, got {type(exclude).__name__}")
    if y is not None:
        check_floating("y", y)
        check_same_device("y", y, "x", x)
        if autocast_dtype(x.device) is not None:
            dtype = torch.promote_types(x.dtype, y.dtype)
            x, y = x.to(dtype), y.to(dtype)
        check_same_dtype("y", y, "x", x)
    columns = x if y is None else y
    if x.dim() != 2 or columns.dim() != 2 or x.shape[1] != columns.shape[1]:
        raise ValueError("x and y must have shapes [N, D] and [M, D] of the same D")
    if y is x:
        y = None
    dtype = accumulate_dtype(x.dtype)
    if column_bias is not None:
        check_floating("column_bias", column_bias)
        check_shape("column_bias", column_bias, (columns.shape[0],), "[rows of y]")
        check_same_device("column_bias", column_bias, "x", x)
        column_bias = column_bias.to(dtype)
    tensors, numbers = _rule_arguments(pairs, x, columns)
    factor = scheduled("scale", scale, x, check_finite)
    arguments = (
        x, y, column_bias, *tensors, factor, KINDS.index(kind), *numbers, exclude,
    )  # fmt: skip
    found = _reference(*arguments) if transformed() else PAIRWISE_LOGSUMEXP(*arguments)
    return PairwiseSums(*found)


_Tensors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _rule_arguments(
    pairs: PairRule | None, x: Tensor, columns: Tensor
) -> tuple[_Tensors, tuple[int, float, float]]:
    """Check a rule; return (labels, column labels, targets, predictions), (rule, window, push)."""
    if pairs is None:
        return (None, None, None, None), (_EVERY, 0.0, 0.0)
    if isinstance(pairs, (SameLabel, OtherLabel)):
        labels = _labels("labels", pairs.labels, x)
        column_labels = None
        if pairs.column_labels is not None:
            column_labels = _labels("column_labels", pairs.column_labels, columns)
        elif columns.shape[0] != x.shape[0]:
            raise ValueError("column_labels must be given where y has another length than x")
        rule = _SAME if isinstance(pairs, SameLabel) else _OTHER
        return (labels, column_labels, None, None), (rule, 0.0, 0.0)
    if not isinstance(pairs, (LabelWindow, FalselyNear)):
        raise TypeError(
            "pairs must be None, SameLabel, OtherLabel, LabelWindow or FalselyNear, "
            f"got {type(pairs).__name__}"
        )
    if columns.shape[0] != x.shape[0]:
        raise ValueError("y must have as many rows as x where pairs go by targets")
    check_not_negative("window", pairs.window)
    targets = _targets("targets", pairs.targets, x)
    window = float(pairs.window)
    if isinstance(pairs, LabelWindow):
        return (None, None, targets, None), (_WINDOW, window, 0.0)
    check_not_negative("push", pairs.push)
    check_one_of("pushing", pairs.pushing, PUSHING)
    predictions = _targets("predictions", pairs.predictions, x)
    if predictions.shape != targets.shape:
        raise ValueError("predictions must have the shape of targets")
    rule = _FALSE_EXP if pairs.pushing == "exp" else _FALSE_LINEAR
    return (None, None, targets, predictions), (rule, window, float(pairs.push))


def _labels(name: str, labels: Tensor, points: Tensor) -> Tensor:
    check_tensor(name, labels)
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{name} must be integers, got {labels.dtype}")
    check_shape(name, labels, (points.shape[0],), "[one label a point]")
    check_same_device(name, labels, "x", points)
    return labels.to(torch.int64)


def _targets(name: str, targets: Tensor, points: Tensor) -> Tensor:
    check_floating(name, targets)
    if targets.dim() not in (1, 2) or targets.shape[0] != points.shape[0]:
        raise ValueError(f"{name} must have shape [N] or [N, L], N rows of x")
    check_same_device(name, targets, "x", points)
    wide = targets.detach().to(accumulate_dtype(points.dtype))
    wide = wide[:, None] if wide.dim() == 1 else wide
    if wide.shape[1] == 0:
        raise ValueError(f"{name} must have at least one value a row")
    return wide


def _centred(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return points about the mean of the columns, so that far-away origins cost no digits."""
    columns = x if y is None else y
    centre = columns.detach().sum(0) / max(1, columns.shape[0])
    return x - centre, columns - centre


def _distances(x: Tensor, y: Tensor, kind: int) -> Tensor:
    if kind == _DOT:
        return x @ y.T
    squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * (x @ y.T)
    # Rounding may go below 0, which is no place to lose the derivative.
    squares = squares + (squares.clamp_min(0) - squares).detach()
    if kind == _SQDIST:
        return squares
    zero = squares == 0
    return torch.where(zero, 0, torch.where(zero, 1, squares).sqrt())


def _difference(values: Tensor) -> Tensor:
    return (values[:, None] - values).abs().mean(-1)


def _allowed(
    shape: tuple[int, int],
    like: Tensor,
    labels: Tensor | None,
    column_labels: Tensor | None,
    targets: Tensor | None,
    predictions: Tensor | None,
    rule: int,
    window: float,
    push: float,
    exclude_self: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return which pairs count, and the logarithms of their weights."""
    allowed, log_weight = like.new_ones(shape, dtype=torch.bool), None
    if labels is not None:
        same = labels[:, None] == (labels if column_labels is None else column_labels)
        allowed = same if rule == _SAME else ~same
    elif targets is not None:
        far = _difference(targets)
        if predictions is None:
            allowed = far <= window
        else:
            allowed = (far > window) & (_difference(predictions) <= window)
            log_weight = push * far if rule == _FALSE_EXP else (push * far).log()
    if exclude_self:
        allowed = allowed & ~torch.eye(*shape, dtype=torch.bool, device=like.device)
    return allowed, log_weight


def _reference(
    x: Tensor, y: Tensor | None, column_bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce the pairs in plain PyTorch; the specification."""
    scores, allowed, weighted = _scores(x, y, column_bias, *arguments)[-3:]
    none = weighted.new_full((weighted.shape[0], 1), -torch.inf)
    top = torch.cat([weighted.detach(), none], 1).amax(1)
    finite = top > -torch.inf  # NaN takes the other way, and stays
    top = torch.where(finite, top, 0)
    summed = (weighted - top[:, None]).exp().sum(1)
    empty = summed == 0
    logsumexp = torch.where(empty, -torch.inf, torch.where(empty, 1, summed).log() + top)
    return logsumexp, torch.where(allowed, scores, 0).sum(1), allowed.sum(1)


def _scores(
    x: Tensor,
    y: Tensor | None,
    column_bias: Tensor | None,
    labels: Tensor | None,
    column_labels: Tensor | None,
    targets: Tensor | None,
    predictions: Tensor | None,
    scale: Tensor,
    kind: int,
    *options: Any,
) -> tuple[Tensor, ...]:
    """Return points, distances, scores, which pairs count, and scores with logarithmic weights."""
    dtype = accumulate_dtype(x.dtype)
    rows, columns = x.to(dtype), x.to(dtype) if y is None else y.to(dtype)
    if kind != _DOT:
        rows, columns = _centred(rows, None if y is None else columns)
    with full_precision(x.device):
        distances = _distances(rows, columns, kind)
    if y is None and kind != _DOT:  # no rounding between a point and itself; NaN stays
        itself = torch.eye(rows.shape[0], dtype=torch.bool, device=x.device)
        distances = torch.where(itself, distances - distances, distances)
    scores = scale.to(dtype) * distances
    if column_bias is not None:
        scores = scores + column_bias
    shape = (rows.shape[0], columns.shape[0])
    marks = (labels, column_labels, targets, predictions)
    allowed, log_weight = _allowed(shape, scores, *marks, *options)
    weighted = scores if log_weight is None else scores + log_weight
    if log_weight is not None:  # also where the score is infinite
        weighted = torch.where(log_weight == -torch.inf, -torch.inf, weighted)
    return rows, columns, distances, scores, allowed, torch.where(allowed, weighted, -torch.inf)


def _check_scale(scale: Tensor) -> None:
    if scale.device.type == "cpu":
        check_finite("scale", scale.item())


def _forward_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_scale(arguments[7])
    return _reference(*arguments)


def _backward_reference(
    logsumexp: Tensor,
    grad_logsumexp: Tensor | None,
    grad_total: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    column_bias: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the gradients by formula."""
    *call, wants_x, wants_y, wants_bias = arguments
    scale, kind = call[4:6]
    rows, columns, distances, _, allowed, weighted = _scores(x, y, column_bias, *call)
    slope = torch.zeros_like(distances)
    if grad_logsumexp is not None:
        empty = (logsumexp == -torch.inf)[:, None]
        p = (weighted - torch.where(empty, 0, logsumexp[:, None])).exp()
        slope = torch.where(empty, 0, p * grad_logsumexp[:, None])
    if grad_total is not None:
        slope = slope + grad_total[:, None]
    slope = torch.where(allowed, slope, 0)
    grad_bias = slope.sum(0) if wants_bias else x.new_empty(0)
    slope = slope * scale.to(slope.dtype)
    if kind == _DIST:
        slope = torch.where(distances == 0, 0, slope / distances)
    with full_precision(x.device):
        by_x, by_y = slope @ columns, slope.T @ rows
    if kind != _DOT:
        by_x = slope.sum(1)[:, None] * rows - by_x
        by_y = slope.sum(0)[:, None] * columns - by_y
    if kind == _SQDIST:
        by_x, by_y = 2 * by_x, 2 * by_y
    if y is None:
        by_x = by_x + by_y
    return (
        by_x.to(x.dtype) if wants_x else x.new_empty(0),
        by_y.to(x.dtype) if wants_y else x.new_empty(0),
        grad_bias,
    )


def _forward_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    found = x.new_empty(x.shape[0], dtype=accumulate_dtype(x.dtype))
    return found, torch.empty_like(found), torch.empty_like(found, dtype=torch.int64)


def _backward_fake(
    logsumexp: Tensor, _grad: Any, _total: Any, x: Tensor, y: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wants_x, wants_y, wants_bias = arguments[-3:]
    columns = x if y is None else y
    return (
        x.new_empty(x.shape if wants_x else 0),
        x.new_empty(columns.shape if wants_y else 0),
        logsumexp.new_empty(columns.shape[0]) if wants_bias else x.new_empty(0),
    )


def _forward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logsumexp, _, pair_count = output
    ctx.mark_non_differentiable(pair_count)
    ctx.set_materialize_grads(False)  # a total that nobody used costs nothing
    ctx.save_for_backward(logsumexp, *inputs[:8])
    ctx.options = inputs[8:]


def _forward_backward(
    backend: str | None,
    ctx: Any,
    grad_logsumexp: Tensor | None,
    grad_total: Tensor | None,
    _: Tensor | None,
) -> tuple[Any, ...]:
    logsumexp, *tensors = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    found: Sequence[Tensor] = BACKWARD.kernel(backend)(
        logsumexp, grad_logsumexp, grad_total, *tensors, *ctx.options, *wanted
    )
    return *_if_wanted(found, wanted), *(None,) * 10


def _if_wanted(found: Sequence[Any], wanted: Sequence[bool]) -> tuple[Any, ...]:
    return tuple(item if want else None for item, want in zip(found, wanted, strict=True))


def _backward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[1:11])
    ctx.options = inputs[11:]


def _double_backward(backend: str | None, ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
    """Differentiate the gradients through the reference, which holds all pairs."""
    *grads, x, y, column_bias, labels, column_labels, targets, predictions, scale = (
        ctx.saved_tensors
    )
    *options, wants_x, wants_y, wants_bias = ctx.options
    inputs = (x, y, column_bias)
    given = [tensor is not None for tensor in inputs]
    marks = (labels, column_labels, targets, predictions, scale)

    def sums(*tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        call = [next(rest) if there else None for there in given]
        logsumexp, total, _ = _reference(*call, *marks, *options)  # type: ignore[arg-type]
        return torch.stack([logsumexp, total])

    grad = torch.stack(
        [
            x.new_zeros(x.shape[0], dtype=accumulate_dtype(x.dtype)) if g is None else g
            for g in grads
        ]
    )
    wanted = _if_wanted(cotangents, (wants_x, wants_y, wants_bias))
    by_grad, *by_inputs = differentiate_backward(
        sums,
        grad,
        [tensor for tensor in inputs if tensor is not None],
        [cotangent for cotangent, there in zip(wanted, given, strict=True) if there],
    )
    each = iter(by_inputs)
    by_x, by_y, by_bias = (next(each) if there else None for there in given)
    by_each = (None, None) if by_grad is None else by_grad.unbind()
    by_grads = _if_wanted(by_each, [g is not None for g in grads])
    return None, *by_grads, by_x, by_y, by_bias, *(None,) * 13


_CALL = (
    "Tensor x, Tensor? y, Tensor? column_bias, Tensor? labels, Tensor? column_labels, "
    "Tensor? targets, Tensor? predictions, Tensor scale, int kind, int rule, float window, "
    "float push, bool exclude_self"
)
PAIRWISE_LOGSUMEXP = Operator(
    "pairwise_logsumexp",
    f"({_CALL}) -> (Tensor logsumexp, Tensor total, Tensor pair_count)",
    fake=_forward_fake,
    reference=_forward_reference,
    triton="pairwise:pairwise_logsumexp",
    setup_context=_forward_context,
    backward=_forward_backward,
)
BACKWARD = Operator(
    "pairwise_logsumexp_backward",
    "(Tensor logsumexp, Tensor? grad_logsumexp, Tensor? grad_total, "
    f"{_CALL}, bool wants_x, bool wants_y, bool wants_bias) "
    "-> (Tensor grad_x, Tensor grad_y, Tensor grad_column_bias)",
    fake=_backward_fake,
    reference=_backward_reference,
    triton="pairwise:pairwise_logsumexp_backward",
    setup_context=_backward_context,
    backward=_double_backward,
)
