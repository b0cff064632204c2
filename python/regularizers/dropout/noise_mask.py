"""A learned noise mask: a small policy net draws it for every image and learns by REINFORCE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Beta
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_fraction,
    check_not_negative,
    check_one_of,
    check_positive,
    check_shape,
    known_range,
)
from regularizers.ops._operator import accumulate_dtype

Mode = Literal["nearest", "bilinear", "block"]
Baseline = Literal["batch_mean", "leave_one_out"] | Tensor | Callable[[Tensor], Tensor] | None

_MODES = ("nearest", "bilinear", "block")
_BASELINES = ("batch_mean", "leave_one_out")
_EDGE = 1e-6  # log-probabilities are taken at least this far from 0 and 1


class BetaNoisePolicy(nn.Module):
    r"""Map images to the Beta law of a noise mask, one law an element.

    .. math:: \alpha = c + \mathrm{softplus}(a_\phi(x)), \qquad
        \beta = c + \mathrm{softplus}(b_\phi(x))

    with :math:`a_\phi, b_\phi` from three 3 x 3 convolutions of stride 2 and one of 1 x 1, which
    starts at 0: at first every element has mean 1/2 and :math:`\alpha = \beta = c + \ln 2`. Laws
    of half-precision images are computed in float32.

    Args:
        in_channels: channels of the images, at least 1.
        hidden: channels between the convolutions, at least 1.
        mask_size: side of the square mask; None: an eighth of the image, rounded up. Above that,
            neighbours share their law.
        min_concentration: c, above 0; 1 keeps the density bounded.

    Shape:
        ``[B, in_channels, H, W]`` to ``torch.distributions.Beta`` of ``[B, 1, h, w]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or the images are of another shape.

    Example:
        >>> policy = BetaNoisePolicy(3)
        >>> law = policy(torch.randn(2, 3, 32, 32))
        >>> law.mean.shape, law.mean[0, 0, 0, 0].item()
        (torch.Size([2, 1, 4, 4]), 0.5)

    Source:
        "Policy Gradient-Driven Noise Mask", 2024, arXiv 2406.14568, after the abstract: Beta laws
        from a light policy network. The layers, the size of the mask and the range of the
        parameters are reconstructed.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        hidden: int = 16,
        mask_size: int | None = None,
        min_concentration: float = 1.0,
    ) -> None:
        super().__init__()
        check_at_least("in_channels", in_channels, 1)
        check_at_least("hidden", hidden, 1)
        if mask_size is not None:
            check_at_least("mask_size", mask_size, 1)
        check_positive("min_concentration", min_concentration)
        self.in_channels = in_channels
        self.mask_size = mask_size
        self.min_concentration = min_concentration
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Conv2d(hidden, 2, 1)
        nn.init.zeros_(self.head.weight)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Beta:
        """Return the law of the mask."""
        check_floating("x", x)
        check_shape("x", x, (None, self.in_channels, None, None), "[B, in_channels, H, W]")
        features = self.features(x)
        if self.mask_size is not None:
            features = F.adaptive_avg_pool2d(features, self.mask_size)
        raw = self.head(features)
        raw = raw.to(accumulate_dtype(raw.dtype))
        concentration = self.min_concentration + F.softplus(raw)
        # Positive by construction; torch's own check would wait for the device.
        return Beta(concentration[:, :1], concentration[:, 1:], validate_args=False)

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return f"mask_size={self.mask_size}, min_concentration={self.min_concentration:g}"


