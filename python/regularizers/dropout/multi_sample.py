"""Multi-sample dropout: many masks of one feature batch, one shared head, the mean loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_fraction,
    check_one_of,
    check_probability,
    check_tensor,
)
from regularizers._shared.reductions import REDUCTIONS, Reduction
from regularizers._shared.scheduled import ScheduledModule
from regularizers.ops.dropout import dropout_samples
from regularizers.ops.masked_linear_cross_entropy import (
    multi_sample_dropout_cross_entropy,
)


def multi_sample_dropout(
    x: Tensor,
    p: float | Tensor = 0.5,
    num_samples: int = 8,
    *,
    training: bool = True,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Stack ``num_samples`` dropout samples of one feature batch.

    .. math:: y_s = \frac{1}{1-p} m_s \odot x, \qquad m_s \text{ i.i.d. in every element}

    Args:
        x: features ``[B, *]``.
        p: probability that an element is dropped, in [0, 1]; a number or a tensor with no
            dimensions.
        num_samples: number of samples M, at least 1.
        training: draw masks; otherwise nothing is dropped and there is one sample.
        seed: int or int64 tensor with no dimensions; drawn from the default generator when omitted.
        generator: generator to draw the seed from; not inside ``torch.compile`` or activation
            checkpointing.

    Returns:
        ``[M, B, *]`` in training, else ``x.unsqueeze(0)``.

    Raises:
        TypeError: as :func:`regularizers.ops.dropout_samples`.
        ValueError: likewise.

    Example:
        >>> features = torch.ones(4, 16)
        >>> multi_sample_dropout(features, p=0.3).shape
        torch.Size([8, 4, 16])

    Source:
        H. Inoue, "Multi-Sample Dropout for Accelerated Training and Better Generalization", 2019,
        arXiv 1905.09788. The formula follows from the abstract; the defaults p = 0.5 and M = 8 are
        reconstructed from the paper's figures.
    """
    if not training:
        check_tensor("x", x)
        return x.unsqueeze(0)
    return dropout_samples(x, p, num_samples, seed=seed, generator=generator)


