"""Watermarks: the game of embedding and extracting under attack, and what is measured."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_not_negative,
    check_probability,
    check_shape,
    check_values,
)
from regularizers.mixing.compositional_adversary import CATStep, CompositionalAdversary, cat_step


def watermark_step(
    embedder: Callable[[Tensor, Tensor], Tensor],
    extractor: Callable[[Tensor], Tensor],
    adversary: CompositionalAdversary,
    x: Tensor,
    message: Tensor,
    *,
    imperceptibility_weight: float = 1.0,
    entropy_weight: float = 0.02,
    generator: torch.Generator | None = None,
) -> CATStep:
    r"""Embed a message, attack the image, extract the message: the game of watermarking.

    .. math:: L = \mathrm{BCE}(\mathrm{extract}(x_{S+1}), m), \qquad
        \text{defender: } L + \mu\, \mathrm{mean}\,(\mathrm{embed}(x, m) - x)^2

    Args:
        embedder: ``embedder(x, message)`` gives marked images of the shape of ``x``.
        extractor: ``extractor(image)`` gives a logit a bit, ``[B, m]``.
        adversary: the adversary.
        x: images ``[B, *]``.
        message: bits 0 or 1, ``[B, m]``, any dtype.
        imperceptibility_weight: :math:`\mu`, at least 0.
        entropy_weight: as in :func:`~regularizers.mixing.cat_step`.
        generator: as for the adversary.

    Returns:
        :class:`~regularizers.mixing.CATStep`; ``loss`` has the imperceptibility term,
        ``defender_loss`` has not.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a weight is negative or a shape is wrong.

    Example:
        >>> from regularizers.mixing import CompositionalAdversary, default_families
        >>> adversary = CompositionalAdversary(default_families(), num_steps=1)
        >>> extractor = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
        >>> embedder = lambda x, message: x + 0.1 * message.mean(1)[:, None, None, None]
        >>> message = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
        >>> step = watermark_step(embedder, extractor, adversary, torch.rand(1, 3, 8, 8), message)
        >>> step.loss.backward()

    Source:
        As :class:`~regularizers.mixing.CompositionalAdversary`; the objective is the common one,
        reconstructed.
    """
    check_not_negative("imperceptibility_weight", imperceptibility_weight)
    marked = embedder(x, message)
    check_shape("the result of embedder", marked, tuple(x.shape), "that of x")

    def recover(attacked: Tensor) -> Tensor:
        logits = extractor(attacked)
        check_shape("the result of extractor", logits, tuple(message.shape), "that of message")
        return F.binary_cross_entropy_with_logits(logits, message.to(logits.dtype))

    step = cat_step(adversary, marked, recover, entropy_weight=entropy_weight, generator=generator)
    return step._replace(loss=step.loss + imperceptibility_weight * F.mse_loss(marked, x))


def bit_accuracy(logits: Tensor, message: Tensor) -> Tensor:
    """Return the share of bits that a logit has the sign of.

    Args:
        logits: ``[*, m]``.
        message: bits 0 or 1, the same shape, any dtype.

    Returns:
        ``[*]``, one share a message.

    Raises:
        TypeError: ``logits`` is no floating-point tensor.
        ValueError: the shapes differ.

    Example:
        >>> bit_accuracy(torch.tensor([[2.0, -1.0, 0.5, 3.0]]), torch.tensor([[1, 0, 0, 1]]))
        tensor([0.7500])

    Source:
        The common metric of watermarking.
    """
    check_floating("logits", logits)
    check_shape("message", message, tuple(logits.shape), "that of logits")
    return ((logits > 0) == (message > 0.5)).to(torch.get_default_dtype()).mean(-1)


def watermark_capacity(accuracy: float | Tensor, num_bits: int) -> Tensor:
    r"""Return the bits that a channel with this bit accuracy carries.

    .. math:: C = m (1 - H_2(1 - \mathrm{acc})), \qquad
        H_2(p) = -p \log_2 p - (1 - p) \log_2 (1 - p)

    Args:
        accuracy: share of right bits, in [0, 1]; a number or ``[*]``.
        num_bits: m, at least 1.

    Returns:
        ``[*]``, in [0, m].

    Raises:
        TypeError: ``num_bits`` is no int.
        ValueError: an argument is out of range.

    Example:
        >>> watermark_capacity(torch.tensor([1.0, 0.9, 0.5]), 64)
        tensor([64.0000, 33.9843,  0.0000])

    Source:
        C. Shannon, 1948: the binary symmetric channel.
    """
    check_at_least("num_bits", num_bits, 1)
    share = torch.as_tensor(accuracy, dtype=torch.get_default_dtype())
    check_values(
        ((share >= 0) & (share <= 1)).all(), lambda: f"accuracy must lie in [0, 1], got {accuracy}"
    )
    entropy = -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share))
    return num_bits * (1 - entropy / torch.log(torch.tensor(2.0)).to(entropy)).clamp(min=0)


def detection_rate(
    marked: Tensor, unmarked: Tensor, *, false_positive_rate: float = 0.01
) -> Tensor:
    """Return the share of marked images found, at a rate of false alarms (TPR at FPR 1 %).

    The threshold is the lowest one above which at most that share of the unmarked scores lies.

    Args:
        marked: detection scores of marked images ``[n]``, such as bit accuracies.
        unmarked: of unmarked images ``[m]``, at least one; few of them make a coarse threshold.
        false_positive_rate: in [0, 1].

    Returns:
        A tensor with no dimensions.

    Raises:
        TypeError: a score is no floating-point tensor.
        ValueError: there is no score, or the rate is out of range.

    Example:
        >>> detection_rate(torch.tensor([0.5, 0.8, 0.9, 1.0]), torch.linspace(0, 0.7, 200))
        tensor(0.7500)

    Source:
        The common metric of watermarking.
    """
    check_probability("false_positive_rate", false_positive_rate)
    for name, scores in (("marked", marked), ("unmarked", unmarked)):
        check_floating(name, scores)
        if scores.numel() == 0:
            raise ValueError(f"{name} must have at least one score, got none")
    ranked = unmarked.flatten().sort(descending=True).values
    allowed = int(false_positive_rate * ranked.numel())
    if allowed >= ranked.numel():
        return torch.ones((), device=marked.device)
    return (marked > ranked[allowed]).to(torch.get_default_dtype()).mean()
