"""AdaWAC: for every training sample, how much supervised loss and how much consistency it gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_fraction,
    check_not_negative,
    check_one_of,
    check_probability,
    check_same_device,
    check_shape,
    check_tensor,
    check_values,
)
from regularizers._shared.distributed import gather_rows
from regularizers._shared.scheduled import ScheduledModule
from regularizers.ops._operator import accumulate_dtype, loss_dtype

Mode = Literal[
    "adawac", "pseudo", "trim_sparse", "trim_ratio", "reweight", "dro", "pair", "consistency"
]
_MODES = (
    "adawac",
    "pseudo",
    "trim_sparse",
    "trim_ratio",
    "reweight",
    "dro",
    "pair",
    "consistency",
)
_WITH_CONSISTENCY = ("adawac", "pseudo", "consistency")
_WITH_DENSITY = ("pseudo", "trim_sparse")
_WITH_INDEX = ("adawac", "reweight", "dro")
# sigmoid(30) is 1 - 1e-13: no weight gets stuck at 0 or 1 for good.
_LARGEST_LOGIT = 30.0


def feature_consistency(f_a: Tensor, f_b: Tensor) -> Tensor:
    r"""Compare the features of two views of each sample.

    .. math:: r_i = \mathrm{mean}\,(\varphi(x_i^a) - \varphi(x_i^b))^2

    Gradients go through both views.

    Args:
        f_a: features of the first views, ``[B, *]``.
        f_b: of the second ones, the same shape.

    Returns:
        ``[B]``, dtype of ``f_a``, float32 under autocast.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: the shapes differ, or there is no feature dimension.

    Example:
        >>> feature_consistency(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([2.])

    Source:
        AdaWAC (Y. Dong, Y. Xie, R. Ward, 2022, arXiv 2210.01891), authors' code.
    """
    check_floating("features_a", f_a)
    check_floating("features_b", f_b)
    if f_a.dim() < 2:
        raise ValueError("features_a must have shape [batch, *], got fewer than two dimensions")
    check_shape("features_b", f_b, tuple(f_a.shape), "that of features_a")
    wide = accumulate_dtype(f_a.dtype)
    return (f_a.to(wide) - f_b.to(wide)).square().flatten(1).mean(1).to(loss_dtype(f_a))


class AdaptiveConsistencyWeights(ScheduledModule):
    r"""Keep two weights for every training sample, moved by exponentiated gradient.

    .. math:: \theta_i \leftarrow \theta_i + \eta (\ell_i - r_i), \qquad
        \beta^0_i = \sigma(\theta_i), \quad \beta^1_i = 1 - \beta^0_i

    This is the mirror-ascent step :math:`\beta^0 \leftarrow \beta^0 e^{\eta(\ell - r)}`, divided by
    the sum, in logits, which are held within 30 of 0. All samples begin with (1/2, 1/2). A sample
    that stands in a batch twice takes both steps.

    The logits are a float32 buffer of the state dict, also in a half-precision model, and get no
    gradient. With ``process_group`` every process applies the steps of all, in the order of ranks,
    so that the weights stay equal bit by bit.

    Args:
        num_samples: size of the training set.
        lr: :math:`\eta`, at least 0; can be assigned a new number.
        process_group: processes that share the training set; the same number of rows in each.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> weights = AdaptiveConsistencyWeights(10, lr=1.0)
        >>> dense, sparse = torch.tensor([1.0, 0.1]), torch.tensor([0.2, 0.3])
        >>> weights.update(torch.tensor([3, 7]), dense, sparse)
        (tensor([0.6900, 0.4502]), tensor([0.3100, 0.5498]))
        >>> weights(torch.tensor([0]))
        (tensor([0.5000]), tensor([0.5000]))

    Source:
        AdaWAC (Y. Dong, Y. Xie, R. Ward, 2022, arXiv 2210.01891), authors' code; in logits, which
        the code does not use. The default is that of its UNet script.
    """

    logit: Tensor
    lr: Tensor

    def __init__(
        self,
        num_samples: int,
        *,
        lr: float = 8.0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_at_least("num_samples", num_samples, 1)
        self.schedule("lr", lr, check_not_negative)
        self.process_group = process_group
        self.register_buffer("logit", torch.zeros(num_samples))

    @torch.no_grad()
    def update(self, index: Tensor, supervised: Tensor, consistency: Tensor) -> tuple[Tensor, ...]:
        """Take one step for the samples of a batch; return their new weights.

        Args:
            index: place in the training set, int64 ``[B]``.
            supervised: losses l ``[B]``, finite.
            consistency: losses r ``[B]``, finite.

        Returns:
            Weights ``[B]`` of the supervised and of the consistency losses, float32.
        """
        self.check(index, supervised)
        check_floating("consistency", consistency)
        check_shape("consistency", consistency, tuple(index.shape), "that of index")
        _check_finite("supervised", supervised)
        _check_finite("consistency", consistency)
        self.add(index, supervised.float() - consistency.float())
        weights: tuple[Tensor, ...] = self(index)
        return weights

    def check(self, index: Tensor, supervised: Tensor) -> None:
        """Raise unless ``index`` names samples, one for each of the losses."""
        check_tensor("index", index)
        if index.dtype != torch.int64:
            raise TypeError(f"index must be int64, got {index.dtype}")
        check_shape("index", index, (None,), "[batch]")
        check_same_device("index", index, "the weights", self.logit)
        check_floating("supervised", supervised)
        check_shape("supervised", supervised, tuple(index.shape), "that of index")
        check_values(
            ((index >= 0) & (index < self.logit.shape[0])).all(),
            lambda: f"index must lie in [0, {self.logit.shape[0]}), got {index.tolist()}",
        )

    @torch.no_grad()
    def add(self, index: Tensor, direction: Tensor) -> None:
        """Add ``lr * direction`` to the logits of a batch, of all processes."""
        index = gather_rows(index, self.process_group)
        direction = gather_rows(direction, self.process_group)
        step = self.lr.to(self.logit.dtype) * direction.to(self.logit.dtype)
        # Sorts by index on CUDA, where index_add would add duplicates in any order.
        self.logit.index_put_((index,), step, accumulate=True)
        self.logit.clamp_(-_LARGEST_LOGIT, _LARGEST_LOGIT)

    def forward(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights ``[B]`` of supervised and of consistency losses."""
        theta = self.logit[index]
        return theta.sigmoid(), (-theta).sigmoid()

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> AdaptiveConsistencyWeights:
        kept = self.logit
        super()._apply(fn, recurse)
        if self.logit.dtype != kept.dtype:
            self._buffers["logit"] = kept.to(self.logit.device)
        return self

    def extra_repr(self) -> str:
        """Name the size and the rate."""
        return f"num_samples={self.logit.shape[0]}, lr={self.lr:g}"


def _check_finite(name: str, losses: Tensor) -> None:
    finite = losses.detach().isfinite()
    check_values(finite.all(), lambda: f"{name} must be finite, got {losses.tolist()}")


class AdaWAC(nn.Module):
    r"""Weigh supervised loss against augmentation consistency, sample by sample.

    .. math::
        \ell_i = \tfrac12 (\ell_i^a + \ell_i^b), \quad
        r_i = c\, \mathrm{mean}(\varphi(x_i^a) - \varphi(x_i^b))^2, \qquad
        L = (1 - \rho)\, \frac1B \sum_i (\beta^0_i \ell_i + \beta^1_i r_i) + \rho\, \mathrm{extra}

    The weights take their step (see :class:`AdaptiveConsistencyWeights`) before the loss and carry
    no gradient; in evaluation they stay. Samples whose supervised loss is the larger one, those
    with many labelled pixels, end at :math:`\beta^0 = 1`, the others at consistency alone.

    The baselines of the paper are modes:

    =============== ================================================================================
    ``adawac``      the formula above
    ``pseudo``      :math:`\ell_i` where the sample has a label, else :math:`r_i`
    ``trim_sparse`` mean of :math:`\ell_i` over samples with a label, 0 if there is none
    ``trim_ratio``  mean of :math:`\ell_i` from the batch's ``trim_ratio`` quantile on
    ``reweight``    mean of :math:`w_i \ell_i^a`, :math:`w_i \leftarrow w_i e^{\eta \ell_i^a}`,
                    divided by the mean over the batch
    ``dro``         the same with :math:`w_i^{1 - \eta s}` first: weights forget
    ``pair``        mean of :math:`\ell_i`
    ``consistency`` mean of :math:`(\ell_i + r_i) / 2`
    =============== ================================================================================

    With ``process_group`` each process has its rows of the batch and the same number of them;
    statistics are those of the whole batch, and the mean of the losses over processes, which
    ``DistributedDataParallel`` differentiates, is the loss of the whole batch.

    Args:
        num_samples: size of the training set.
        weight_lr: :math:`\eta`, at least 0.
        consistency_weight: c, at least 0. The paper has 2 for UNet and 0.5 for TransUNet.
        mode: one of the table.
        trim_ratio: share of the batch that ``trim_ratio`` leaves out, in [0, 1).
        dro_strength: s of ``dro``, with :math:`\eta s \le 1`.
        process_group: processes that share the training set.

    Shape:
        ``supervised_a`` and ``supervised_b``: ``[B]``, per sample (a mean over its pixels).
        ``features_a`` and ``features_b``: ``[B, *]``. ``index``: int64 ``[B]``. A tensor with no
        dimensions comes back. What the mode does not use may be left out; without ``supervised_b``
        :math:`\ell_i = \ell_i^a`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is missing, out of range or of the wrong shape; losses are not
            finite or the index is out of range (on CUDA and in compiled code by an assertion on the
            device).

    Example:
        >>> criterion = AdaWAC(100, weight_lr=1.0, consistency_weight=1.0)
        >>> features = torch.zeros(2, 8), torch.zeros(2, 8)
        >>> losses = torch.tensor([1.0, 0.5])
        >>> criterion(losses, losses, *features, index=torch.tensor([4, 9]))
        tensor(0.5211)
        >>> criterion.weights(torch.tensor([4, 9]))[0]
        tensor([0.7311, 0.6225])

    Source:
        Y. Dong, Y. Xie, R. Ward, "Adaptively Weighted Data Augmentation Consistency Regularization
        for Robust Optimization under Concept Shift", ICML 2023, arXiv 2210.01891; authors' code and
        its UNet script for the defaults. ``trim_ratio=0.5`` and ``dro_strength=0.1`` are ours.
        Weights of ``reweight`` have mean 1 over a batch where the code has sum 1, which is the same
        for the loss and does not favour samples that were never seen.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        weight_lr: float = 8.0,
        consistency_weight: float = 2.0,
        mode: Mode = "adawac",
        trim_ratio: float = 0.5,
        dro_strength: float = 0.1,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_not_negative("weight_lr", weight_lr)
        check_not_negative("consistency_weight", consistency_weight)
        check_one_of("mode", mode, _MODES)
        check_fraction("trim_ratio", trim_ratio)
        check_not_negative("dro_strength", dro_strength)
        if mode == "dro" and weight_lr * dro_strength > 1:
            raise ValueError(
                "dro_strength must be at most 1 / weight_lr, "
                f"got {dro_strength} with weight_lr {weight_lr}"
            )
        self.consistency_weight = consistency_weight
        self.mode = mode
        self.trim_ratio = trim_ratio
        self.dro_strength = dro_strength
        self.process_group = process_group
        self.weights = AdaptiveConsistencyWeights(
            num_samples, lr=weight_lr, process_group=process_group
        )

    def forward(
        self,
        supervised_a: Tensor,
        supervised_b: Tensor | None = None,
        features_a: Tensor | None = None,
        features_b: Tensor | None = None,
        index: Tensor | None = None,
        *,
        label_density: Tensor | None = None,
        extra: Tensor | None = None,
        extra_weight: float = 0.0,
    ) -> Tensor:
        """Compute the loss of a batch.

        Args:
            supervised_a: losses of the first views ``[B]``.
            supervised_b: of the second views.
            features_a: of the chosen encoder layer, first views ``[B, *]``.
            features_b: second views.
            index: places in the training set, int64 ``[B]``.
            label_density: share or number of labelled pixels ``[B]``; above 0: has a label.
            extra: a loss beside, such as Dice; no dimensions.
            extra_weight: its share rho, in [0, 1]; the paper has 0.5.
        """
        losses = self._supervised(supervised_a, supervised_b)
        check_probability("extra_weight", extra_weight)
        weighted = self._weighted(
            losses, supervised_a, features_a, features_b, index, label_density
        )
        if extra is not None:
            weighted = (1 - extra_weight) * weighted + extra_weight * extra
        elif extra_weight != 0:
            raise ValueError("extra must be given with an extra_weight above 0, got None")
        return weighted.to(loss_dtype(supervised_a))

    def _supervised(self, supervised_a: Tensor, supervised_b: Tensor | None) -> Tensor:
        check_floating("supervised_a", supervised_a)
        check_shape("supervised_a", supervised_a, (None,), "[batch]")
        _check_finite("supervised_a", supervised_a)
        losses = supervised_a.to(accumulate_dtype(supervised_a.dtype))
        if supervised_b is None:
            return losses
        check_floating("supervised_b", supervised_b)
        check_shape("supervised_b", supervised_b, tuple(supervised_a.shape), "that of supervised_a")
        _check_finite("supervised_b", supervised_b)
        return (losses + supervised_b) / 2

    def _weighted(
        self,
        losses: Tensor,
        supervised_a: Tensor,
        features_a: Tensor | None,
        features_b: Tensor | None,
        index: Tensor | None,
        label_density: Tensor | None,
    ) -> Tensor:
        if self.mode in _WITH_CONSISTENCY:
            consistency = self._consistency(losses, features_a, features_b)
        if self.mode in _WITH_DENSITY:
            labelled = self._labelled(losses, label_density)
        if self.mode in _WITH_INDEX:
            if index is None:
                raise ValueError(f"index must be given in mode {self.mode!r}, got None")
            self.weights.check(index, losses)
        if self.mode == "adawac":
            assert index is not None
            if self.training:
                self.weights.add(index, losses - consistency)
            on_supervised, on_consistency = self.weights(index)
            weighted: Tensor = on_supervised * losses + on_consistency * consistency
            return weighted.mean()
        if self.mode == "pseudo":
            return torch.where(labelled, losses, consistency).mean()
        if self.mode == "trim_sparse":
            return self._mean_over(labelled, losses)
        if self.mode == "trim_ratio":
            threshold = gather_rows(losses, self.process_group).quantile(self.trim_ratio)
            return self._mean_over(losses.detach() >= threshold, losses)
        if self.mode == "pair":
            return losses.mean()
        if self.mode == "consistency":
            return (losses + consistency).mean() / 2
        assert index is not None
        return (self._batch_weights(index, supervised_a) * supervised_a).mean()

    def _consistency(
        self, losses: Tensor, features_a: Tensor | None, features_b: Tensor | None
    ) -> Tensor:
        if features_a is None or features_b is None:
            raise ValueError(f"features_a and features_b must be given in mode {self.mode!r}")
        found = self.consistency_weight * feature_consistency(features_a, features_b)
        check_shape("features_a", found, tuple(losses.shape), "[batch, *] of supervised_a")
        _check_finite("features_a", found)
        return found.to(losses.dtype)

    def _labelled(self, losses: Tensor, label_density: Tensor | None) -> Tensor:
        if label_density is None:
            raise ValueError(f"label_density must be given in mode {self.mode!r}, got None")
        check_tensor("label_density", label_density)
        check_shape("label_density", label_density, tuple(losses.shape), "that of supervised_a")
        return label_density > 0

    def _mean_over(self, chosen: Tensor, losses: Tensor) -> Tensor:
        """Return the mean over the chosen samples of the whole batch, as this process's share."""
        share = gather_rows(chosen.to(losses.dtype), self.process_group).mean()
        total = torch.where(chosen, losses, 0).mean()
        # As many rows in each process: its mean over all rows, by the share of the chosen ones.
        return total / torch.where(share > 0, share, 1)

    def _batch_weights(self, index: Tensor, supervised: Tensor) -> Tensor:
        """Move the weights w = exp(logit) and return those of the batch, with mean 1."""
        weights, group = self.weights, self.process_group
        every = gather_rows(index, group)
        if self.training:
            with torch.no_grad():
                if self.mode == "dro":
                    forget = 1 - weights.lr.to(weights.logit.dtype) * self.dro_strength
                    weights.logit[every] = weights.logit[every] * forget
                weights.add(index, supervised)
                weights.logit[every] -= weights.logit[every].exp().mean().log()
        found: Tensor = weights.logit[index].exp() / weights.logit[every].exp().mean()
        return found

    def extra_repr(self) -> str:
        """Name the mode and the weight of the consistency."""
        return f"mode={self.mode!r}, consistency_weight={self.consistency_weight:g}"
