"""Small-loss selection: which samples of a noisy batch two co-teaching networks pass on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regularizers._shared.checks import check_at_least, check_floating, check_fraction


def small_loss_select(losses: Tensor, forget_rate: float) -> Tensor:
    r"""Return the indices of the samples with the smallest losses.

    .. math:: |S| = \lfloor (1 - \tau)\, n \rfloor

    The count is that of real numbers: ``int((1 - 0.8) * 10)`` is 1 in floating point, here it is 2.

    Args:
        losses: ``[n]``, one loss a sample; NaN counts as largest.
        forget_rate: fraction :math:`\tau` of samples to leave out, in [0, 1).

    Returns:
        int64 ``[|S|]``, smallest loss first; of equal losses the first.

    Raises:
        TypeError: ``losses`` is not a floating-point tensor.
        ValueError: ``losses`` is not of shape ``[n]``, ``forget_rate`` is outside [0, 1), or
            nothing would be selected.

    Example:
        >>> small_loss_select(torch.tensor([3.0, 1.0, 2.0, 0.0]), 0.5)
        tensor([3, 1])

    Source:
        Co-teaching (B. Han et al., 2018, arXiv 1804.06872), as the code of arXiv 2206.13140 uses
        it; the count differs from that code by rounding alone.
    """
    check_floating("losses", losses)
    if losses.dim() != 1:
        raise ValueError(f"losses must have shape [n], got {list(losses.shape)}")
    check_fraction("forget_rate", forget_rate)
    count = math.floor(round((1 - forget_rate) * losses.shape[0], 9))
    if count == 0:
        raise ValueError(
            f"losses must hold so many samples that one is selected at forget_rate {forget_rate}, "
            f"got {losses.shape[0]}"
        )
    return torch.argsort(losses.detach(), stable=True)[:count]


def forget_rate_schedule(epoch: int, forget_rate: float = 0.2, n_gradual: int = 10) -> float:
    r"""Return the forget rate of an epoch: from 0 up to its final value, then constant.

    .. math:: \tau(e) = \tau \min\!\Big(1, \frac{e}{n_{\mathrm{gradual}} - 1}\Big)

    The end point belongs to the ramp: epoch ``n_gradual - 1`` has the full rate. A ramp of one
    epoch gives that epoch 0, none gives the full rate from the start.

    Args:
        epoch: the epoch e, counted from 0.
        forget_rate: the final rate :math:`\tau`, in [0, 1).
        n_gradual: epochs of the ramp, at least 0.

    Returns:
        The rate of the epoch.

    Raises:
        TypeError: ``epoch`` or ``n_gradual`` is not an int.
        ValueError: an argument is out of range.

    Example:
        >>> [forget_rate_schedule(epoch, 0.2, 3) for epoch in range(4)]
        [0.0, 0.1, 0.2, 0.2]

    Source:
        Co-teaching (B. Han et al., 2018, arXiv 1804.06872), with the end point of the code of
        arXiv 2206.13140, whose fine-tuning stage has ``n_gradual`` 0.
    """
    check_at_least("epoch", epoch, 0)
    check_fraction("forget_rate", forget_rate)
    check_at_least("n_gradual", n_gradual, 0)
    if epoch >= n_gradual:
        return forget_rate
    return forget_rate * epoch / (n_gradual - 1) if n_gradual > 1 else 0.0
