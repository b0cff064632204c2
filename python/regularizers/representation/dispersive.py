"""Dispersive losses: spread the features of a batch apart, without positives or a projector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regularizers._shared.checks import (
    check_floating,
    check_module,
    check_not_negative,
    check_one_of,
    check_positive,
)
from regularizers._shared.directions import unit
from regularizers._shared.distributed import gather_batch
from regularizers._shared.moments import center, covariance, off_diagonal
from regularizers._shared.reductions import REDUCTIONS, Reduction
from regularizers._shared.scheduled import ScheduledModule
from regularizers._shared.taps import StandingTap
from regularizers.ops import pairwise_logsumexp
from regularizers.ops._operator import accumulate_dtype, full_precision
from regularizers.transport import SqEuclidean

Variant = Literal["infonce_l2", "infonce_cosine", "hinge", "covariance"]
_VARIANTS: tuple[str, ...] = get_args(Variant)


def dispersive_loss(
    features: Tensor,
    *,
    variant: Variant = "infonce_l2",
    temperature: float = 0.5,
    margin: float = 1.0,
    normalize: bool = False,
    diag_target: float | None = None,
    reduction: Reduction = "mean",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Penalise features of different samples for being near each other.

    .. math::
        \text{infonce\_l2} &= \log \operatorname{mean}_{i \ne j} e^{-\|h_i - h_j\|^2 / \tau} \\
        \text{infonce\_cosine} &= \log \operatorname{mean}_{i \ne j} e^{\cos(h_i, h_j) / \tau} \\
        \text{hinge} &= \operatorname{mean}_{i \ne j} \max(0, \epsilon - \|h_i - h_j\|^2)^2 \\
        \text{covariance} &= \operatorname{mean}_{m \ne n} C_{mn}^2
        \; [+ \operatorname{mean}_m \max(0, t - C_{mm})]

    with the unbiased covariance C of the features over the batch. Add it to any loss, on hidden
    layers rather than on the output. A batch that has collapsed to one point has the largest value
    of the first three: 0, :math:`1 / \tau` and :math:`\epsilon^2`; ``"covariance"`` alone does not
    see it (0) and needs ``diag_target``.

    ``"infonce_*"`` take memory linear in the batch; ``"hinge"`` its square, and ``"covariance"``
    the square of the batch or of the features, whichever is smaller.

    Args:
        features: h, ``[B, *]``; the axes after the batch are flattened.
        variant: which of the four.
        temperature: :math:`\tau`, above 0, in the units of a squared distance (of a cosine).
        margin: :math:`\epsilon` of ``"hinge"``, above 0, a squared distance.
        normalize: scale each sample to length 1 first, as ``"infonce_cosine"`` always does.
        diag_target: t, the variance below which a feature is penalised; for ``"covariance"`` only.
        reduction: ``"mean"``; ``"sum"`` for a sum over the ordered pairs in the place of the mean
            (inside the logarithm); ``"none"`` for the mean of each sample over the others, ``[B]``,
            or of each feature, ``[D]``, for ``"covariance"``.
        process_group: processes whose batches are one; the loss is that of the whole. Local
            batches must have one size.

    Returns:
        The loss, a tensor with no dimensions unless ``reduction="none"``; float64 for float64, else
        float32. A single sample gives 0.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument is out of range, or the batch is empty. NaN gives NaN.

    Example:
        >>> h = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> dispersive_loss(h)
        tensor(-2.3400)
        >>> dispersive_loss(h, variant="hinge", margin=2.0)
        tensor(0.6667)
        >>> dispersive_loss(torch.ones(3, 2), variant="covariance", diag_target=1.0)
        tensor(1.)

    Source:
        G. Zou, H. Wang, H. Wu, Y. Qian, Y. Wang, W. Li, "DM1: MeanFlow with Dispersive
        Regularization for 1-Step Robotic Manipulation", 2025, arXiv 2510.07865, after R. Wang,
        K. He, "Diffuse and Disperse", 2025, arXiv 2506.09027; formulas of the paper, released code
        read. That code departs from them:
        it takes distances where the paper squares them, and its InfoNCE is a mean of row-wise
        log-sum-exps in which a clamp makes the sample's pair with itself :math:`e^{10}`; a
        collapsed batch of three scores -10.00009 there and a spread one -10.00096, with next to no
        gradient. Its covariance has the diagonal term with t = 1. The parent method counts i = j
        and divides squared distances by D: at a temperature :math:`\tau D`, this loss is
        :math:`\log((B e^{\text{parent}(\tau)} - 1) / (B - 1))`.
    """
    check_floating("features", features)
    check_one_of("variant", variant, _VARIANTS)
    check_positive("temperature", temperature)
    check_positive("margin", margin)
    check_one_of("reduction", reduction, REDUCTIONS)
    if diag_target is not None:
        check_positive("diag_target", diag_target)
        if variant != "covariance":
            raise ValueError(f"diag_target must be None for variant {variant!r}, got {diag_target}")
    if features.dim() < 1 or features.numel() == 0:
        raise ValueError(f"features must have shape [B >= 1, ...], got {list(features.shape)}")
    h = features.reshape(len(features), -1)
    if normalize or variant == "infonce_cosine":
        h = unit(h)
    h = gather_batch(h, process_group)
    if len(h) == 1:
        alone = 0 * h.to(accumulate_dtype(h.dtype))
        return alone.sum((1 if variant != "covariance" else 0) if reduction == "none" else (0, 1))
    if variant == "covariance":
        terms = _covariance_terms(h, reduction == "sum", diag_target)
    elif variant == "hinge":
        squares = SqEuclidean().pairwise(h, h)
        slack = off_diagonal((margin - squares).relu().square()).sum(1)
        terms = slack if reduction == "sum" else slack / (len(h) - 1)
    else:
        if variant == "infonce_l2":
            rows = pairwise_logsumexp(h, kind="sqdist", scale=-1 / temperature).logsumexp
        else:
            rows = pairwise_logsumexp(h, kind="dot", scale=1 / temperature).logsumexp
        pairs = {"none": len(h) - 1, "mean": len(h) * (len(h) - 1), "sum": 1}[reduction]
        return (rows if reduction == "none" else rows.logsumexp(0)) - math.log(pairs)
    if reduction == "none":
        return terms
    return terms.sum() if reduction == "sum" else terms.mean()


