"""The nearest point of a bank, with a squared distance that has a derivative."""

from __future__ import annotations

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_floating,
    check_same_device,
    check_same_dtype,
    check_shape,
)
from regularizers.ops._operator import accumulate_dtype, autocast_dtype
from regularizers.ops.code_search import nearest_code, sample_code

# A draw of `sample_code` this cold is the nearest other code: what is added to a squared distance
# is at most some 16 times it.
_COLD = 1e-30


def nearest_neighbour(x: Tensor, bank: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Find the nearest point of a bank and the squared distance to it, without all distances.

    .. math::
        j(i) = \operatorname{argmin}_j \|x_i - b_j\|^2, \qquad
        \text{squared distance}_i = \|x_i - b_{j(i)}\|^2

    The index is that of :func:`nearest_code`: of points whose distances differ by less than the
    rounding of a product, any. The distance to the point that was found is then computed from
    differences, so that it has all its digits, and is differentiable in ``x`` and ``bank``, any
    number of times. For the largest cosine normalise both first: of unit vectors the squared
    distance is :math:`2 - 2 \cos`.

    Args:
        x: points ``[*, D]``; float32, float64, bfloat16 or float16. ``[N, D]`` without a bank.
        bank: ``[M, D]``, at least one point, finite; dtype of ``x`` (outside of autocast). None
            for the other points of ``x``, of which there are at least two: the nearest one that is
            not the point itself.

    Returns:
        The squared distance of every point to its nearest, ``[*]`` (float32 for half types), and
        the index of that, int64 ``[*]``. A point that is not finite gets index 0, and its distance
        is what the difference gives.

    Raises:
        TypeError: an argument is no floating-point tensor, or the dtypes differ.
        ValueError: a shape does not fit; on a CPU also: the bank is not finite.

    Example:
        >>> bank = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> nearest_neighbour(torch.tensor([[0.5, 2.0]]), bank)
        (tensor([0.2500]), tensor([2]))
        >>> nearest_neighbour(bank)
        (tensor([1., 1., 4.]), tensor([1, 0, 0]))

    Source:
        Exact; the search of :func:`nearest_code`, and for the others of a batch that of
        :func:`sample_code` at a temperature near 0.
    """
    check_floating("x", x)
    if bank is None:
        if x.dim() != 2 or x.shape[0] < 2:
            raise ValueError("x must have shape [N, D] with N of at least 2 where bank is None")
        bank = x
        place = torch.arange(x.shape[0], device=x.device)
        index = sample_code(place, x, temperature=_COLD, seed=0)
    else:
        _check_bank(x, bank)
        index = nearest_code(x, bank)
    dtype = accumulate_dtype(torch.promote_types(x.dtype, bank.dtype))
    nearest = bank.index_select(0, index.flatten()).reshape(x.shape)
    squares = (x.to(dtype) - nearest.to(dtype)).square().sum(-1)
    return squares, index


def _check_bank(x: Tensor, bank: Tensor) -> None:
    check_floating("bank", bank)
    if x.dim() == 0:
        raise ValueError("x must have shape [*, D], got []")
    check_shape("bank", bank, (None, x.shape[-1]), "[points, features of x]")
    if bank.shape[0] < 1:
        raise ValueError("bank must have at least one point")
    if autocast_dtype(x.device) is None:
        check_same_dtype("bank", bank, "x", x)
    check_same_device("bank", bank, "x", x)
