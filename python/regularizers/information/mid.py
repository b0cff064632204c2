"""Limits on what predictions reveal of their input: a bottleneck head, and noisy regression."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_module,
    check_not_negative,
    check_one_of,
    check_positive,
    check_shape,
)
from regularizers._shared.distributed import gather_batch
from regularizers._shared.gaussian import kl_standard_normal, reparameterize
from regularizers._shared.reductions import REDUCTIONS, Reduction, reduce_rows
from regularizers._shared.scheduled import scheduled
from regularizers.information.estimators import kernel_information
from regularizers.ops._operator import accumulate_dtype, full_precision

Estimate = Literal["pairwise", "moment", "smallest", "lower"]
ESTIMATES = ("pairwise", "moment", "smallest", "lower")


class VIBOutput(NamedTuple):
    """What :class:`VIBHead` returns.

    Attributes:
        logits: ``[B, C]``.
        mu: means of the latent code, ``[B, K]``.
        std: its standard deviations, ``[B, K]``.

    Example:
        >>> VIBHead(16, 4)(torch.randn(32, 16)).logits.shape
        torch.Size([32, 4])
    """

    logits: Tensor
    mu: Tensor
    std: Tensor


class VIBHead(nn.Module):
    r"""A classifier that sees its features through a noisy code: a variational bottleneck.

    .. math::
        (\mu, r) = W h + b, \qquad \sigma = \mathrm{softplus}(r - \text{shift}) + \text{floor},
        \qquad \text{logits} = V (\mu + \sigma \varepsilon) + c

    Train it with :func:`mid_loss`. The noise is part of what is released and **stays on in**
    ``eval()``: without it the bound on what the predictions reveal does not hold.

    Args:
        in_dim: number of features F of h.
        num_classes: C, at least 2.
        latent_dim: size K of the code; None for half of ``in_dim``.
        std_shift: shift of the softplus; 5 makes the first standard deviations about 0.0067.
        std_floor: least standard deviation, at least 0.
        eval_mean: use the means in ``eval()``, for predictions that are not released.
        device: where the parameters go.
        dtype: their dtype.

    Shape:
        ``[B, F]`` to :class:`VIBOutput` with ``[B, C]``, ``[B, K]`` and ``[B, K]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> head = VIBHead(16, 4)
        >>> features, target = torch.randn(32, 16), torch.randint(4, (32,))
        >>> logits, mu, std = head(features)
        >>> mid_loss(logits, target, mu, std, beta=0.003).backward()
        >>> logits.shape, mu.shape
        (torch.Size([32, 4]), torch.Size([32, 8]))

    Source:
        T. Wang, Y. Zhang, R. Jia, "Improving Robustness to Model Inversion Attacks via Mutual
        Information Regularization", AAAI 2021, arXiv 2009.05241; the head of the authors' code,
        which has no floor.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        *,
        latent_dim: int | None = None,
        std_shift: float = 5.0,
        std_floor: float = 0.0,
        eval_mean: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("in_dim", in_dim, 1)
        check_at_least("num_classes", num_classes, 2)
        latent_dim = max(1, in_dim // 2) if latent_dim is None else latent_dim
        check_at_least("latent_dim", latent_dim, 1)
        check_not_negative("std_floor", std_floor)
        self.std_shift = std_shift
        self.std_floor = std_floor
        self.eval_mean = eval_mean
        self.encoder = nn.Linear(in_dim, 2 * latent_dim, device=device, dtype=dtype)
        self.classifier = nn.Linear(latent_dim, num_classes, device=device, dtype=dtype)

    def forward(
        self,
        h: Tensor,
        *,
        sample: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> VIBOutput:
        """Return logits, means and standard deviations.

        Args:
            h: features ``[B, F]``.
            sample: draw the code, or use its mean; None: draw, but for ``eval()`` with
                ``eval_mean``.
            generator: generator to draw from, of the device of ``h``.
        """
        check_floating("h", h)
        check_shape("h", h, (None, self.encoder.in_features), "[batch, in_dim]")
        mu, raw = self.encoder(h).chunk(2, dim=-1)
        std = F.softplus(raw - self.std_shift) + self.std_floor
        if sample is None:
            sample = self.training or not self.eval_mean
        code = reparameterize(mu, std, generator=generator) if sample else mu
        return VIBOutput(self.classifier(code), mu, std)


def mid_loss(
    logits: Tensor,
    target: Tensor,
    mu: Tensor,
    std: Tensor,
    *,
    beta: float | Tensor = 3e-3,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy, and a bound on what the latent code knows of the input.

    .. math::
        L = \mathrm{CE} + \beta \sum_k \tfrac12
        \left( \mu_k^2 + \sigma_k^2 - 1 - \log \sigma_k^2 \right)

    The sum over the code's components, averaged over inputs, bounds I(X; code) in nats, and with
    it what any attack learns from the predictions.

    Args:
        logits: ``[B, C]``.
        target: classes ``[B]``, or probabilities ``[B, C]``.
        mu: means ``[B, K]``.
        std: standard deviations ``[B, K]``; one that underflows to 0 counts as the least normal
            number in the logarithm.
        beta: strength, at least 0; a number or a tensor with no dimensions.
        reduction: over the batch: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        No dimensions, or ``[B]`` for ``reduction="none"``; float32 for half types.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``beta`` is negative, ``reduction`` unknown or shapes do not fit.

    Example:
        >>> logits, target = torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])
        >>> mu, std = torch.zeros(4, 3), torch.ones(4, 3)  # the prior itself: no information
        >>> mid_loss(logits, target, mu, std)
        tensor(0.6931)

    Source:
        T. Wang, Y. Zhang, R. Jia, 2021, arXiv 2009.05241, authors' code; the bound is the
        variational bottleneck's (A. Alemi et al., 2017, arXiv 1612.00410). 0.003 is the published
        beta for VGG16 on faces.
    """
    check_floating("logits", logits)
    check_floating("mu", mu)
    check_floating("std", std)
    check_one_of("reduction", reduction, REDUCTIONS)
    strength = scheduled("beta", beta, logits, check_not_negative)
    if mu.dim() != 2 or mu.shape != std.shape or logits.dim() != 2 or len(mu) != len(logits):
        raise ValueError(
            "logits, mu and std must have shapes [B, C], [B, K] and [B, K], "
            f"got {list(logits.shape)}, {list(mu.shape)} and {list(std.shape)}"
        )
    wide = accumulate_dtype(logits.dtype)
    error = F.cross_entropy(logits.to(wide), target, reduction="none")
    known = kl_standard_normal(mu.to(wide), std=std.to(wide)).sum(1)
    losses = error + strength.to(wide) * known
    return reduce_rows(losses, reduction)


def gaussian_output_information(
    pred: Tensor,
    *,
    noise_std: float,
    estimator: Estimate = "pairwise",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Bound what predictions with Gaussian noise reveal of the input, over a batch.

    .. math::
        I(X; f(X) + \varepsilon) \le \tfrac12 \log \det\left( 1 + \mathrm{Cov} f / s^2 \right)
        \ (\text{moment}), \qquad
        I \le -\frac1N \sum_i \log \frac1N \sum_j e^{-\|f_i - f_j\|^2 / (2 s^2)}
        \ (\text{pairwise})

    The first is exact for Gaussian predictions, the second for predictions in few far groups, and
    at most log N. Both are upper bounds for the batch's distribution of predictions, and the
    smaller counts. ``"lower"`` is the lower companion of the second, with 8 for 2.

    Args:
        pred: predictions without noise, ``[N]`` or ``[N, D]``.
        noise_std: s, in units of ``pred``, above 0.
        estimator: ``"pairwise"``, ``"moment"``, ``"smallest"`` (of these two) or ``"lower"``.
        process_group: processes whose batches count as one.

    Returns:
        Nats, no dimensions; float32 for half types. 0 for equal predictions.

    Raises:
        TypeError: ``pred`` is not a floating-point tensor.
        ValueError: an argument is out of range or of the wrong shape.

    Example:
        >>> pred = torch.tensor([0.0, 0.0, 20.0, 20.0])
        >>> for estimator in ("pairwise", "moment"):
        ...     bound = gaussian_output_information(pred, noise_std=1.0, estimator=estimator)
        ...     print(f"{estimator}: {bound:.3f} nats")
        pairwise: 0.693 nats
        moment: 2.308 nats

    Source:
        T. Wang, Y. Zhang, R. Jia, 2021, arXiv 2009.05241, the idea; reconstructed from the
        abstract. The pairwise bounds are those of A. Kolchinsky, B. Tracey, 2017, arXiv 1706.02419.
    """
    check_floating("pred", pred)
    check_positive("noise_std", noise_std)
    check_one_of("estimator", estimator, ESTIMATES)
    if pred.dim() not in (1, 2) or len(pred) == 0:
        raise ValueError(f"pred must have shape [N] or [N, D], N >= 1, got {list(pred.shape)}")
    rows = pred.reshape(len(pred), -1).to(accumulate_dtype(pred.dtype)) / noise_std
    rows = gather_batch(rows, process_group)
    if estimator == "moment":
        return _moment_bound(rows)
    bound, _ = kernel_information(rows, bound="lower" if estimator == "lower" else "upper")
    return torch.minimum(bound, _moment_bound(rows)) if estimator == "smallest" else bound


def _moment_bound(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(0)
    with full_precision(rows.device):
        covariance = centred.T @ centred / len(rows)
    if len(covariance) == 1:
        return 0.5 * covariance[0, 0].log1p()
    unit = torch.eye(len(covariance), dtype=rows.dtype, device=rows.device)
    bound: Tensor = 0.5 * torch.linalg.slogdet(unit + covariance).logabsdet
    return bound


class NoisyRegressor(nn.Module):
    r"""A regression model that adds Gaussian noise to its output, in training and in service.

    .. math:: \hat y = f(x) + s \varepsilon, \qquad \varepsilon \sim N(0, 1)

    What the output reveals of the input is then finite, and :meth:`loss` limits it.

    Args:
        model: f, any module that returns one tensor.
        noise_std: s, in units of the output, above 0.

    Shape:
        As ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``noise_std`` is not above 0.

    Example:
        >>> regressor = NoisyRegressor(nn.Linear(3, 1), noise_std=0.1)
        >>> x, y = torch.randn(64, 3), torch.randn(64, 1)
        >>> regressor.loss(x, y, lambda_mi=0.05).backward()
        >>> regressor.eval()(x).shape  # with noise
        torch.Size([64, 1])

    Source:
        T. Wang, Y. Zhang, R. Jia, 2021, arXiv 2009.05241; reconstructed from the abstract.
    """

    def __init__(self, model: nn.Module, *, noise_std: float) -> None:
        super().__init__()
        check_module("model", model)
        check_positive("noise_std", noise_std)
        self.model = model
        self.noise_std = noise_std

    def forward(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the noisy predictions; the noise is on in ``eval()`` too."""
        return reparameterize(self.model(x), self.noise_std, generator=generator)

    def loss(
        self,
        x: Tensor,
        target: Tensor,
        *,
        lambda_mi: float | Tensor,
        estimator: Estimate = "pairwise",
        process_group: dist.ProcessGroup | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the mean squared error of the noisy predictions, plus lambda times their bound.

        Args:
            x: inputs ``[N, ...]``.
            target: ``[N]`` or ``[N, D]``, the shape of the predictions.
            lambda_mi: strength, squared units of the target a nat, at least 0.
            estimator: of :func:`gaussian_output_information`.
            process_group: processes whose batches count as one, in the bound.
            generator: generator to draw the noise from.
        """
        pred = self.model(x)
        if target.shape != pred.shape:
            raise ValueError(f"target must have shape {list(pred.shape)}, got {list(target.shape)}")
        wide = accumulate_dtype(pred.dtype)
        strength = scheduled("lambda_mi", lambda_mi, pred, check_not_negative)
        noisy = reparameterize(pred.to(wide), self.noise_std, generator=generator)
        revealed = gaussian_output_information(
            pred, noise_std=self.noise_std, estimator=estimator, process_group=process_group
        )
        return F.mse_loss(noisy, target.to(wide)) + strength.to(wide) * revealed