def sample_noise_mask(
    dist: Beta,
    size: int | tuple[int, int],
    *,
    mode: Mode = "nearest",
    pathwise: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Draw a mask from its law, enlarge it to the image, and give its log-probability.

    .. math:: n \sim \mathrm{Beta}(\alpha, \beta), \qquad
        \log \pi = \sum_{\text{drawn elements}} (\alpha - 1) \log n + (\beta - 1) \log (1 - n)
        - \log B(\alpha, \beta)

    A sum, one number an image. n is a constant in it; :math:`\alpha, \beta` get the gradient. n is
    first clamped to [1e-6, 1 - 1e-6].

    Args:
        dist: law of ``[B, C, h, w]``, as :class:`BetaNoisePolicy` gives it.
        size: of the image, (H, W) or one side.
        mode: how the mask is enlarged: ``"nearest"``, ``"bilinear"``, or ``"block"``: nearest, but
            only to multiples of h and w, so that every element covers equally many pixels.
        pathwise: let the gradient through the mask reach the law as well (``rsample``). Not
            together with the score function: that would count the reward twice.
        generator: generator of torch's gamma sampler; not inside ``torch.compile``.

    Returns:
        ``(mask, log_prob)``: ``[B, C, H, W]`` and ``[B]``.

    Raises:
        TypeError: ``dist`` is not a Beta law.
        ValueError: it is not of shape ``[B, C, h, w]``, has a concentration that is not positive
            (looked for on a CPU only), or ``mode`` or ``size`` does not fit.

    Example:
        >>> law = BetaNoisePolicy(3)(torch.randn(2, 3, 32, 32))
        >>> mask, log_prob = sample_noise_mask(law, (32, 32))
        >>> mask.shape, log_prob.shape, log_prob.requires_grad, mask.requires_grad
        (torch.Size([2, 1, 32, 32]), torch.Size([2]), True, False)

    Source:
        As :class:`BetaNoisePolicy`; masks drawn at a lower resolution are reconstructed.
    """
    check_one_of("mode", mode, _MODES)
    alpha, beta = _concentrations(dist)
    height, width = (size, size) if isinstance(size, int) else size
    check_at_least("size", min(height, width), 1)
    if mode == "block" and (height % alpha.shape[2] or width % alpha.shape[3]):
        raise ValueError(
            f"size must be a multiple of the mask's {list(alpha.shape[2:])} with mode='block', "
            f"got {[height, width]}"
        )
    if not pathwise:
        with torch.no_grad():
            n = _draw(alpha, beta, generator)
    else:
        n = _draw(alpha, beta, generator)
    log_prob = dist.log_prob(n.detach().clamp(_EDGE, 1 - _EDGE)).flatten(1).sum(1)
    how = "bilinear" if mode == "bilinear" else "nearest"
    return F.interpolate(n, (height, width), mode=how), log_prob


def _concentrations(dist: Beta) -> tuple[Tensor, Tensor]:
    if not isinstance(dist, Beta):
        raise TypeError(f"dist must be a torch.distributions.Beta, got {type(dist).__name__}")
    alpha, beta = dist.concentration1, dist.concentration0
    check_shape("dist", alpha, (None, None, None, None), "[B, C, h, w]")
    for concentration in (alpha, beta):
        found = known_range(concentration)
        if found is not None and not found[0] > 0:
            raise ValueError(f"dist must have positive concentrations, got {found[0]}")
    return alpha, beta


def _draw(alpha: Tensor, beta: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw from Beta as a ratio of gammas, which unlike ``Beta.sample`` takes a generator."""
    least = torch.finfo(alpha.dtype).tiny
    a, b = (torch._standard_gamma(c, generator=generator).clamp(min=least) for c in (alpha, beta))
    return a / (a + b)


def apply_noise_mask(
    x: Tensor,
    mask: Tensor,
    *,
    kind: Literal["multiply", "add"] = "multiply",
    scale: float = 1.0,
) -> Tensor:
    r"""Put a mask on images.

    .. math:: \tilde x = x \odot n \quad (\text{"multiply"}), \qquad
        \tilde x = x + \text{scale}\, (2 n - 1) \quad (\text{"add"})

    Args:
        x: ``[B, C, H, W]``.
        mask: ``[B, 1, H, W]`` or ``[B, C, H, W]``, values in [0, 1]; cast to the dtype of ``x``.
        kind: ``"multiply"`` or ``"add"``.
        scale: strength of ``"add"``, in units of ``x``, at least 0.

    Returns:
        The shape and dtype of ``x``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: shapes do not fit, ``kind`` is unknown or ``scale`` below 0.

    Example:
        >>> apply_noise_mask(torch.ones(1, 1, 1, 2), torch.tensor([[[[0.25, 1.0]]]]))
        tensor([[[[0.2500, 1.0000]]]])

    Source:
        As :class:`BetaNoisePolicy`; both kinds are reconstructed.
    """
    check_floating("x", x)
    check_floating("mask", mask)
    check_one_of("kind", kind, ("multiply", "add"))
    check_not_negative("scale", scale)
    check_shape("x", x, (None, None, None, None), "[B, C, H, W]")
    check_shape("mask", mask, (x.shape[0], None, *x.shape[2:]), "[B, 1 or C, H, W] of x")
    if mask.shape[1] not in (1, x.shape[1]):
        raise ValueError(f"mask must have 1 channel or those of x, got {mask.shape[1]}")
    mask = mask.to(x.dtype)
    return x * mask if kind == "multiply" else x + scale * (2 * mask - 1)


class EMABaseline(nn.Module):
    r"""The mean reward of the past, forgotten exponentially: a baseline for REINFORCE.

    .. math:: m \leftarrow \mu m + (1 - \mu)\, \tfrac1B \sum_b R_b

    A call returns m as it was before: the current rewards must not enter their own baseline. The
    first call has no past and returns the batch mean.

    Args:
        momentum: :math:`\mu`, in [0, 1).

    Raises:
        ValueError: ``momentum`` is out of range.

    Example:
        >>> baseline = EMABaseline(0.5)
        >>> [baseline(torch.tensor([r])).item() for r in (4.0, 0.0, 0.0)]
        [4.0, 4.0, 2.0]

    Source:
        The usual baseline of R. Williams, "Simple statistical gradient-following algorithms for
        connectionist reinforcement learning", 1992; which one the paper uses is not known.
    """

    mean: Tensor
    started: Tensor

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        check_fraction("momentum", momentum)
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def forward(self, reward: Tensor) -> Tensor:
        """Return the mean of the past; take in the rewards ``[B]``."""
        now = reward.detach().mean().to(self.mean.dtype)
        before = torch.where(self.started, self.mean, now)
        self.mean.copy_(before + (1 - self.momentum) * (now - before))
        self.started.fill_(True)
        return before

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return f"momentum={self.momentum:g}"


def reinforce_loss(
    log_prob: Tensor,
    reward: Tensor,
    *,
    baseline: Baseline = "batch_mean",
    entropy: Tensor | None = None,
    entropy_weight: float = 0.0,
) -> Tensor:
    r"""Return the loss whose gradient is the score-function estimate: REINFORCE.

    .. math:: L = -\frac1B \sum_b (R_b - \text{base}_b)\, \log \pi_b - \lambda H

    Only :math:`\log \pi` and H get gradients. A minimiser of L raises the reward.

    Args:
        log_prob: ``[B]``, differentiable in the policy.
        reward: ``[B]``, constants.
        baseline: what is subtracted from the reward to lower the variance: ``"batch_mean"`` (whose
            gradient is 1 - 1/B of the unbiased one), ``"leave_one_out"`` (the mean of the others,
            unbiased), a tensor that broadcasts against ``reward``, a callable of the reward
            such as :class:`EMABaseline`, or None.
        entropy: of the policy, ``[B]`` or without dimensions; its mean is H.
        entropy_weight: :math:`\lambda`, at least 0.

    Returns:
        The loss, with no dimensions.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: shapes differ, the reward requires grad (detach it, so that it is clear where
            the gradient ends) or holds a NaN (looked for on a CPU only), ``"leave_one_out"``
            with one image, ``entropy_weight`` without ``entropy``.

    Example:
        >>> log_prob = torch.tensor([-1.0, -2.0], requires_grad=True)
        >>> reinforce_loss(log_prob, torch.tensor([1.0, 3.0])).backward()
        >>> log_prob.grad
        tensor([ 0.5000, -0.5000])

    Source:
        R. Williams, 1992; used so by "Policy Gradient-Driven Noise Mask", 2024, arXiv 2406.14568.
        The baseline is reconstructed.
    """
    check_floating("log_prob", log_prob)
    check_shape("log_prob", log_prob, (None,), "[B]")
    check_floating("reward", reward)
    check_shape("reward", reward, (log_prob.shape[0],), "[B] of log_prob")
    check_not_negative("entropy_weight", entropy_weight)
    if reward.requires_grad:
        raise ValueError("reward must not require grad: detach it")
    found = known_range(reward)
    if found is not None and found[0] != found[0]:
        raise ValueError("reward must not hold NaN")
    loss = -((reward - _baseline(baseline, reward)) * log_prob).mean()
    if entropy_weight == 0:
        return loss
    if entropy is None:
        raise ValueError("entropy must be given where entropy_weight is above 0")
    return loss - entropy_weight * entropy.mean()


def _baseline(baseline: Baseline, reward: Tensor) -> Tensor | float:
    if baseline is None:
        return 0.0
    if isinstance(baseline, Tensor):
        return baseline.detach()
    if not isinstance(baseline, str):
        return baseline(reward).detach()
    check_one_of("baseline", baseline, _BASELINES)
    if baseline == "batch_mean":
        return reward.mean()
    if reward.shape[0] < 2:
        raise ValueError("baseline must not be 'leave_one_out' with one image: nothing is left")
    return (reward.sum() - reward) / (reward.shape[0] - 1)


def noise_mask_step(
    classifier: nn.Module,
    policy: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    reward: Literal["neg_ce", "prob"] = "neg_ce",
    estimator: Literal["reinforce", "pathwise"] = "reinforce",
    kind: Literal["multiply", "add"] = "multiply",
    scale: float = 1.0,
    mode: Mode = "nearest",
    baseline: Baseline = "batch_mean",
    entropy_weight: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    r"""Return the losses of classifier and policy on one batch of images with learned noise.

    .. math:: L_f = \frac1B \sum_b \mathrm{CE}(f(\tilde x_b), y_b), \qquad
        L_\pi = \text{REINFORCE with } R_b = -\mathrm{CE}_b \text{ or } f(\tilde x_b)_{y_b}

    The mask is a constant for the classifier and the reward one for the policy: each loss has
    gradients in its own network alone, so ``(classifier_loss + policy_loss).backward()`` is right.
    A phase of pre-training; drop the policy for fine-tuning and inference. With either network in
    ``eval()`` the images stay as they are and the policy is not called.

    Args:
        classifier: from ``[B, C, H, W]`` to logits ``[B, classes]``.
        policy: from ``[B, C, H, W]`` to a Beta law ``[B, 1, h, w]``.
        x: images ``[B, C, H, W]``.
        y: int64 ``[B]``.
        reward: ``"neg_ce"`` or ``"prob"``, the probability of the true class.
        estimator: ``"reinforce"``, or ``"pathwise"``: the policy lowers the cross-entropy by the
            gradient through the mask, at the price of a second backward pass to the input
            (``reward``, ``baseline`` are not used then).
        kind: as for :func:`apply_noise_mask`.
        scale: likewise.
        mode: as for :func:`sample_noise_mask`.
        baseline: as for :func:`reinforce_loss`.
        entropy_weight: likewise.
        generator: as for :func:`sample_noise_mask`.

    Returns:
        ``(classifier_loss, policy_loss, info)``; info holds, detached, ``logits`` and, where noise
        was drawn, ``mask``, ``log_prob``, ``reward`` and ``entropy``.

    Raises:
        TypeError: as the functions above.
        ValueError: likewise, or an unknown name.

    Example:
        >>> classifier = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
        >>> policy = BetaNoisePolicy(3)
        >>> optimizers = [
        ...     torch.optim.SGD(classifier.parameters(), lr=0.1),
        ...     torch.optim.Adam(policy.parameters(), lr=1e-4),
        ... ]
        >>> images, labels = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
        >>> classifier_loss, policy_loss, info = noise_mask_step(
        ...     classifier, policy, images, labels
        ... )
        >>> (classifier_loss + policy_loss).backward()
        >>> for optimizer in optimizers:
        ...     optimizer.step()

    Source:
        "Policy Gradient-Driven Noise Mask", 2024, arXiv 2406.14568, after the abstract; the reward
        is named there. What is not in the abstract is reconstructed.
    """
    check_one_of("reward", reward, ("neg_ce", "prob"))
    check_one_of("estimator", estimator, ("reinforce", "pathwise"))
    if not (classifier.training and policy.training):
        logits = classifier(x)
        loss = F.cross_entropy(logits, y)
        return loss, torch.zeros_like(loss), {"logits": logits.detach()}
    dist = policy(x)
    pathwise = estimator == "pathwise"
    drawn, log_prob = sample_noise_mask(
        dist, (x.shape[2], x.shape[3]), mode=mode, pathwise=pathwise, generator=generator
    )
    mask = drawn.detach().requires_grad_(pathwise)
    logits = classifier(apply_noise_mask(x, mask, kind=kind, scale=scale))
    losses = F.cross_entropy(logits, y, reduction="none")
    classifier_loss = losses.mean()
    gain = -losses.detach()
    if reward == "prob":
        gain = gain.exp()
    entropy = dist.entropy().flatten(1).sum(1)
    if pathwise:
        (slope,) = torch.autograd.grad(classifier_loss, mask, retain_graph=True)
        # The value of the cross-entropy with the gradient of the chain rule through the mask.
        change = (slope * drawn).sum()
        policy_loss = classifier_loss.detach() + change - change.detach()
        policy_loss = policy_loss - entropy_weight * entropy.mean()
    else:
        policy_loss = reinforce_loss(
            log_prob, gain, baseline=baseline, entropy=entropy, entropy_weight=entropy_weight
        )
    info = {
        "logits": logits,
        "mask": mask,
        "log_prob": log_prob,
        "reward": gain,
        "entropy": entropy,
    }
    return classifier_loss, policy_loss, {name: value.detach() for name, value in info.items()}
