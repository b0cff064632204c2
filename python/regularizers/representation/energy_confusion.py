"""Energy confusion: hold a metric loss back by drawing different classes a little together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from regularizers._shared.checks import (
    check_floating,
    check_not_negative,
    check_one_of,
    check_positive,
    check_same_device,
    check_same_dtype,
    check_tensor,
)
from regularizers._shared.directions import unit
from regularizers._shared.distributed import agree_on_seed, gather_batch, gather_rows
from regularizers._shared.reductions import REDUCTIONS, Reduction
from regularizers._shared.scheduled import ScheduledModule, known_zero
from regularizers.ops import pairwise_logsumexp
from regularizers.ops._operator import accumulate_dtype
from regularizers.transport import Lp

Pairs = Literal["all", "random"]
Weighting = Literal["pair", "class"]
Adversarial = Literal["joint", "features"]


def energy_confusion(
    embeddings: Tensor,
    labels: Tensor,
    *,
    pairs: Pairs = "all",
    weighting: Weighting = "class",
    normalize: bool = True,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Return the mean squared distance between embeddings of different classes, to minimise.

    .. math::
        EC(I, J) = \frac{1}{n_I n_J} \sum_{i \in I, j \in J} \|x_i - x_j\|^2
        = \|m_I - m_J\|^2 + v_I + v_J

    with the mean m and the (biased, total) variance v of a class. It works against a metric loss on
    the same parameters: embeddings that separate the seen classes by the easiest feature alone pay
    for it. There is no discriminator, and no gradient is reversed. Pairs of one class never count.
    Class sums take the place of pairs: time and memory are linear in the batch.

    Args:
        embeddings: x, ``[N, D]``, N at least 2.
        labels: ``[N]``, any integers; batches need several samples a class.
        pairs: ``"all"`` classes, or one ``"random"`` pair of classes a call.
        weighting: ``"class"`` averages EC over pairs of classes, ``"pair"`` over pairs of samples,
            so that large classes count more; equal in balanced batches.
        normalize: scale embeddings to length 1 first; EC then lies in [0, 4].
        generator: to draw the random pair from, on the device of ``embeddings``; not inside
            ``torch.compile``.
        reduction: ``"mean"``; ``"sum"`` over the unordered pairs; ``"none"`` for the mean squared
            distance of each sample from the other classes, ``[N]`` (0 for the samples of classes
            outside of a random pair).
        process_group: processes whose batches are one; the loss is that of the whole. Local
            batches must have one size.

    Returns:
        The loss, a tensor with no dimensions unless ``reduction="none"``; float64 for float64, else
        float32. A batch with one class gives 0.

    Raises:
        TypeError: ``embeddings`` is not floating-point, or ``labels`` not of integers.
        ValueError: a shape is wrong or a word is unknown. NaN gives NaN.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> energy_confusion(x, torch.tensor([0, 0, 1]), normalize=False)
        tensor(3.)

    Source:
        B. Chen, W. Deng, "Energy Confused Adversarial Metric Learning for Zero-Shot Image Retrieval
        and Clustering", AAAI 2019, arXiv 1901.07169. Reconstructed from abstract and introduction:
        the part of the energy distance between classes.
    """
    check_one_of("pairs", pairs, ("all", "random"))
    check_one_of("weighting", weighting, ("pair", "class"))
    check_one_of("reduction", reduction, REDUCTIONS)
    _check_labelled(embeddings, labels)
    x = embeddings.to(accumulate_dtype(embeddings.dtype))
    x = gather_batch(unit(x) if normalize else x, process_group)
    classes = _class_numbers(gather_rows(labels, process_group))
    # A class I has the mass a_I and each of its samples w = a_I / n_I; what follows is the mean of
    # |x_i - x_j|^2 over the pairs of other classes with the weights w_i w_j.
    size = x.new_zeros(len(x)).index_add(0, classes, x.new_ones(len(x)))
    if pairs == "random":
        mass = _two_classes(size, generator, process_group)
    else:
        mass = size if weighting == "pair" else (size > 0).to(x.dtype)
    own = mass[classes]
    share = 1 / size[classes]
    weight = own * share
    total = mass.sum()
    squares = (x - (weight[:, None] * x).sum(0) / total).square().sum(1)
    spread = (weight * squares).sum()
    within = (x - _class_sums(share[:, None] * x, classes)).square().sum(1)
    variance = _class_sums(share * within, classes)
    apart = total * squares + spread - own * (within + variance)  # sum over the others, by samples
    others = total - own
    nothing = 0 * x.sum()
    if reduction == "none":
        counts = (others > 0) & (weight > 0)
        return torch.where(counts, apart / torch.where(counts, others, 1), nothing)
    pair_mass = (weight * others).sum()
    summed = torch.where(pair_mass > 0, (weight * apart).sum(), nothing)
    return summed / 2 if reduction == "sum" else summed / torch.where(pair_mass > 0, pair_mass, 1)


