"""BackSlash: training under the code length of the weights, by a generalized Gaussian prior."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_floating,
    check_not_negative,
    check_one_of,
    check_positive,
    check_values,
)
from regularizers.ops._operator import accumulate_dtype
from regularizers.optim._batch import local, over_shards
from regularizers.optim.generalized_gaussian import check_shape_parameter, fit_moments

FORMS = ("power", "nll")


def rate_penalty(
    params: Tensor | Iterable[Tensor],
    *,
    shape: float | Literal["estimate"] = "estimate",
    form: Literal["power", "nll"] = "power",
    eps: float = 1e-8,
) -> Tensor:
    r"""Return what the weights cost under their generalized Gaussian prior, per weight.

    .. math::
        R = \frac1N \sum_i |\theta_i|^{\nu} \ \text{(power)}, \qquad
        R = -\frac1N \sum_i \log_2 p(\theta_i \mid \nu, \alpha) \ \text{(nll)}

    with shape and scale of each tensor's own, found at each call and not differentiated through.
    ``"nll"`` is in bits a weight, for a quantization step of 1; its gradient is that of
    ``"power"`` divided by :math:`\alpha^\nu \ln 2`, so it does not depend on a tensor's scale. For
    shapes below 1 the power is :math:`(|\theta| + \epsilon)^\nu - \epsilon^\nu`, whose gradient,
    :math:`\nu (|\theta| + \epsilon)^{\nu - 1} \mathrm{sign}\,\theta`, is finite, and 0 at 0.

    Args:
        params: a tensor or several, ``[*]``, floating-point; empty and all-zero tensors cost
            nothing and are warned of (zeros on a GPU: silently, looking would stop the stream).
        shape: :math:`\nu`, in (0, 10], for all tensors; ``"estimate"``: that of
            :func:`estimate_shape` for each tensor.
        form: ``"power"`` or ``"nll"``.
        eps: :math:`\epsilon`, above 0.

    Returns:
        A tensor with no dimensions, float64 for float64 parameters, else float32. The mean over all
        entries of all tensors: the strength to multiply it with grows with the model.

    Raises:
        TypeError: a parameter is not a floating-point tensor.
        ValueError: there is no parameter, one has NaN or infinity, or an option is out of its
            range.

    Example:
        >>> rate_penalty([torch.tensor([4.0, -1.0]), torch.tensor([0.0, 9.0])], shape=0.5)
        tensor(1.4999)

    Source:
        BackSlash, 2025, arXiv 2504.16968, as used in arXiv 2506.00486. The estimate at each step
        from the authors' read-me; the normalisation by N is reconstructed. The constant of
        ``"nll"`` is added here so that its value is a code length.
    """
    tensors = _checked(params, shape, form, eps)
    count = sum(w.numel() for w in tensors)
    laws = _laws(tensors, shape, form)
    total = sum((_cost(w, nu, alpha, form, eps) for w, nu, alpha in laws), start=_zero(tensors))
    return total / max(count, 1)


class BackSlash:
    r"""Rate-constrained training: a step down the code length after each step of an optimizer.

    .. math:: \theta \leftarrow \theta - \alpha\lambda\,\partial R / \partial\theta

    with R of :func:`rate_penalty` over all parameters given here, in place and decoupled from the
    optimizer's moments. An entry that would pass zero stops there: with a slope that grows without
    bound near zero (shapes below 1) the plain step would throw it to the other side. Train some
    epochs with it, then some without, as the paper does.

    Args:
        params: the tensors to shrink; usually weight matrices, not biases and norms. DTensors are
            stepped on their shards, by the law of the whole tensor.
        strength: :math:`\lambda`, at least 0. R is a mean, so it is of the order of N times a
            weight decay.
        shape: as for :func:`rate_penalty`.
        form: as for :func:`rate_penalty`.
        eps: as for :func:`rate_penalty`.

    Raises:
        TypeError: a parameter is not a floating-point tensor.
        ValueError: there is no parameter, or an option is out of its range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -0.01, 0.0, 4.0]))
        >>> decay = BackSlash([w], strength=4.0, shape=1.0)
        >>> decay.step(0.1)  # after optimizer.step()
        >>> w.data
        tensor([0.9000, 0.0000, 0.0000, 3.9000])

    Source:
        As :func:`rate_penalty`. Stopping at zero is the library's.
    """

    def __init__(
        self,
        params: Tensor | Iterable[Tensor],
        *,
        strength: float,
        shape: float | Literal["estimate"] = "estimate",
        form: Literal["power", "nll"] = "power",
        eps: float = 1e-8,
    ) -> None:
        check_not_negative("strength", strength)
        self.params = _checked(params, shape, form, eps)
        self.strength = strength
        self.shape = shape
        self.form = form
        self.eps = eps

    @torch.no_grad()
    def step(self, lr: float | Tensor) -> None:
        """Shrink the parameters in place; ``lr`` is the learning rate of the optimizer's step.

        Raises:
            ValueError: a parameter has NaN or infinity, or ``lr`` is negative; nothing is written.
        """
        if not isinstance(lr, Tensor):
            check_not_negative("lr", lr)
        laws = _laws(self.params, self.shape, self.form)
        scale = lr * self.strength / max(sum(p.numel() for p in self.params), 1)
        for p, nu, alpha in laws:
            shard = local(p)
            wide = shard.to(accumulate_dtype(p.dtype))
            size = wide.abs()
            slope = nu * (size + _offset(nu, self.eps)) ** (nu - 1)
            if self.form == "nll":
                slope = slope / (alpha**nu * math.log(2))
            # At nu < 1 the slope of an entry that is 0 is finite, and the minimum keeps it there.
            amount = torch.minimum(torch.as_tensor(scale).to(slope) * slope, size)
            shard.copy_(wide - wide.sign() * amount)


def _checked(
    params: Tensor | Iterable[Tensor],
    shape: float | str,
    form: str,
    eps: float,
) -> list[Tensor]:
    tensors = [params] if isinstance(params, Tensor) else list(params)
    if not tensors:
        raise ValueError("params must hold a tensor, got none")
    for tensor in tensors:
        check_floating("params", tensor)
    if isinstance(shape, str):
        check_one_of("shape", shape, ("estimate",))
    else:
        check_shape_parameter(shape)
    check_one_of("form", form, FORMS)
    check_positive("eps", eps)
    return tensors


@torch.no_grad()
def _laws(
    tensors: list[Tensor], shape: float | str, form: str
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the tensors that are not zero, each with shape and scale of its own.

    DTensors get the law of the whole tensor: two all-reduces, whatever their number.
    """
    shards = [local(w.detach()) for w in tensors]
    # Infinity in place of NaN, for a maximum over processes may overlook it.
    sizes = [shard.abs().amax() if shard.numel() else shard.new_zeros(()) for shard in shards]
    sizes = [size.to(accumulate_dtype(size.dtype)) for size in sizes]
    sizes = [torch.where(size.isfinite(), size, math.inf) for size in sizes]
    sizes = over_shards(sizes, tensors, largest=True)
    for size in sizes:
        check_values(size.isfinite(), lambda: "params must be finite, got NaN or infinity")
    sums = [_sums(shard, size, shape, form) for shard, size in zip(shards, sizes, strict=True)]
    if isinstance(shape, str) or form == "nll":
        sums = over_shards(sums, tensors)
    kept = []
    for w, size, total in zip(tensors, sizes, sums, strict=True):
        visible = size.device.type == "cpu" and not torch.compiler.is_compiling()
        if w.numel() == 0 or (visible and not bool(size)):
            text = f"a parameter of shape {list(w.shape)} is empty or zero: skipped"
            warnings.warn(text, stacklevel=3)
        else:
            kept.append((w, *_law(size, total / w.numel(), shape)))
    return kept


