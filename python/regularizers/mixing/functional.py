"""What the mixing methods share: mixing weights, mixed batches, and the losses that take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_fraction,
    check_not_negative,
    check_one_of,
    check_positive,
    check_probability,
    check_same_device,
    check_shape,
    check_tensor,
)
from regularizers._shared.randomness import check_caller_draws
from regularizers._shared.reductions import REDUCTIONS, Reduction, reduce_rows
from regularizers.ops._operator import accumulate_dtype, loss_dtype
from regularizers.ops.mix import mix, row_weights

__all__ = ["MixBatch", "mix", "mixed_cross_entropy", "sample_lambda", "softmax_consistency"]

Consistency = Literal["mse", "kl"]


class MixBatch(NamedTuple):
    r"""A batch of mixed inputs, with both labels of each and the weight of the first.

    Every sampler of this family returns one. In the place of
    ``torchvision.transforms.v2.MixUp``/``CutMix`` or ``timm.data.Mixup``, which return soft labels
    ``[B, C]``, the labels stay two class indices and a weight, which the loss takes as they are;
    :meth:`soft_target` gives the soft labels.

    Args:
        x: ``[B, *]``, the mixed inputs.
        target_a: ``[B, *]``, the labels that came with the batch.
        target_b: ``[B, *]``, the labels of the partners, ``target_a[perm]``.
        lam: weight of ``target_a``: no dimensions, or ``[B]`` with one for each row.
        perm: ``[B]``, the partner of each row.

    Example:
        >>> x, target = torch.zeros(2, 3), torch.tensor([0, 2])
        >>> batch = MixBatch(x, target, target.flip(0), torch.tensor(0.75), torch.tensor([1, 0]))
        >>> batch.soft_target(3)
        tensor([[0.7500, 0.0000, 0.2500],
                [0.2500, 0.0000, 0.7500]])
        >>> batch.loss(torch.zeros(2, 3))
        tensor(1.0986)
    """

    x: Tensor
    target_a: Tensor
    target_b: Tensor
    lam: Tensor
    perm: Tensor

    def loss(self, logits: Tensor, **options: Any) -> Tensor:
        """Return :func:`mixed_cross_entropy` of ``logits`` ``[B, C]``; options as there."""
        return mixed_cross_entropy(logits, self.target_a, self.target_b, self.lam, **options)

    def soft_target(self, num_classes: int, *, label_smoothing: float = 0.0) -> Tensor:
        """Return label distributions ``[B, C]``, as timm and torchvision give them.

        Args:
            num_classes: C.
            label_smoothing: mass spread evenly over all classes, in [0, 1), as in
                ``timm.data.Mixup`` and ``F.cross_entropy``.
        """
        check_at_least("num_classes", num_classes, 1)
        check_fraction("label_smoothing", label_smoothing)
        lam = self.lam.expand(self.target_a.shape).unsqueeze(-1)
        a, b = (F.one_hot(t, num_classes).to(lam) for t in (self.target_a, self.target_b))
        return (1 - label_smoothing) * (lam * a + (1 - lam) * b) + label_smoothing / num_classes


def sample_lambda(
    n: int,
    alpha: float,
    beta: float | None = None,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    fold: bool = False,
    minimum: float | None = None,
) -> Tensor:
    r"""Draw mixing weights from a Beta distribution.

    .. math:: \lambda = \frac{G_1}{G_1 + G_2} \sim \mathrm{Beta}(\alpha, \beta), \qquad
        G_1 \sim \Gamma(\alpha, 1), \quad G_2 \sim \Gamma(\beta, 1)

    Draws are made in float64 on the CPU (or where ``generator`` lives) and then moved, so that one
    state of the generator gives the same weights on every device.

    Args:
        n: number of weights.
        alpha: first parameter, at least 0; 0 stands for no mixing and gives ones.
        beta: second parameter, above 0; None: ``alpha``.
        generator: a generator on any device, not inside ``torch.compile`` or activation
            checkpointing; None: PyTorch's default generator of the CPU.
        device: where the weights go.
        dtype: their type; None: PyTorch's default.
        fold: replace :math:`\lambda` by :math:`\max(\lambda, 1 - \lambda)`, so that the first of
            two mixed samples dominates.
        minimum: smallest weight, in [0, 1], applied last.

    Returns:
        ``[n]``, in [0, 1].

    Raises:
        TypeError: a parameter is not a number.
        ValueError: a parameter is out of range.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> lam = sample_lambda(1000, 0.4, generator=generator, fold=True, minimum=0.55)
        >>> bool((lam >= 0.55).all())
        True

    Source:
        H. Zhang et al., 2018, arXiv 1710.09412 (the law); ``fold`` from D. Berthelot et al., 2019,
        arXiv 1905.02249; both as used by papers 20, 22 and 103.
    """
    check_at_least("n", n, 0)
    check_not_negative("alpha", alpha)
    if beta is not None:
        check_positive("beta", beta)
    if minimum is not None:
        check_probability("minimum", minimum)
    lam = _draw_beta(n, alpha, alpha if beta is None else beta, generator)
    if fold:
        lam = torch.maximum(lam, 1 - lam)
    if minimum is not None:
        lam = lam.clamp(min=minimum)
    lam = lam.to(dtype or torch.get_default_dtype())
    return lam if device is None else moved(lam, torch.device(device))


def _draw_beta(n: int, alpha: float, beta: float, generator: torch.Generator | None) -> Tensor:
    place = drawing(generator)["device"]
    if alpha == 0:
        return torch.ones(n, dtype=torch.float64, device=place)
    first, second = (
        torch._standard_gamma(
            torch.full((n,), shape, dtype=torch.float64, device=place), generator=generator
        )
        for shape in (alpha, beta)
    )
    total = first + second
    return torch.where(total > 0, first / total, 0.5)  # both may underflow where both are small


def drawing(generator: torch.Generator | None) -> dict[str, Any]:
    """Return the arguments of a draw: on the CPU, unless a generator lives elsewhere.

    No generator is left out, not passed on as None: torch.compile would then take the sizes of the
    draw for constants.
    """
    if generator is None:
        return {"device": torch.device("cpu")}
    check_caller_draws(generator)
    return {"device": generator.device, "generator": generator}


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return what was drawn on another device, without waiting for the work queued there."""
    # Only towards a GPU: the other way, the host would read before the copy has come.
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


