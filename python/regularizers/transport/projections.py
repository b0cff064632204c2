"""Projections on the simplex, on its sparse part, and on the sparse nonnegative vectors."""

from __future__ import annotations

from torch import Tensor

from regularizers.ops.sparse_projection import sparse_projection


def project_simplex(v: Tensor, z: float | Tensor = 1.0, *, dim: int = -1) -> Tensor:
    r"""Project on the simplex of size ``z`` along a dimension.

    .. math:: P(v) = \operatorname{argmin}_{t \ge 0,\; \sum_i t_i = z} \|t - v\|^2 = [v - \theta]_+

    A softmax with exact zeros (also known as sparsemax). Differentiable almost everywhere, in ``v``
    and in ``z``.

    Args:
        v: ``[*]``; float32, float64, bfloat16 or float16.
        z: sum of the result, at least 0; a number, a tensor with no dimensions, or one for each
            vector, with the shape of ``v`` without ``dim``.
        dim: the dimension along which to project.

    Returns:
        The shape and dtype of ``v``.

    Raises:
        TypeError: ``v`` is not a floating-point tensor.
        ValueError: ``z`` is negative, of the wrong shape or on another device; ``dim`` is no
            dimension of ``v``.

    Example:
        >>> import torch
        >>> project_simplex(torch.tensor([0.5, 1.0, 0.2]))
        tensor([0.2500, 0.7500, 0.0000])

    Source:
        C. Michelot, 1986; as used by M. Blondel, V. Seguy, A. Rolet, 2017, arXiv 1710.06276. The
        formula is classical; checked against POT.
    """
    return sparse_projection(v, z, dim=dim)


def project_sparse_simplex(v: Tensor, k: int, z: float | Tensor = 1.0, *, dim: int = -1) -> Tensor:
    r"""Project on the vectors of a simplex with at most ``k`` nonzeros.

    .. math:: P_k(v) = P\big(\mathrm{top}_k(v)\big) =
        \operatorname{argmin}_{t \ge 0,\; \sum_i t_i = z,\; \|t\|_0 \le k} \|t - v\|^2

    All but the k largest entries are masked *first*, then what is left is projected; projecting and
    then truncating would be another point. Of entries that tie at the k-th place the first count.

    Args:
        v: ``[*]``; float32, float64, bfloat16 or float16.
        k: nonzeros at most, at least 1; from the length of ``dim`` on, :func:`project_simplex`.
        z: sum of the result, at least 0, as for :func:`project_simplex`.
        dim: the dimension along which to project.

    Returns:
        The shape and dtype of ``v``. Differentiable where there is no tie at the k-th place.

    Raises:
        TypeError: ``v`` is not a floating-point tensor or ``k`` not an int.
        ValueError: ``k`` is below 1, or as for :func:`project_simplex`.

    Example:
        >>> import torch
        >>> project_sparse_simplex(torch.tensor([0.5, 0.4, 0.3]), 2)
        tensor([0.5500, 0.4500, 0.0000])

    Source:
        A. Kyrillidis, S. Becker, V. Cevher, C. Koch, 2013, arXiv 1206.1529; the formula is also in
        POT's ``projection_sparse_simplex`` and was checked against it.
    """
    return sparse_projection(v, z, k=k, dim=dim)


def project_sparse_nonneg(v: Tensor, k: int, *, dim: int = -1) -> Tensor:
    r"""Project on the nonnegative vectors with at most ``k`` nonzeros: top-k, then relu.

    .. math:: \operatorname{argmin}_{t \ge 0,\; \|t\|_0 \le k} \|t - v\|^2 = [\mathrm{top}_k(v)]_+

    Args:
        v: ``[*]``; float32, float64, bfloat16 or float16.
        k: nonzeros at most, at least 1.
        dim: the dimension along which to project.

    Returns:
        The shape and dtype of ``v``.

    Raises:
        TypeError: ``v`` is not a floating-point tensor or ``k`` not an int.
        ValueError: ``k`` is below 1, or ``dim`` is no dimension of ``v``.

    Example:
        >>> import torch
        >>> project_sparse_nonneg(torch.tensor([1.0, -1.0, 2.0, 0.5]), 2)
        tensor([1., 0., 2., 0.])

    Source:
        T. Liu, J. Puigcerver, M. Blondel, 2022, arXiv 2209.15466; the gradient of the dual's
        conjugate, up to the factor 1 / gamma.
    """
    return sparse_projection(v, None, k=k, dim=dim)
