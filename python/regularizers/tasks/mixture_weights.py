"""How often to draw from each of several data sets of unequal size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def temperature_mixture_weights(
    sizes: Sequence[float] | Tensor, temperature: float = 1.0
) -> Tensor:
    r"""Return the sampling weights of data sources, from proportional to uniform.

    .. math:: w_i = \frac{n_i^{1/\tau}}{\sum_j n_j^{1/\tau}}

    Sources are drawn with :math:`w_i`; within a source, all samples alike. At :math:`\tau = 1`
    every sample of the union is equally likely, at :math:`\tau = \infty` every source.

    Args:
        sizes: n: sizes of the sources ``[S]``, above 0 (samples, hours, tokens).
        temperature: tau, above 0; ``math.inf`` for equal weights.

    Returns:
        ``[S]``, adding up to 1; dtype of a floating-point tensor of sizes, else the default one.

    Raises:
        TypeError: ``sizes`` are not numbers.
        ValueError: a size or ``temperature`` is not above 0, or there is no source.

    Example:
        >>> temperature_mixture_weights([100, 1])
        tensor([0.9901, 0.0099])
        >>> temperature_mixture_weights([100, 1], temperature=2)
        tensor([0.9091, 0.0909])
        >>> temperature_mixture_weights([100, 1], temperature=float("inf"))
        tensor([0.5000, 0.5000])

    Source:
        "Rethinking Visual-Language-Action Model Scaling: Alignment, Mixture, and Regularization",
        2026, arXiv 2602.09722, studies mixtures of robot data; the formula is the usual one of
        multilingual training (N. Arivazhagan et al., 2019, arXiv 1907.05019), reconstructed.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    n = torch.as_tensor(sizes)
    if n.dtype == torch.bool or n.is_complex():
        raise TypeError(f"sizes must be numbers, got {n.dtype}")
    if n.dim() != 1 or len(n) < 1:
        raise ValueError(f"sizes must have shape [sources >= 1], got {list(n.shape)}")
    dtype = n.dtype if n.is_floating_point() else torch.get_default_dtype()
    # In logarithms: sizes to a high power would overflow.
    logarithms = n.double().log()
    if not bool((n > 0).all() & logarithms.isfinite().all()):
        raise ValueError(f"sizes must be above 0 and finite, got {n.tolist()}")
    return (logarithms / temperature).softmax(0).to(dtype)
