"""Diagonal Gaussians: divergence from the standard normal, and draws that carry gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_standard_normal(
    mean: Tensor, *, log_variance: Tensor | None = None, std: Tensor | None = None
) -> Tensor:
    r"""Return the divergence of diagonal Gaussians from the standard normal, by component.

    .. math:: \tfrac12 \left( \mu^2 + \sigma^2 - 1 - \log \sigma^2 \right)

    Sum over the latent axis and average over the batch to get the usual term of a variational
    bound.

    Args:
        mean: :math:`\mu`, any shape.
        log_variance: :math:`\log \sigma^2`, broadcastable to ``mean``; or
        std: :math:`\sigma`, instead; its logarithm is guarded against underflow.
    """
    if (log_variance is None) == (std is None):
        raise ValueError("log_variance or std must be given, and not both")
    if log_variance is not None:
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    assert std is not None
    least = torch.finfo(std.dtype).tiny
    return 0.5 * (mean.square() + std.square() - 1) - std.clamp_min(least).log()


def reparameterize(
    mean: Tensor, std: Tensor | float, *, generator: torch.Generator | None = None
) -> Tensor:
    r"""Draw :math:`\mu + \sigma \varepsilon`; gradients reach the mean and the deviation."""
    noise = torch.empty_like(mean).normal_(generator=generator)
    return mean + std * noise