def label_weight_dtype(x: Tensor) -> torch.dtype:
    """Return the type of label weights: float64 for float64 inputs, else float32."""
    return accumulate_dtype(x.dtype)


def draw_partners(
    x: Tensor,
    perm: Tensor | None,
    draw_weights: Callable[[], Tensor],
    prob: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Return weights, where they are drawn, and a permutation, beside ``x``.

    Both are drawn in this order whatever ``prob`` says, so that one state of a generator gives the
    same for every ``prob``. At probability 1 - ``prob`` the weights are 1 and the permutation is
    the identity.
    """
    batch = x.shape[0]
    lam = draw_weights()
    if perm is None:
        partners = moved(torch.randperm(batch, **drawing(generator)), x.device)
    else:
        check_tensor("perm", perm)
        if perm.dtype != torch.int64:
            raise TypeError(f"perm must be int64, got {perm.dtype}")
        check_shape("perm", perm, (batch,), "[batch of x]")
        check_same_device("perm", perm, "x", x)
        partners = perm
    if prob < 1:
        hit = torch.rand((), **drawing(generator)) < prob
        lam = torch.where(hit, lam, 1.0)
        identity = torch.arange(batch, device=x.device)
        partners = torch.where(moved(hit, x.device), partners, identity)
    return lam, partners


def unmixed(x: Tensor, target: Tensor) -> MixBatch:
    """Return a batch as it is, in the form of a mixed one."""
    check_labelled_batch(x, target)
    one = torch.ones((), dtype=label_weight_dtype(x), device=x.device)
    return MixBatch(x, target, target, one, torch.arange(x.shape[0], device=x.device))


class BatchMixer(nn.Module):
    """What MixUp and CutMix share as modules: they mix in training and do nothing in ``eval()``."""

    _mixes: Callable[..., MixBatch]

    def __init__(self, alpha: float = 1.0, prob: float = 1.0, *, per_sample: bool = False) -> None:
        super().__init__()
        check_not_negative("alpha", alpha)
        check_probability("prob", prob)
        self.alpha = alpha
        self.prob = prob
        self.per_sample = per_sample

    def forward(
        self, x: Tensor, target: Tensor, *, generator: torch.Generator | None = None
    ) -> MixBatch:
        """Return the batch, mixed in training."""
        if not self.training:
            return unmixed(x, target)
        return self._mixes(
            x,
            target,
            alpha=self.alpha,
            prob=self.prob,
            per_sample=self.per_sample,
            generator=generator,
        )

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return f"alpha={self.alpha:g}, prob={self.prob:g}, per_sample={self.per_sample}"


def check_labelled_batch(
    x: Tensor, target: Tensor, x_name: str = "x", target_name: str = "target"
) -> None:
    """Raise unless ``target`` has a label for every row of ``x``."""
    check_tensor(x_name, x)
    check_tensor(target_name, target)
    if x.dim() < 1:
        raise ValueError(f"{x_name} must have shape [batch, ...], got no dimensions")
    if target.dim() < 1 or target.shape[0] != x.shape[0]:
        raise ValueError(
            f"{target_name} must have one label for each of the {x.shape[0]} rows of {x_name}, "
            f"got shape {list(target.shape)}"
        )
    check_same_device(target_name, target, x_name, x)


def mixed_cross_entropy(
    logits: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: float | Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Compute the cross-entropy of logits with two weighted labels a row.

    .. math::
        \ell_i = \lambda_i \mathrm{CE}(z_i, a_i) + (1 - \lambda_i) \mathrm{CE}(z_i, b_i)
        = \mathrm{lse}(z_i) - \lambda_i z_{i a_i} - (1 - \lambda_i) z_{i b_i}

    One log-softmax serves both labels, and no one-hot target is made. Equal to ``F.cross_entropy``
    with the soft target :math:`\lambda_i e_{a_i} + (1 - \lambda_i) e_{b_i}`.

    With label smoothing :math:`\varepsilon` the target row becomes
    :math:`(1-\varepsilon)(\lambda_i e_{a_i} + (1-\lambda_i) e_{b_i}) + \varepsilon / C`. A label
    equal to ``ignore_index`` drops out with its weight: the row keeps the weight of its other
    label, and the mean divides by the sum of the weights that are left. With :math:`a = b` both are
    as in ``F.cross_entropy``.

    Args:
        logits: ``[B, C]``.
        target_a: class indices ``[B]``, int64, in [0, C) or equal to ``ignore_index``.
        target_b: likewise.
        lam: weight of ``target_a`` in [0, 1]: a number, a tensor with no dimensions, or ``[B]``.
            Differentiated through if it requires grad.
        label_smoothing: :math:`\varepsilon` in [0, 1).
        ignore_index: label that does not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss, or ``[B]`` losses; dtype of ``logits``, float32 under autocast. The mean over no
        labels is NaN, as in ``F.cross_entropy``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a shape does not fit, or an option is out of range.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 1.0]])
        >>> mixed_cross_entropy(logits, torch.tensor([0]), torch.tensor([2]), 0.75)
        tensor(0.6576)

    Source:
        S. Yun et al., 2019, arXiv 1905.04899, from the authors' code; ``ignore_index`` and
        smoothing follow from the soft target.
    """
    check_floating("logits", logits)
    check_shape("logits", logits, (None, None), "[batch, classes]")
    check_one_of("reduction", reduction, REDUCTIONS)
    check_fraction("label_smoothing", label_smoothing)
    for name, target in (("target_a", target_a), ("target_b", target_b)):
        check_tensor(name, target)
        if target.dtype != torch.int64:
            raise TypeError(f"{name} must be int64 class indices, got {target.dtype}")
        check_shape(name, target, (logits.shape[0],), "[batch of logits]")
        check_same_device(name, target, "logits", logits)
    result_dtype = loss_dtype(logits)
    wide = accumulate_dtype(logits.dtype)
    weight = row_weights(lam, logits.shape[0], logits, "logits")
    labels = torch.stack([target_a, target_b], 1)
    counts = labels != ignore_index
    weight = torch.where(counts, torch.stack([weight, 1 - weight], 1), 0)
    log_p = F.log_softmax(logits, 1, dtype=wide)
    chosen = log_p.gather(1, torch.where(counts, labels, 0))
    rows = -(1 - label_smoothing) * (weight * chosen).sum(1)
    if label_smoothing > 0:
        rows = rows - label_smoothing * weight.sum(1) * log_p.mean(1)
    if reduction == "mean":
        rows = rows.sum() / weight.sum()
    elif reduction == "sum":
        rows = rows.sum()
    return rows.to(result_dtype)


def softmax_consistency(
    logits_a: Tensor,
    logits_b: Tensor,
    *,
    kind: Consistency = "mse",
    detach_target: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Measure how far two predicted distributions are apart.

    .. math::
        d_{\mathrm{mse}} = \frac{1}{C} \sum_c (p_{a,c} - p_{b,c})^2, \qquad
        d_{\mathrm{kl}} = \frac{1}{C} \mathrm{KL}(p_b \,\|\, p_a), \qquad p = \mathrm{softmax}(z)

    Adding a constant to a row of logits changes nothing; :math:`d_{\mathrm{mse}} \le 2 / C`.

    Args:
        logits_a: ``[*, C]``.
        logits_b: ``[*, C]``, the target where one side is.
        kind: ``"mse"`` or ``"kl"``.
        detach_target: let no gradient into ``logits_b``.
        reduction: over rows: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The distance, or one for each row ``[*]``; dtype of ``logits_a``, float32 under autocast.

    Raises:
        TypeError: the logits are not floating-point tensors.
        ValueError: shapes differ, or an option is unknown.

    Example:
        >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> softmax_consistency(a, b)
        tensor(0.0224)

    Source:
        H. H. Nguyen et al., 2020, arXiv 2003.01944, from the authors' code (division by C).
    """
    check_floating("logits_a", logits_a)
    check_floating("logits_b", logits_b)
    check_one_of("kind", kind, ("mse", "kl"))
    check_one_of("reduction", reduction, REDUCTIONS)
    if logits_a.dim() < 1 or logits_a.shape != logits_b.shape:
        raise ValueError(
            f"logits_b must have the shape of logits_a [..., classes] {list(logits_a.shape)}, "
            f"got {list(logits_b.shape)}"
        )
    if detach_target:
        logits_b = logits_b.detach()
    wide = accumulate_dtype(logits_a.dtype)
    if kind == "mse":
        difference = logits_a.softmax(-1, dtype=wide) - logits_b.softmax(-1, dtype=wide)
        rows = difference.square().mean(-1)
    else:
        log_a, log_b = (F.log_softmax(z, -1, dtype=wide) for z in (logits_a, logits_b))
        rows = F.kl_div(log_a, log_b, reduction="none", log_target=True).mean(-1)
    return reduce_rows(rows, reduction).to(loss_dtype(logits_a))
