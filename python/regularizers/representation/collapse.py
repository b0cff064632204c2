"""Meters of representation collapse: how much embeddings of different samples differ."""

from __future__ import annotations

import torch
from torch import Tensor

from regularizers._shared.checks import check_at_least, check_floating
from regularizers._shared.randomness import draw_seed
from regularizers.ops.philox import philox_words

_GRID = 100


@torch.no_grad()
def collapse_metrics(
    z: Tensor,
    *,
    num_pairs: int = 20,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    r"""Measure how much the embeddings of different samples differ.

    .. math::
        \mathrm{intra} = \operatorname{mean}_{d,e} \operatorname{var}_i z_{ide}, \qquad
        \mathrm{inter} = \operatorname{var}_{i,e} \operatorname{mean}_d z_{ide}, \qquad
        \mathrm{euclidean} = \operatorname{mean}_{ij} \|z_i - z_j\|, \qquad
        \mathrm{kl} = \operatorname{mean}_{ij} KL(p_i \| p_j)

    Pairs ij are drawn at random; :math:`p_i` is the distribution of the values of sample i, a
    kernel density estimate (Scott's bandwidth) on 100 points over the range of both samples. An
    encoder that has collapsed gives every sample the same: intra, euclidean and kl are 0.

    Args:
        z: embeddings ``[n, D, E]`` of n samples, two or more.
        num_pairs: number of pairs, at least 1.
        seed: of the pairs: int or int64 tensor with no dimensions; drawn from the default generator
            when omitted.
        generator: generator to draw the seed from.

    Returns:
        ``{"intra_feature_variance", "inter_feature_variance", "euclidean", "kl"}``, float64 tensors
        with no dimensions, without gradient.

    Raises:
        TypeError: ``z`` is not a floating-point tensor.
        ValueError: ``z`` is of the wrong shape, or ``num_pairs`` is below 1.

    Example:
        >>> z = torch.randn(64, 5, 8)
        >>> collapse_metrics(z[:1].expand_as(z))["intra_feature_variance"]
        tensor(0., dtype=torch.float64)
        >>> bool(collapse_metrics(z)["euclidean"] > 5)
        True

    Source:
        H. Thimonier et al., "T-JEPA: Augmentation-Free Self-Supervised Learning for Tabular Data",
        ICLR 2025, arXiv 2410.05016; authors' code read, its names and its order of means and
        variances. There each density has a grid of its own, which hides a shift, and a pair may be
        one sample twice.
    """
    check_floating("z", z)
    check_at_least("num_pairs", num_pairs, 1)
    if z.dim() != 3 or z.shape[0] < 2 or z.numel() == 0:
        raise ValueError(f"z must have shape [samples >= 2, features, dim], got {list(z.shape)}")
    wide = z.double()
    words = philox_words(draw_seed(seed, generator, z), 2 * num_pairs).view(2, -1)
    first = (words[0] * len(z)) >> 32
    second = (first + 1 + ((words[1] * (len(z) - 1)) >> 32)) % len(z)  # another sample than first
    a, b = wide.flatten(1)[first], wide.flatten(1)[second]
    return {
        "intra_feature_variance": wide.var(0, correction=0).mean(),
        "inter_feature_variance": wide.mean(1).var(correction=0),
        "euclidean": (a - b).norm(dim=1).mean(),
        "kl": _divergence(a, b).mean(),
    }


def _divergence(a: Tensor, b: Tensor) -> Tensor:
    """Return KL between the densities of the values ``[pairs, values]`` of two samples."""
    both = torch.cat([a, b], dim=1)
    low, high = both.amin(1, keepdim=True), both.amax(1, keepdim=True)
    steps = torch.linspace(0, 1, _GRID, dtype=both.dtype, device=both.device)
    grid = low + (high - low) * steps
    p, q = (_density(values, grid, (high - low) / _GRID) for values in (a, b))
    return (p * (p.log() - q.log())).sum(1)


def _density(values: Tensor, grid: Tensor, finest: Tensor) -> Tensor:
    """Return a kernel density estimate on a grid, adding up to 1 and nowhere quite 0."""
    count = values.shape[1]
    deviation = values.std(1, keepdim=True) if count > 1 else torch.zeros_like(finest)
    # Never finer than the grid: equal values have no bandwidth of their own.
    bandwidth = torch.maximum(deviation * count**-0.2, finest).clamp(min=1e-300)
    density = torch.zeros_like(grid)
    for part in values.split(4096, dim=1):  # bounds the memory, [pairs, values, grid]
        distance = (grid[:, None, :] - part[:, :, None]) / bandwidth[..., None]
        density += torch.exp(-distance.square() / 2).sum(1)
    density = density.clamp(min=1e-12)
    return density / density.sum(1, keepdim=True)