def _covariance_terms(h: Tensor, summed: bool, diag_target: float | None) -> Tensor:
    """Return each feature's sum (or mean) of squared covariances with the others, ``[D]``."""
    samples, features = h.shape
    if features <= samples:
        matrix = covariance(h)
        variance = matrix.diagonal()
        squares = off_diagonal(matrix).square().sum(1)
    else:  # the same sums from the inner products of the samples, [B, B] and not [D, D]
        centered, _, _ = center(h, (0,))
        with full_precision(h.device):
            mixed = (centered @ centered.mT) @ centered
        variance = centered.square().sum(0) / (samples - 1)
        squares = (mixed * centered).sum(0) / (samples - 1) ** 2 - variance.square()
    terms = squares if summed else squares / max(features - 1, 1)
    return terms if diag_target is None else terms + (diag_target - variance).relu()


class DispersiveRegularizer(ScheduledModule):
    r"""Run a model and penalise the features of some of its layers for being near each other.

    .. math:: \text{penalty} = \lambda \, \frac{\sum_k w_k \, L_{\mathrm{disp}}(h_k)}{\sum_k w_k}

    Only the training loop needs it: at inference run ``module.model`` itself, on which it leaves
    hooks that do nothing. Its state dict holds the model's under ``model.``.

    Args:
        model: any module.
        taps: qualified names of the submodules whose outputs are :math:`h_k`, as
            ``model.named_modules()`` gives them; hidden layers, not the output.
        weight: :math:`\lambda`, at least 0; 0.1, 0.5 and 0.9 are in the paper. May be assigned
            later, as a schedule does.
        variant: as all that follows, of :func:`dispersive_loss`.
        temperature: likewise.
        margin: likewise.
        normalize: likewise.
        diag_target: likewise.
        layer_weights: :math:`w_k \ge 0`, one a tap, not all 0; equal when omitted.
        process_group: as in :func:`dispersive_loss`.

    Shape:
        Whatever the model takes, to ``(what it returns, penalty)``; the penalty has no dimensions.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, there is no tap, a tap is no submodule, or, in the
            forward pass, did not return a tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> regularized = DispersiveRegularizer(model, ["1"], weight=0.5)
        >>> y, penalty = regularized(torch.randn(32, 4))
        >>> (y.square().mean() + penalty).backward()

    Source:
        G. Zou et al., 2025, arXiv 2510.07865; the mean over layers is the paper's, the weights of
        layers are ours.
    """

    weight: Tensor

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[str],
        *,
        weight: float = 0.1,
        variant: Variant = "infonce_l2",
        temperature: float = 0.5,
        margin: float = 1.0,
        normalize: bool = False,
        diag_target: float | None = None,
        layer_weights: Sequence[float] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_module("model", model)
        if isinstance(taps, str) or len(taps) == 0:
            raise ValueError(f"taps must be a sequence of at least one name, got {taps!r}")
        self.schedule("weight", weight, check_not_negative)
        weights = [1.0] * len(taps) if layer_weights is None else list(layer_weights)
        for value in weights:
            check_not_negative("layer_weights", value)
        if len(weights) != len(taps) or sum(weights) == 0:
            raise ValueError(
                f"layer_weights must hold {len(taps)} numbers, not all 0, got {layer_weights}"
            )
        self.options: dict[str, Any] = {
            "variant": variant,
            "temperature": temperature,
            "margin": margin,
            "normalize": normalize,
            "diag_target": diag_target,
        }
        dispersive_loss(torch.zeros(1, 1), **self.options)  # raises on a bad option
        self.model = model
        self.tap = StandingTap(model, taps)
        self.taps = tuple(taps)
        self.layer_weights = weights
        self.process_group = process_group

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Return what the model returns, and the penalty."""
        result, features = self.tap.run(self.model, *args, **kwargs)
        losses = [
            share * dispersive_loss(h, **self.options, process_group=self.process_group)
            for h, share in zip(features, self.layer_weights, strict=True)
        ]
        mean = torch.stack(losses).sum() / sum(self.layer_weights)
        return result, self.weight.to(mean.dtype) * mean

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return (
            f"taps={list(self.taps)}, weight={self.weight:.6g}, variant={self.options['variant']!r}"
        )
