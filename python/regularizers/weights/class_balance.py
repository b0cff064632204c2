"""Class weights for a loss, from how often the classes occur."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from regularizers._shared.checks import check_fraction, check_one_of, check_tensor


def class_balanced_weights(
    counts: Tensor, *, scheme: Literal["inverse", "effective"] = "inverse", beta: float = 0.999
) -> Tensor:
    r"""Return loss weights that make up for unequal classes.

    .. math::
        w_c = \frac{n / C}{n_c} \ \text{(inverse)}, \qquad
        w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}, \ \bar w = 1 \ \text{(effective)}

    for n samples in C classes. ``"inverse"`` gives every class the same total weight, n / C;
    ``"effective"`` lies between that (beta to 1) and equal weights (beta = 0).

    Args:
        counts: ``[C]``, samples of each class, above 0; integers or numbers.
        scheme: ``"inverse"`` or ``"effective"``.
        beta: in [0, 1); for ``"effective"``.

    Returns:
        ``[C]``, in the dtype of ``counts``, or the default one for integers; for the argument
        ``weight`` of ``F.cross_entropy``.

    Raises:
        TypeError: ``counts`` is not a tensor.
        ValueError: ``counts`` does not have one dimension or is not above 0, ``scheme`` is unknown
            or ``beta`` is outside [0, 1).

    Example:
        >>> class_balanced_weights(torch.tensor([100, 50, 50]))
        tensor([0.6667, 1.3333, 1.3333])

    Source:
        arXiv 2510.15527 weights its classes; the formula is reconstructed. ``"effective"`` is that
        of Y. Cui, M. Jia, T. Lin, Y. Song, S. Belongie, 2019, arXiv 1901.05555.
    """
    check_tensor("counts", counts)
    check_one_of("scheme", scheme, ("inverse", "effective"))
    check_fraction("beta", beta)
    if counts.dim() != 1 or counts.numel() == 0:
        raise ValueError(f"counts must have shape [classes], got {list(counts.shape)}")
    if not bool((counts > 0).all()):
        raise ValueError(f"counts must be above 0, got {counts.tolist()}")
    dtype = counts.dtype if counts.is_floating_point() else torch.get_default_dtype()
    wide = counts.double()
    if scheme == "inverse":
        weights = wide.sum() / (wide.numel() * wide)
    else:
        # expm1 and log keep the digits that 1 - beta^n loses as beta comes close to 1.
        log_beta = torch.tensor(beta, dtype=torch.float64, device=counts.device).log()
        weights = -1 / torch.expm1(wide * log_beta)
        weights = weights / weights.mean()
    return weights.to(dtype)
