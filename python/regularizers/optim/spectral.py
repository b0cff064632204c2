"""Newton-Schulz orthogonalisation, singular values without decomposition; meters of spectra."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regularizers._shared.checks import (
    FLOATING,
    check_at_least,
    check_floating,
    check_not_negative,
)
from regularizers.ops._operator import accumulate_dtype

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(
    G: Tensor,
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = 1e-7,
    dtype: torch.dtype | None = torch.bfloat16,
) -> Tensor:
    r"""Push all singular values of matrices near 1, by matrix products alone.

    .. math::
        X_0 = \frac{G}{\lVert G \rVert_F + \epsilon}, \qquad
        A = X X^\top, \qquad X \leftarrow a X + (b A + c A^2) X

    With :math:`G = U \Sigma V^\top` the result is near :math:`U V^\top`, the direction D of largest
    :math:`\langle G, D \rangle` among all with spectral norm 1, but not equal to it: the default
    coefficients give up convergence for speed, and five steps take a singular value that was at
    least 0.01 of the Frobenius norm to between 0.68 and 1.14 (none ever beyond 1.21). Tall
    matrices are transposed meanwhile, so that the Gram matrix A is of the smaller side.

    Args:
        G: ``[..., m, n]``, floating point; each matrix is normalised by its own norm.
        steps: iterations, at least 1.
        coefficients: (a, b, c).
        eps: :math:`\epsilon`, at least 0; a matrix of zeros stays zero where it is above 0.
        dtype: what to multiply in; None for the dtype of ``G``, float32 for half types. With the
            default, bfloat16, the result is off by some 3 % in Frobenius norm.

    Returns:
        ``[..., m, n]``, in the dtype of ``G``. Differentiable.

    Raises:
        TypeError: ``G`` is not a floating-point tensor.
        ValueError: ``G`` has fewer than two dimensions, or an option is out of its range.

    Example:
        >>> newton_schulz(torch.diag(torch.tensor([3.0, 0.1])), dtype=None)
        tensor([[0.6970, 0.0000],
                [0.0000, 1.1288]])

    Source:
        K. Jordan and others, 2024, github.com/KellerJordan/Muon, which this follows; studied in
        arXiv 2509.24406. Norms are taken in float32 here, in bfloat16 there.
    """
    check_floating("G", G)
    if G.dim() < 2:
        raise ValueError(f"G must have at least two dimensions, got {list(G.shape)}")
    check_at_least("steps", steps, 1)
    check_not_negative("eps", eps)
    check_coefficients("coefficients", coefficients)
    if dtype is not None and dtype not in FLOATING:
        raise TypeError(f"dtype must be a floating-point type, got {dtype}")
    if G.numel() == 0:
        return G.clone()
    stack = normalised(G.reshape(-1, *G.shape[-2:]), eps, dtype or accumulate_dtype(G.dtype))
    result = iterate(stack, steps, coefficients)
    return (result.mT if G.shape[-2] > G.shape[-1] else result).reshape(G.shape).to(G.dtype)


def normalised(stack: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return matrices ``[k, m, n]`` of Frobenius norm 1, lying down: ``[k, small, large]``."""
    wide = stack.to(accumulate_dtype(stack.dtype))
    norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
    flat: Tensor = (wide / (norm + eps)).to(dtype)
    return flat.mT if flat.shape[-2] > flat.shape[-1] else flat


def iterate(X: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """Return the iteration of matrices ``[k, m, n]``, three products a step for all together."""
    a, b, c = coefficients
    if len(X) == 1:  # one large matrix: the plain product has the better kernels
        Y = X[0]
        for _ in range(steps):
            A = Y @ Y.mT
            Y = torch.addmm(Y, torch.addmm(A, A, A, beta=b, alpha=c), Y, beta=a)
        return Y.unsqueeze(0)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


def spectral_stats(W: Tensor) -> dict[str, Tensor]:
    r"""Return what singular values say about matrices: the meters of the spectral claim.

    .. math::
        \sigma_{\max}, \quad \sigma_{\min}, \quad
        \text{stable rank } \lVert W \rVert_F^2 / \sigma_{\max}^2, \quad
        \text{condition } \sigma_{\max} / \sigma_{\min}

    By a full singular value decomposition: for logging, not for every step.

    Args:
        W: ``[..., m, n]``, floating point, not empty; flatten filters first.

    Returns:
        ``sigma_max``, ``sigma_min``, ``stable_rank`` and ``condition``, each ``[...]``, float32
        (float64 for float64). The stable rank of a matrix of zeros is 0, the condition of a
        singular one ``inf``.

    Raises:
        TypeError: ``W`` is not a floating-point tensor.
        ValueError: ``W`` has fewer than two dimensions, or its matrices are empty.

    Example:
        >>> spectral_stats(torch.diag(torch.tensor([2.0, 1.0])))["stable_rank"]
        tensor(1.2500)

    Source:
        Standard; used in arXiv 2509.24406 to compare optimizers.
    """
    check_floating("W", W)
    if W.dim() < 2 or 0 in W.shape[-2:]:
        raise ValueError(f"W must be matrices with elements, got {list(W.shape)}")
    sigma = torch.linalg.svdvals(W.detach().to(accumulate_dtype(W.dtype)))
    largest, smallest = sigma[..., 0], sigma[..., -1]
    share = (sigma / torch.where(largest > 0, largest, 1).unsqueeze(-1)).square().sum(-1)
    condition = torch.where(smallest > 0, largest / smallest, torch.inf)
    return {
        "sigma_max": largest,
        "sigma_min": smallest,
        "stable_rank": share,
        "condition": condition,
    }


def check_coefficients(name: str, value: Sequence[float]) -> None:
    """Raise unless ``value`` holds the three coefficients of the iteration."""
    if len(value) != 3:
        raise ValueError(f"{name} must be three numbers, got {len(value)}")
