"""What quantized weights cost to store: the lengths of Exp-Golomb codes, and the entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from regularizers._shared.checks import check_at_least, check_tensor


def exp_golomb_bits(q: Tensor, *, order: int = 0) -> Tensor:
    r"""Return the length of each integer's signed Exp-Golomb code.

    .. math::
        u = \begin{cases} 2q - 1 & q > 0 \\ -2q & q \le 0 \end{cases}, \qquad
        \text{bits} = 2\left\lfloor \log_2 (u + 2^k) \right\rfloor - k + 1

    The code of a heavy-tailed law needs no table; order k suits larger spreads.

    Args:
        q: ``[*]``, integers below :math:`2^{51}` in size, such as weights divided by a step and
            rounded.
        order: k, from 0 to 30.

    Returns:
        ``[*]``, int64: bits.

    Raises:
        TypeError: ``q`` does not hold integers.
        ValueError: ``order`` is out of its range.

    Example:
        >>> exp_golomb_bits(torch.tensor([0, 1, -1, 2, -3, 4, 8]))
        tensor([1, 3, 3, 5, 5, 7, 9])

    Source:
        J. Teuhola, 1978; the code of arXiv 2504.16968 and 2506.00486. The signed order is that of
        the video standards.
    """
    _check_integers(q)
    check_at_least("order", order, 0)
    if order > 30:
        raise ValueError(f"order must be at most 30, got {order}")
    k = q.long()
    u = torch.where(k > 0, 2 * k - 1, -2 * k)
    # frexp writes x as f 2^e with f in [1/2, 1): e - 1 is the floor of its logarithm, exactly.
    exponent = torch.frexp((u + 2**order).double()).exponent.long()
    return 2 * (exponent - 1) - order + 1


def entropy_bits(q: Tensor) -> Tensor:
    r"""Return the empirical entropy of integers: what an ideal code needs, in bits an entry.

    .. math:: H = -\sum_v \frac{n_v}{n} \log_2 \frac{n_v}{n}

    For samples of a law quantized with a small step it is the law's differential entropy in bits
    less the logarithm of the step.

    Args:
        q: ``[*]``, integers, at least one.

    Returns:
        A tensor with no dimensions, float32.

    Raises:
        TypeError: ``q`` does not hold integers.
        ValueError: ``q`` is empty.

    Example:
        >>> entropy_bits(torch.tensor([0, 0, 1, -1]))
        tensor(1.5000)

    Source:
        Textbook; the measure of arXiv 2506.00486.
    """
    _check_integers(q)
    if q.numel() == 0:
        raise ValueError(f"q must not be empty, got shape {list(q.shape)}")
    counts = q.unique(return_counts=True)[1]
    share = counts.double() / q.numel()
    bits: Tensor = (share * (1 / share).log2()).sum().float()
    return bits


def _check_integers(q: Tensor) -> None:
    check_tensor("q", q)
    if q.is_floating_point() or q.is_complex() or q.dtype == torch.bool:
        raise TypeError(f"q must hold integers, got {q.dtype}")
