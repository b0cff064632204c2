"""ConR: a contrast for imbalanced regression, against samples that the model takes for near."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regularizers._shared.checks import (
    check_floating,
    check_not_negative,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
    check_values,
)
from regularizers._shared.directions import unit
from regularizers._shared.distributed import gather_batch, gather_rows
from regularizers._shared.reductions import REDUCTIONS, Reduction, reduce_rows
from regularizers.ops import FalselyNear, LabelWindow, pairwise_logsumexp
from regularizers.ops._operator import accumulate_dtype
from regularizers.representation._in_batch import check_rows

Pushing = Literal["exp", "linear"]
Denominator = Literal["positives", "code"]
_PUSHING = ("exp", "linear")
_DENOMINATORS = ("positives", "code")


def conr_loss(
    features: Tensor,
    targets: Tensor,
    predictions: Tensor,
    *,
    window: float = 1.0,
    weights: Tensor | None = None,
    temperature: float = 0.07,
    push: float = 0.01,
    pushing: Pushing = "exp",
    denominator: Denominator = "positives",
    reduction: Reduction = "mean",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Pull features of near targets together; push away those that are only predicted as near.

    .. math::
        P_i &= \{j \ne i : |y_i - y_j| \le w\}, \qquad
        Q_i = \{j : |y_i - y_j| > w,\ |\hat y_i - \hat y_j| \le w\} \\
        L_i &= \frac{1}{|P_i|} \sum_{j \in P_i} \Big[ \log \Big( \sum_{k \in P_i} e^{s_{ik}} +
        \sum_{k \in Q_i} S_{ik} e^{s_{ik}} \Big) - s_{ij} \Big], \qquad
        L = \frac1N \sum_i \omega_i L_i

    with cosine similarities s, divided by the temperature, and pushing weights :math:`S_{ik} =
    \omega_i e^{\eta |y_i - y_k|}` (``"exp"``) or :math:`\omega_i \eta |y_i - y_k|` (``"linear"``).
    :math:`L_i = 0` where :math:`P_i` or :math:`Q_i` is empty, and such anchors count in N: a model
    whose predictions are right pays nothing. Add beta times this loss to that of the regression;
    concatenate two augmented views of each sample to have positives for rare targets.

    Args:
        features: ``[N, D]``, N at least 2; what the last layer of the regression sees.
        targets: y, ``[N]`` or ``[N, L]``, floating point; differences of several targets are
            averaged over L.
        predictions: :math:`\hat y`, of that shape; no gradient flows into them.
        window: w, in units of the targets, at least 0. The paper: 1 for ages, 0.2 for depths.
        weights: :math:`\omega`, ``[N]``, at least 0, such as the inverse frequency of each
            anchor's target; 1 when omitted.
        temperature: of the similarities, above 0.
        push: :math:`\eta`, at least 0: how much harder distant targets push. Ages 0.01, depths
            0.2.
        pushing: ``"exp"`` (the authors' ages) or ``"linear"`` (their depths).
        denominator: ``"positives"`` as the formula says, or ``"code"``: the authors' code sets
            similarities of all but the positives to 0 before it exponentiates, which adds
            :math:`N - |P_i|` to the sum in the logarithm.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one entry an anchor, weighted.
        process_group: processes whose batches are one.

    Returns:
        The loss, with no dimensions or ``[N]`` (N x world size over a group); float64 for float64
        features, else float32.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes do not fit, N is below 2, or an argument is out of range.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> targets = torch.tensor([0.0, 0.0, 5.0, 5.0])
        >>> predictions = torch.tensor([0.0, 0.0, 0.5, 5.0])  # the third is taken for near to 0
        >>> conr_loss(features, targets, predictions, temperature=1.0, push=0.0, reduction="none")
        tensor([0.6931, 0.6931, 1.8620, 0.0000])
        >>> conr_loss(features, targets, targets)
        tensor(0.)

    Source:
        M. Keramati, L. Meng, R. D. Evans, "ConR: Contrastive Regularizer for Deep Imbalanced
        Regression", ICLR 2024, arXiv 2309.06651; authors' code read. There an anchor without
        positives makes the whole loss NaN, here it contributes 0; the age code uses a temperature
        of 0.07 whatever it is given; the depth code divides by :math:`|P_i| + 1`, has no outer
        weight, and averages several labels before it takes differences (hand over the means for
        that).
    """
    check_rows("features", features)
    _check_options(window, temperature, push, pushing, denominator, reduction)
    _check_targets(features, targets, predictions)
    if weights is not None:
        check_floating("weights", weights)
        check_same_device("weights", weights, "features", features)
        check_shape("weights", weights, (len(features),), "[batch] as features has")
        check_values(
            ~(weights < 0).any(), lambda: f"weights must be at least 0, got {weights.tolist()}"
        )
    wide = accumulate_dtype(features.dtype)
    y, predicted = (
        gather_rows(v.to(accumulate_dtype(v.dtype)), process_group) for v in (targets, predictions)
    )
    q = unit(gather_batch(features.to(wide), process_group))
    omega = q.new_ones(len(q)) if weights is None else gather_rows(weights.to(wide), process_group)

    scale = 1 / temperature
    near = pairwise_logsumexp(q, scale=scale, pairs=LabelWindow(y, window))
    far = pairwise_logsumexp(
        q, scale=scale, pairs=FalselyNear(y, predicted, window, push=push, pushing=pushing)
    )
    positives = near.pair_count.clamp(min=1).to(wide)
    counts = (near.pair_count > 0) & (far.pair_count > 0)
    # Anchors that do not count stay out of the logarithm of 0, whose gradient is not a number.
    log_sum = torch.logaddexp(
        torch.where(counts, near.logsumexp, 0), torch.where(counts, far.logsumexp, 0) + omega.log()
    )
    if denominator == "code":
        log_sum = torch.logaddexp(log_sum, (len(q) - positives).log())
    rows = torch.where(counts, omega * (log_sum - near.total / positives), 0)
    # A comparison with NaN is false: without this, NaN would make an anchor not count.
    unseen = q.sum(1) + omega + (_row_sums(y) + _row_sums(predicted)).to(wide)
    return reduce_rows(rows + 0 * unseen, reduction)


