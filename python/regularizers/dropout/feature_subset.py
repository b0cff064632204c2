"""Random subsets of features: what a table's encoder sees, and what is to be predicted from it."""

from __future__ import annotations

import torch
from torch import Tensor

from regularizers._shared.checks import check_at_least
from regularizers._shared.randomness import draw_seed
from regularizers.dropout._random_subsets import random_order, random_words


def sample_feature_masks(
    batch: int,
    num_features: int,
    *,
    context_share: tuple[float, float] = (0.2, 0.4),
    target_share: tuple[float, float] = (0.2, 0.4),
    num_contexts: int = 1,
    num_targets: int = 4,
    match_reference: bool = False,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Draw context and target features of each sample; no feature is both.

    .. math:: n = n_{\min} + \operatorname{round}((n_{\max} - n_{\min})\, u), \qquad
        u \sim U[0, 1), \quad n_{\min, \max} = \operatorname{round}(\mathrm{share} \cdot D)

    once a batch for the contexts and once for the targets, drawn again until
    :math:`C n_{\mathrm{context}} + n_{\mathrm{target}} \le D`. Then, for each sample, C disjoint
    uniformly random contexts, and P targets, each a uniformly random subset of the features that no
    context has, independent of each other.

    Two sizes are read back from the device, so this is no function to compile: call it where
    batches are put together, and hand on the masks.

    Args:
        batch: B, number of samples.
        num_features: D, at least 3.
        context_share: smallest and largest share of the features in a context, in (0, 1).
        target_share: the same for a target.
        num_contexts: C, at least 1.
        num_targets: P, at least 1.
        match_reference: as the authors' code, whose P targets of a sample are one and the same
            (views of one array that is shuffled again for each).
        seed: int or int64 tensor with no dimensions; drawn from the default generator when omitted.
        generator: generator to draw the seed from.
        device: where the masks go.

    Returns:
        ``(contexts, targets)``: numbers of features, ascending, int64 ``[C, B, n_context]`` and
        ``[P, B, n_target]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, a share rounds to no feature or leaves no choice of
            size, or the smallest sizes do not fit into D.

    Example:
        >>> contexts, targets = sample_feature_masks(2, 10, num_targets=3, seed=1)
        >>> contexts.shape, targets.shape
        (torch.Size([1, 2, 4]), torch.Size([3, 2, 3]))
        >>> contexts[0, 0].tolist(), targets[:, 0].tolist()
        ([2, 6, 8, 9], [[0, 3, 7], [0, 5, 7], [0, 3, 4]])

    Source:
        H. Thimonier et al., "T-JEPA: Augmentation-Free Self-Supervised Learning for Tabular Data",
        ICLR 2025, arXiv 2410.05016; authors' code read.
    """
    check_at_least("batch", batch, 1)
    check_at_least("num_features", num_features, 3)
    check_at_least("num_contexts", num_contexts, 1)
    check_at_least("num_targets", num_targets, 1)
    context_sizes = _sizes("context_share", context_share, num_features)
    target_sizes = _sizes("target_share", target_share, num_features)
    least = num_contexts * context_sizes[0] + target_sizes[0]
    if least > num_features:
        raise ValueError(
            f"num_features must be at least {least} for {num_contexts} contexts of "
            f"{context_sizes[0]} and a target of {target_sizes[0]}, got {num_features}"
        )
    bits = draw_seed(seed, generator, torch.empty(0, device=device))
    num_context, num_target = _draw_sizes(
        bits, context_sizes, target_sizes, num_contexts, num_features
    )
    order = random_order(bits, batch, num_features)
    taken = num_contexts * num_context
    contexts = order[:, :taken].unflatten(1, (num_contexts, num_context)).transpose(0, 1)
    rest = order[:, taken:]
    different = 1 if match_reference else num_targets
    places = random_order(bits, different * batch, rest.shape[1], stream=1)[:, :num_target]
    targets = rest.expand(different, -1, -1).gather(2, places.unflatten(0, (different, batch)))
    return contexts.sort(-1).values, targets.sort(-1).values.expand(num_targets, -1, -1)


def _sizes(name: str, share: tuple[float, float], num_features: int) -> tuple[int, int]:
    least, most = share
    if not 0.0 < least < most < 1.0:
        raise ValueError(f"{name} must be two rising shares in (0, 1), got {share}")
    sizes = round(least * num_features), round(most * num_features)
    if sizes[0] < 1:
        raise ValueError(f"{name} must be at least one of {num_features} features, got {share}")
    if sizes[0] == sizes[1]:
        raise ValueError(
            f"{name} must leave a choice of sizes; {share} of {num_features} features is "
            f"{sizes[0]} both times"
        )
    return sizes


def _draw_sizes(
    bits: Tensor,
    context_sizes: tuple[int, int],
    target_sizes: tuple[int, int],
    num_contexts: int,
    num_features: int,
) -> tuple[int, int]:
    """Return the first pair of sizes, attempts in stream 2, that fits."""
    attempts = 16
    while True:
        pairs = random_words(bits, attempts, 2, stream=2)
        for first, second in (pairs.double() * 2.0**-32).tolist():
            num_context, num_target = (
                least + round((most - least) * u)
                for u, (least, most) in ((first, context_sizes), (second, target_sizes))
            )
            if num_contexts * num_context + num_target <= num_features:
                return num_context, num_target
        attempts *= 4