def multi_sample_loss(
    outputs: Tensor,
    target: Tensor,
    criterion: Callable[[Tensor, Tensor], Tensor],
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Average a criterion over the samples of a multi-sample head.

    .. math:: L = \frac{1}{M} \sum_{s=1}^{M} \mathrm{criterion}(\mathrm{outputs}_s, \mathrm{target})

    The *losses* are averaged. Averaging logits or probabilities first would be another, smaller
    loss (Jensen), and the sum would multiply the learning rate by M.

    Args:
        outputs: ``[M, B, *]``, as :class:`MultiSampleDropout` gives them.
        target: what ``criterion`` expects beside one ``[B, *]`` output.
        criterion: a loss, ``(output, target) -> Tensor`` of any shape.
        reduction: over the samples: ``"mean"``, ``"sum"``, or ``"none"`` for one entry a sample.

    Returns:
        The shape that ``criterion`` gives, or ``[M, ...]`` of it for ``reduction="none"``.

    Raises:
        TypeError: ``outputs`` is not a tensor.
        ValueError: ``outputs`` has no sample, or ``reduction`` is unknown.

    Example:
        >>> outputs, target = torch.zeros(8, 4, 10), torch.arange(4)
        >>> multi_sample_loss(outputs, target, nn.CrossEntropyLoss())
        tensor(2.3026)

    Source:
        H. Inoue, 2019, arXiv 1905.09788; the formula stands in the abstract.
    """
    check_tensor("outputs", outputs)
    check_one_of("reduction", reduction, REDUCTIONS)
    if outputs.dim() < 1 or outputs.shape[0] < 1:
        raise ValueError(
            f"outputs must have shape [samples >= 1, batch, ...], got {list(outputs.shape)}"
        )
    losses = torch.stack([criterion(output, target) for output in outputs])
    if reduction == "none":
        return losses
    return losses.mean(0) if reduction == "mean" else losses.sum(0)


class MultiSampleDropout(ScheduledModule):
    r"""Run a head on ``num_samples`` dropout samples of its input features.

    .. math:: \mathrm{outputs}_s = \mathrm{head}(\tfrac{1}{1-p} m_s \odot x), \qquad s = 1, \dots, M

    The backbone runs once and the head once, on all samples as one batch of M B rows (a batch norm
    inside the head sees them all). In ``eval()`` nothing is dropped and there is one sample.
    ``module.p = 0.3`` changes the rate.

    Args:
        head: any module from ``[N, *]`` to ``[N, *out]``; shared by all samples.
        p: probability that a feature is dropped, in [0, 1].
        num_samples: number of samples M, at least 1.
        diversity: M callables, or None for "unchanged", that alter the features of one sample each
            before dropout (the paper's other sources of diversity: a horizontal flip for half of
            the samples, one-sided zero padding). All results must have one shape.

    Shape:
        ``[B, *] -> [M, B, *out]`` in training, ``[1, B, *out]`` in evaluation.

    Raises:
        TypeError: ``head`` is not a module, or an argument is of the wrong type.
        ValueError: ``p`` or ``num_samples`` is out of range, or ``diversity`` does not have M
            entries.

    Example:
        >>> layer = MultiSampleDropout(nn.Linear(16, 10), p=0.5, num_samples=4)
        >>> features, target = torch.randn(32, 16), torch.randint(10, (32,))
        >>> layer(features).shape
        torch.Size([4, 32, 10])
        >>> layer.loss(features, target, nn.CrossEntropyLoss()).backward()

    Source:
        H. Inoue, 2019, arXiv 1905.09788; mechanism from the abstract, further diversity sources
        reconstructed.
    """

    p: Tensor

    def __init__(
        self,
        head: nn.Module,
        p: float = 0.5,
        num_samples: int = 8,
        *,
        diversity: Sequence[Callable[[Tensor], Tensor] | None] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(head, nn.Module):
            raise TypeError(f"head must be a torch.nn.Module, got {type(head).__name__}")
        check_at_least("num_samples", num_samples, 1)
        if diversity is not None and len(diversity) != num_samples:
            raise ValueError(
                f"diversity must have num_samples = {num_samples} entries, got {len(diversity)}"
            )
        self.head = head
        self.num_samples = num_samples
        self.diversity = None if diversity is None else tuple(diversity)
        self.schedule("p", p, check_probability)

    def forward(self, x: Tensor) -> Tensor:
        """Return the head's output for every sample, ``[M, B, *out]``."""
        samples = self._samples(x)
        outputs: Tensor = self.head(samples.flatten(0, 1))
        return outputs.reshape(*samples.shape[:2], *outputs.shape[1:])

    def _samples(self, x: Tensor) -> Tensor:
        if self.diversity is None or not self.training:
            return multi_sample_dropout(x, self.p, self.num_samples, training=self.training)
        altered = torch.stack([x if alter is None else alter(x) for alter in self.diversity])
        return dropout_samples(altered, self.p, 1)[0]

    def loss(
        self, x: Tensor, target: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Return the mean of ``criterion`` over the samples."""
        return multi_sample_loss(self(x), target, criterion)

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return f"p={self.p.item():g}, num_samples={self.num_samples}"


class MultiSampleDropoutCrossEntropy(ScheduledModule):
    r"""A linear classifier with multi-sample dropout and cross-entropy, fused into one operator.

    .. math::
        L = \frac{1}{M n} \sum_{s,i}
        \mathrm{CE}\big(\tfrac{1}{1-p} (m^s_i \odot x_i) W^\top + b,\ y_i\big)

    The module owns W and b; in training it calls
    :func:`regularizers.ops.multi_sample_dropout_cross_entropy`, in ``eval()`` the same loss without
    dropout. ``module.p`` and ``module.label_smoothing`` may be assigned by a schedule.

    Args:
        in_features: D.
        num_classes: C.
        p: probability that a feature is dropped, in [0, 1).
        num_samples: number of samples M, at least 1.
        bias: whether there is a bias.
        label_smoothing: in [0, 1).
        ignore_index: target value whose rows do not count.
        class_weight: ``[C]`` or None; moves with the module, not in the state dict.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        device: where the parameters go.
        dtype: their dtype.

    Shape:
        ``x`` ``[B, D]``, ``target`` ``[B]`` to a loss with no dimensions (``[B]`` for
        ``reduction="none"``).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> head = MultiSampleDropoutCrossEntropy(64, 10)
        >>> features, target = torch.randn(32, 64), torch.randint(10, (32,))
        >>> head(features, target).backward()
        >>> head.eval().logits(features).argmax(1).shape
        torch.Size([32])

    Source:
        H. Inoue, 2019, arXiv 1905.09788; the formula follows from the abstract.
    """

    p: Tensor
    label_smoothing: Tensor
    bias: nn.Parameter | None
    class_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        p: float = 0.5,
        num_samples: int = 8,
        *,
        bias: bool = True,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        class_weight: Tensor | None = None,
        reduction: Reduction = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("in_features", in_features, 1)
        check_at_least("num_classes", num_classes, 1)
        check_at_least("num_samples", num_samples, 1)
        check_one_of("reduction", reduction, REDUCTIONS)
        self.in_features = in_features
        self.num_classes = num_classes
        self.num_samples = num_samples
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.weight = nn.Parameter(
            torch.empty(num_classes, in_features, device=device, dtype=dtype)
        )
        self.bias = (
            nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype)) if bias else None
        )
        self.register_buffer("class_weight", class_weight, persistent=False)
        self.schedule("p", p, check_fraction)
        self.schedule("label_smoothing", label_smoothing, check_fraction)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``torch.nn.Linear`` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        return multi_sample_dropout_cross_entropy(
            x,
            self.weight,
            self.bias,
            target,
            p=self.p if self.training else 0.0,
            seed=None if self.training else 0,  # evaluation leaves the generator alone
            num_samples=self.num_samples,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            class_weight=self.class_weight,
            reduction=self.reduction,
        )

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` without dropout, for inference."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, p={self.p.item():g}, "
            f"num_samples={self.num_samples}, bias={self.bias is not None}"
        )