class ConRLoss(nn.Module):
    r"""The module of :func:`conr_loss`.

    .. math:: L_{\text{total}} = L_{\text{regression}} + \beta\, L_{\text{ConR}}

    with a :math:`\beta` of the caller's: 4 for the paper's ages (batch 64, two views), 0.2 for
    depths. No parameters; the same in ``eval()``.

    Args:
        window: w, in units of the targets, at least 0.
        temperature: above 0.
        push: :math:`\eta`, at least 0.
        pushing: ``"exp"`` or ``"linear"``.
        denominator: ``"positives"`` or ``"code"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        process_group: processes whose batches are one, or None.

    Shape:
        ``[N, D]`` features, ``[N]`` or ``[N, L]`` targets and predictions to a loss with no
        dimensions.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> body, head = nn.Linear(8, 16), nn.Linear(16, 1)
        >>> conr = ConRLoss(window=0.5)
        >>> x, y = torch.randn(32, 8), torch.randn(32)
        >>> features = body(x)
        >>> predictions = head(features).squeeze(1)
        >>> loss = nn.functional.l1_loss(predictions, y) + 4 * conr(features, y, predictions)
        >>> loss.backward()

    Source:
        M. Keramati, L. Meng, R. D. Evans, ICLR 2024, arXiv 2309.06651; authors' code read.
    """

    def __init__(
        self,
        *,
        window: float = 1.0,
        temperature: float = 0.07,
        push: float = 0.01,
        pushing: Pushing = "exp",
        denominator: Denominator = "positives",
        reduction: Reduction = "mean",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check_options(window, temperature, push, pushing, denominator, reduction)
        self.window = window
        self.temperature = temperature
        self.push = push
        self.pushing: Pushing = pushing
        self.denominator: Denominator = denominator
        self.reduction: Reduction = reduction
        self.process_group = process_group

    def forward(
        self,
        features: Tensor,
        targets: Tensor,
        predictions: Tensor,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Return the loss."""
        return conr_loss(
            features,
            targets,
            predictions,
            window=self.window,
            weights=weights,
            temperature=self.temperature,
            push=self.push,
            pushing=self.pushing,
            denominator=self.denominator,
            reduction=self.reduction,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return (
            f"window={self.window:g}, temperature={self.temperature:g}, push={self.push:g}, "
            f"pushing={self.pushing!r}, denominator={self.denominator!r}"
        )


def _check_options(
    window: float, temperature: float, push: float, pushing: str, denominator: str, reduction: str
) -> None:
    check_not_negative("window", window)
    check_positive("temperature", temperature)
    check_not_negative("push", push)
    check_one_of("pushing", pushing, _PUSHING)
    check_one_of("denominator", denominator, _DENOMINATORS)
    check_one_of("reduction", reduction, REDUCTIONS)


def _check_targets(features: Tensor, targets: Tensor, predictions: Tensor) -> None:
    for name, values in (("targets", targets), ("predictions", predictions)):
        check_floating(name, values)
        check_same_device(name, values, "features", features)
    if targets.dim() not in (1, 2) or len(targets) != len(features) or targets.numel() == 0:
        raise ValueError(
            f"targets must have shape [N] or [N, L] with the {len(features)} rows of features, "
            f"got {list(targets.shape)}"
        )
    if predictions.shape != targets.shape:
        raise ValueError(
            f"predictions must have the shape of targets {list(targets.shape)}, "
            f"got {list(predictions.shape)}"
        )


def _row_sums(values: Tensor) -> Tensor:
    return values if values.dim() == 1 else values.sum(1)