def _sums(shard: Tensor, largest: Tensor, shape: float | str, form: str) -> Tensor:
    """Return what the law of a tensor is made of, summed over a shard: ``[2]``."""
    shard = shard.to(largest.dtype).abs()
    if isinstance(shape, str):
        unit = shard / torch.where(largest > 0, largest, 1)  # squares of tiny weights underflow
        return torch.stack([unit.sum(), unit.square().sum()])
    # The scale is needed for the code length alone.
    power = (shard**shape).sum() if form == "nll" else shard.new_ones(())
    return torch.stack([power, power])


def _law(largest: Tensor, means: Tensor, shape: float | str) -> tuple[Tensor, Tensor]:
    """Return shape and scale of one tensor, in the type that its penalty is computed in."""
    if isinstance(shape, str):
        nu, alpha = fit_moments(largest, means[0], means[1])
    else:
        nu = torch.full_like(largest, shape)
        alpha = (nu * means[0]) ** (1 / nu)  # the most likely scale of the given shape
    return nu.to(largest.dtype), alpha.to(largest.dtype).clamp(min=torch.finfo(largest.dtype).tiny)


def _zero(tensors: list[Tensor]) -> Tensor:
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return torch.zeros((), dtype=dtype, device=tensors[0].device)


def _offset(nu: Tensor, eps: float) -> Tensor:
    return torch.where(nu < 1, eps, 0.0).to(nu.dtype)


def _cost(w: Tensor, nu: Tensor, alpha: Tensor, form: str, eps: float) -> Tensor:
    offset = _offset(nu, eps)
    size = w.to(accumulate_dtype(w.dtype)).abs()
    if form == "power":
        return ((size + offset) ** nu - offset**nu).sum()
    nats = (((size + offset) / alpha) ** nu - (offset / alpha) ** nu).sum()
    constant = (2 * alpha / nu).log() + torch.lgamma(1 / nu)
    return (nats + w.numel() * constant) / math.log(2)