class ECAML(ScheduledModule):
    r"""A metric loss with energy confusion against it.

    .. math:: L = L_{\mathrm{metric}}(x, y) + \lambda\, EC(x, y)

    Args:
        metric_loss: ``metric_loss(embeddings, labels)`` returns a scalar; a module's parameters
            become this module's.
        weight: :math:`\lambda`, at least 0; from 0.01 to 1, tuned for each metric loss. May be
            assigned later, as a schedule does.
        adversarial: ``"joint"`` confuses the embeddings. ``"features"`` confuses the backbone's
            features, before the embedding layer, which then follows the metric loss alone.
        pairs: of :func:`energy_confusion`.
        weighting: likewise.
        normalize: likewise.
        process_group: likewise; the metric loss is on its own.

    Shape:
        Embeddings ``[N, D]``, labels ``[N]`` and, for ``"features"``, features ``[N, *]`` to a
        tensor with no dimensions.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or features are missing or not expected.

    Example:
        >>> def contrast(x, y):
        ...     same = y[:, None] == y
        ...     distance = (x[:, None] - x).square().sum(-1)
        ...     return torch.where(same, distance, (1 - distance).relu()).mean()
        >>> loss = ECAML(contrast, weight=0.05)
        >>> x = torch.randn(8, 4, requires_grad=True)
        >>> loss(x, torch.arange(8) % 4).backward()

    Source:
        B. Chen, W. Deng, AAAI 2019, arXiv 1901.07169; reconstructed, see :func:`energy_confusion`.
    """

    weight: Tensor

    def __init__(
        self,
        metric_loss: Callable[[Tensor, Tensor], Tensor],
        *,
        weight: float = 0.1,
        adversarial: Adversarial = "joint",
        pairs: Pairs = "all",
        weighting: Weighting = "class",
        normalize: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not callable(metric_loss):
            raise TypeError(f"metric_loss must be callable, got {type(metric_loss).__name__}")
        self.schedule("weight", weight, check_not_negative)
        check_one_of("adversarial", adversarial, ("joint", "features"))
        check_one_of("pairs", pairs, ("all", "random"))
        check_one_of("weighting", weighting, ("pair", "class"))
        self.metric_loss = metric_loss
        self.adversarial = adversarial
        self.pairs: Pairs = pairs
        self.weighting: Weighting = weighting
        self.normalize = normalize
        self.process_group = process_group

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        features: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the metric loss and its opponent."""
        if (features is None) != (self.adversarial == "joint"):
            raise ValueError(
                "features must be given for adversarial='features', and only then; "
                f"got adversarial={self.adversarial!r}"
            )
        loss = self.metric_loss(embeddings, labels)
        if known_zero(self.weight):
            return loss
        confused = embeddings
        if features is not None:
            check_tensor("features", features)
            if features.dim() < 2:
                raise ValueError(f"features must have shape [N, ...], got {list(features.shape)}")
            confused = features.flatten(1)
        confusion = energy_confusion(
            confused,
            labels,
            pairs=self.pairs,
            weighting=self.weighting,
            normalize=self.normalize,
            generator=generator,
            process_group=self.process_group,
        )
        return loss + self.weight.to(confusion.dtype) * confusion

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return f"weight={self.weight:.6g}, adversarial={self.adversarial!r}"


def energy_distance(x: Tensor, y: Tensor, *, power: float = 1.0) -> Tensor:
    r"""Return the energy distance between two samples: 0 iff they are the same distribution.

    .. math:: 2 \operatorname{mean}_{ij} \|x_i - y_j\|^p - \operatorname{mean}_{ij} \|x_i - x_j\|^p
        - \operatorname{mean}_{ij} \|y_i - y_j\|^p

    over all pairs, those of a sample with itself included, so never below 0. Twice the energy
    confusion of two classes is the first part at p = 2, an upper bound of the whole. At p = 1 the
    memory is linear in the samples.

    Args:
        x: ``[N, D]``.
        y: ``[M, D]``, of the same dtype.
        power: p in (0, 2]; at 2 only the means are compared, :math:`2 \|m_x - m_y\|^2`.

    Returns:
        The distance (a squared metric), a tensor with no dimensions; float64 for float64, else
        float32.

    Raises:
        TypeError: a tensor is not floating-point, or dtypes differ.
        ValueError: a shape is wrong or ``power`` is out of range. NaN gives NaN.

    Example:
        >>> energy_distance(torch.zeros(3, 1), torch.ones(5, 1))
        tensor(2.)

    Source:
        G. Székely, M. Rizzo, "Energy statistics: A class of statistics based on distances", Journal
        of Statistical Planning and Inference, 2013; the quantity that B. Chen, W. Deng, arXiv
        1901.07169, take a part of.
    """
    check_floating("x", x)
    check_floating("y", y)
    check_same_dtype("y", y, "x", x)
    check_same_device("y", y, "x", x)
    check_positive("power", power)
    if power > 2:
        raise ValueError(f"power must lie in (0, 2], got {power}")
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or 0 in (*x.shape, *y.shape):
        raise ValueError(
            f"x and y must have shapes [N, D] and [M, D], none of them 0, "
            f"got {list(x.shape)} and {list(y.shape)}"
        )
    wide = accumulate_dtype(x.dtype)
    if power == 2:
        return 2 * (x.to(wide).mean(0) - y.to(wide).mean(0)).square().sum()

    def mean_distance(a: Tensor, b: Tensor) -> Tensor:
        if power == 1:
            rows = pairwise_logsumexp(a, b, kind="dist").total
            return rows.sum() / (len(a) * len(b))
        return Lp(power).pairwise(a, b).mean()

    return 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)


def _check_labelled(embeddings: Tensor, labels: Tensor) -> None:
    check_floating("embeddings", embeddings)
    check_tensor("labels", labels)
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"labels must hold integers, got {labels.dtype}")
    check_same_device("labels", labels, "embeddings", embeddings)
    if embeddings.dim() != 2 or len(embeddings) < 2 or embeddings.shape[1] < 1:
        raise ValueError(
            f"embeddings must have shape [N >= 2, D >= 1], got {list(embeddings.shape)}"
        )
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"labels must have shape [{len(embeddings)}], got {list(labels.shape)}")


def _class_numbers(labels: Tensor) -> Tensor:
    """Return the place of each label among those that occur; shapes do not depend on values."""
    ordered, order = labels.sort()
    new = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).long()])
    return torch.empty_like(order).scatter(0, order, new.cumsum(0))


def _class_sums(values: Tensor, classes: Tensor) -> Tensor:
    """Return for each row the sum over the rows of its class."""
    # index_select, whose derivative is an index_add: that of indexing is several times slower.
    return torch.zeros_like(values).index_add(0, classes, values).index_select(0, classes)


def _two_classes(
    size: Tensor, generator: torch.Generator | None, process_group: dist.ProcessGroup | None
) -> Tensor:
    """Return 1 for two random classes of those that occur, 0 elsewhere."""
    if generator is not None and torch.compiler.is_compiling():
        raise RuntimeError("generator must not be given inside torch.compile")
    key = torch.rand(len(size), dtype=size.dtype, device=size.device, generator=generator)
    key = agree_on_seed(key, process_group)  # the largest of the processes' keys: random as well
    key = torch.where(size > 0, key, -1.0)
    chosen = key.topk(2).indices
    return torch.zeros_like(size).index_fill(0, chosen, 1.0) * (size > 0)
