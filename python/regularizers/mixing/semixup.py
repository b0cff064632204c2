"""Semixup: labelled mixup, and consistency of predictions in and out of the data manifold."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from regularizers._shared.checks import (
    check_floating,
    check_module,
    check_not_negative,
    check_one_of,
    check_positive,
)
from regularizers.mixing.functional import (
    Consistency,
    check_labelled_batch,
    label_weight_dtype,
    mix,
    mixed_cross_entropy,
    sample_lambda,
    softmax_consistency,
)


class SemixupParts(NamedTuple):
    """The distances of Semixup, not weighted: each a tensor with no dimensions.

    Args:
        consistency: in the manifold, between an input and its augmentation.
        interpolation: between the prediction on a mix and the mix of predictions.
        out_of_manifold: between a mix and both its main input and that one's augmentation, summed.

    Example:
        >>> z = torch.zeros(4, 3)
        >>> _, parts = semixup_unlabeled_loss(z, z, z, z + torch.eye(4, 3))
        >>> parts.consistency, parts.interpolation > 0
        (tensor(0.), tensor(True))
    """

    consistency: Tensor
    interpolation: Tensor
    out_of_manifold: Tensor


class SemixupOutput(NamedTuple):
    """What :class:`Semixup` computes in training: tensors with no dimensions.

    Args:
        loss: the sum of the next two.
        labeled: mixup's cross-entropy on the labelled rows.
        unlabeled: the weighted sum of ``parts``.
        parts: the distances, not weighted.
        lam: mixing weight of the unlabelled rows.

    Example:
        >>> model = Semixup(nn.Linear(4, 3), augment=lambda x: x + 0.1 * torch.randn_like(x))
        >>> found = model(torch.randn(3, 4), torch.arange(3), torch.randn(8, 4))
        >>> torch.equal(found.loss, found.labeled + found.unlabeled)
        True
    """

    loss: Tensor
    labeled: Tensor
    unlabeled: Tensor
    parts: SemixupParts
    lam: Tensor


def semixup_unlabeled_loss(
    logits: Tensor,
    logits_aug: Tensor,
    logits_mix: Tensor,
    logits_interp: Tensor,
    *,
    consistency_weight: float = 2.0,
    interpolation_weight: float = 4.0,
    out_of_manifold_weight: float = 2.0,
    kind: Consistency = "mse",
    detach_targets: bool = False,
) -> tuple[Tensor, SemixupParts]:
    r"""Tie predictions on inputs, their augmentations and their mixes together.

    .. math::
        L_u = w_c\, d(z_{\mathrm{aug}}, z) + w_i\, d(z_{\mathrm{mix}}, z_{\mathrm{int}})
        + w_o \big( d(z, z_{\mathrm{mix}}) + d(z_{\mathrm{mix}}, z_{\mathrm{aug}}) \big), \qquad
        d(p, q) = \tfrac{1}{C} \|\mathrm{softmax}\,p - \mathrm{softmax}\,q\|^2

    averaged over rows, d as in :func:`softmax_consistency`.

    Args:
        logits: ``[B, C]``, z = f(x).
        logits_aug: ``[B, C]``, f of the augmented x.
        logits_mix: ``[B, C]``, f of :math:`\lambda x + (1 - \lambda) x'`.
        logits_interp: ``[B, C]``, :math:`\lambda z + (1 - \lambda) z'`: mixed *logits*, not
            probabilities.
        consistency_weight: :math:`w_c`, at least 0.
        interpolation_weight: :math:`w_i`, at least 0.
        out_of_manifold_weight: :math:`w_o`, at least 0.
        kind: ``"mse"``, or ``"kl"`` for KL of the second argument against the first, over C.
        detach_targets: let no gradient into the second argument of each d. The authors' code lets
            gradients into both sides, though its comments say otherwise.

    Returns:
        The loss and its :class:`SemixupParts`.

    Raises:
        TypeError: the logits are not floating-point tensors.
        ValueError: shapes differ, or a weight is negative.

    Example:
        >>> z, aug = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> mixed, interp = torch.tensor([[1.0, 0.5]]), torch.tensor([[1.5, 0.25]])
        >>> loss, parts = semixup_unlabeled_loss(z, aug, mixed, interp)
        >>> loss
        tensor(0.2978)

    Source:
        H. H. Nguyen, S. Saarakkala, M. B. Blaschko, A. Tiulpin, "Semixup: In- and Out-of-Manifold
        Regularization for Deep Semi-Supervised Knee Osteoarthritis Severity Grading from Plain
        Radiographs", 2020, arXiv 2003.01944; from the authors' code. Weights 2, 4, 2 are those of
        its train.py, used in the experiments; its class has other defaults.
    """
    for name, weight in (
        ("consistency_weight", consistency_weight),
        ("interpolation_weight", interpolation_weight),
        ("out_of_manifold_weight", out_of_manifold_weight),
    ):
        check_not_negative(name, weight)
    check_one_of("kind", kind, ("mse", "kl"))
    check_floating("logits", logits)
    for name, other in (
        ("logits_aug", logits_aug),
        ("logits_mix", logits_mix),
        ("logits_interp", logits_interp),
    ):
        check_floating(name, other)
        if other.shape != logits.shape:
            raise ValueError(
                f"{name} must have the shape of logits {list(logits.shape)}, "
                f"got {list(other.shape)}"
            )

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return softmax_consistency(a, b, kind=kind, detach_target=detach_targets)

    parts = SemixupParts(
        distance(logits_aug, logits),
        distance(logits_mix, logits_interp),
        distance(logits, logits_mix) + distance(logits_mix, logits_aug),
    )
    total = (
        consistency_weight * parts.consistency
        + interpolation_weight * parts.interpolation
        + out_of_manifold_weight * parts.out_of_manifold
    )
    return total, parts


class Semixup(nn.Module):
    r"""Train a classifier on few labels and many unlabelled inputs.

    .. math::
        L = \lambda_l \mathrm{CE}(f(\tilde x_l), y) + (1 - \lambda_l) \mathrm{CE}(f(\tilde x_l),
        y_\pi) + L_u, \qquad \lambda = \max(\lambda', 1 - \lambda', \lambda_{\min}), \quad
        \lambda' \sim \mathrm{Beta}(\alpha, \alpha)

    with :math:`L_u` of :func:`semixup_unlabeled_loss` on the unlabelled rows and, as in the paper,
    on the labelled ones too. One :math:`\lambda` serves a batch; it stays above one half, so that a
    mix is nearer to its first input.

    The model sees four batches: unlabelled rows, augmented, mixed, and mixed labelled rows. By
    default it runs once on all of them, which gives the same predictions unless a layer computes
    statistics of the batch: batch norm then normalises real, augmented and mixed inputs together.
    ``separate_passes=True`` runs them one after the other, each with statistics of its own.

    In ``eval()`` the module is the model.

    Args:
        model: any module from ``[B, *]`` to logits ``[B, C]``.
        augment: a callable on a batch of inputs, in the place of the paper's noise, rotation, crop
            and gamma. It has to stay on the data manifold: noise that is too strong hurts.
        alpha: of the Beta law, above 0.
        min_lambda: smallest weight of the first input, in [0.5, 1].
        consistency_weight: as for :func:`semixup_unlabeled_loss`, likewise the next ones.
        interpolation_weight: likewise.
        out_of_manifold_weight: likewise.
        kind: likewise.
        detach_targets: likewise.
        include_labeled: use the labelled rows as unlabelled ones too.
        separate_passes: run the model once for each batch.

    Shape:
        ``x_labeled`` ``[L, *]``, ``y`` ``[L]`` int64, ``x_unlabeled`` ``[U, *]`` to a
        :class:`SemixupOutput`. In ``eval()``: ``x`` ``[B, *]`` to logits ``[B, C]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or there are fewer than two unlabelled rows.

    Example:
        >>> model = Semixup(nn.Linear(16, 5), augment=lambda x: x + 0.1 * torch.randn_like(x))
        >>> x, y, more = torch.randn(10, 16), torch.randint(5, (10,)), torch.randn(64, 16)
        >>> model(x, y, more).loss.backward()
        >>> model.eval()(x).shape
        torch.Size([10, 5])

    Source:
        H. H. Nguyen et al., 2020, arXiv 2003.01944, from the authors' code (losses.py,
        data_provider.py, train.py). That labelled mixes draw from the same folded law is
        reconstructed.
    """

    def __init__(
        self,
        model: nn.Module,
        augment: Callable[[Tensor], Tensor],
        *,
        alpha: float = 0.75,
        min_lambda: float = 0.55,
        consistency_weight: float = 2.0,
        interpolation_weight: float = 4.0,
        out_of_manifold_weight: float = 2.0,
        kind: Consistency = "mse",
        detach_targets: bool = False,
        include_labeled: bool = True,
        separate_passes: bool = False,
    ) -> None:
        super().__init__()
        check_module("model", model)
        if not callable(augment):
            raise TypeError(f"augment must be callable, got {type(augment).__name__}")
        check_positive("alpha", alpha)
        if not 0.5 <= min_lambda <= 1:
            raise ValueError(f"min_lambda must lie in [0.5, 1], got {min_lambda}")
        check_not_negative("consistency_weight", consistency_weight)
        check_not_negative("interpolation_weight", interpolation_weight)
        check_not_negative("out_of_manifold_weight", out_of_manifold_weight)
        check_one_of("kind", kind, ("mse", "kl"))
        self.model = model
        self.augment = augment
        self.alpha = alpha
        self.min_lambda = min_lambda
        self.consistency_weight = consistency_weight
        self.interpolation_weight = interpolation_weight
        self.out_of_manifold_weight = out_of_manifold_weight
        self.kind: Consistency = kind
        self.detach_targets = detach_targets
        self.include_labeled = include_labeled
        self.separate_passes = separate_passes

    def forward(
        self, x_labeled: Tensor, y: Tensor | None = None, x_unlabeled: Tensor | None = None
    ) -> SemixupOutput | Tensor:
        """Return the loss and its parts in training, logits in ``eval()``."""
        if not self.training:
            logits: Tensor = self.model(x_labeled)
            return logits
        if y is None or x_unlabeled is None:
            raise ValueError("y and x_unlabeled must be given in training, got None")
        self._check_batches(x_labeled, y, x_unlabeled)
        mixed_l, partners_l, lam_l = self._mix(x_labeled)
        x = torch.cat([x_labeled, x_unlabeled]) if self.include_labeled else x_unlabeled
        mixed, partners, lam = self._mix(x)
        z, z_aug, z_mix, z_labeled = self._logits(x, self.augment(x), mixed, mixed_l)
        labeled = mixed_cross_entropy(z_labeled, y, y[partners_l], lam_l)
        unlabeled, parts = semixup_unlabeled_loss(
            z,
            z_aug,
            z_mix,
            mix(z, partners, lam),
            consistency_weight=self.consistency_weight,
            interpolation_weight=self.interpolation_weight,
            out_of_manifold_weight=self.out_of_manifold_weight,
            kind=self.kind,
            detach_targets=self.detach_targets,
        )
        return SemixupOutput(labeled + unlabeled, labeled, unlabeled, parts, lam)

    def _check_batches(self, x_labeled: Tensor, y: Tensor, x_unlabeled: Tensor) -> None:
        check_floating("x_labeled", x_labeled)
        check_labelled_batch(x_labeled, y, "x_labeled", "y")
        check_floating("x_unlabeled", x_unlabeled)
        if x_unlabeled.dim() < 1 or x_unlabeled.shape[0] < 2:
            raise ValueError(
                f"x_unlabeled must have at least two rows to mix, got {list(x_unlabeled.shape)}"
            )
        if x_unlabeled.shape[1:] != x_labeled.shape[1:]:
            raise ValueError(
                f"x_unlabeled must have rows of the shape of x_labeled's "
                f"{list(x_labeled.shape[1:])}, got {list(x_unlabeled.shape[1:])}"
            )

    def _mix(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x mixed, the partners and the weight."""
        lam = sample_lambda(
            1,
            self.alpha,
            fold=True,
            minimum=self.min_lambda,
            device=x.device,
            dtype=label_weight_dtype(x),
        )[0]
        partners = torch.randperm(x.shape[0], device=x.device)
        return mix(x, partners, lam), partners, lam

    def _logits(self, *batches: Tensor) -> list[Tensor]:
        if self.separate_passes:
            return [self.model(batch) for batch in batches]
        return list(self.model(torch.cat(batches)).split([batch.shape[0] for batch in batches]))

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return f"alpha={self.alpha:g}, min_lambda={self.min_lambda:g}, kind={self.kind!r}"
