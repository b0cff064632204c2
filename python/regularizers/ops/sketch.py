"""Sliced statistics of a batch of embeddings, without arrays of batch x slices (x knots)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_positive,
    check_same_device,
    check_shape,
)
from regularizers.ops._operator import (
    Operator,
    accumulate_dtype,
    differentiate_backward,
    full_precision,
    loss_dtype,
    transformed,
)


def sliced_epps_pulley(
    z: Tensor, slices: Tensor, *, num_knots: int = 17, t_max: float = 3.0
) -> Tensor:
    r"""Compute the Epps-Pulley statistic of a batch against N(0, 1) along slices, fused.

    .. math::
        p = z A, \qquad c_l = \frac1B \sum_n \cos t_l p_n, \qquad
        s_l = \frac1B \sum_n \sin t_l p_n, \qquad
        L = \frac{1}{V K} \sum_{v,k} B \sum_{l=1}^{L-1} w_l \varphi_l
        \big[ (c_l - \varphi_l)^2 + s_l^2 \big]

    at the knots :math:`t_l = l \Delta`, :math:`\Delta = t_{\max} / (L - 1)`, with
    :math:`\varphi_l = e^{-t_l^2/2}` and :math:`w_l = 2 \Delta` (:math:`\Delta` at the last knot):
    the trapezoid rule on [-t_max, t_max] by symmetry. The knot 0 contributes nothing.

    The gradient is found in the forward pass, a block of slices at a time, while projections are in
    cache. Projections and sums are float32 for half types, under autocast too.

    Args:
        z: embeddings ``[V, B, D]``, every view on its own; float32, float64, bfloat16 or float16.
        slices: ``[D, K]``, one direction a column, or ``[G, D, K]`` where views ``g V / G`` to
            ``(g + 1) V / G`` have slices of their own; dtype of ``z``, or float32 beside a half
            type. Not differentiated through.
        num_knots: L, at least 2, the knot 0 included.
        t_max: last knot, above 0.

    Returns:
        The loss, a tensor with no dimensions; dtype of ``z``, float32 under autocast.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument is out of range, of the wrong shape or on another device than ``z``,
            or ``slices`` requires grad.

    Example:
        >>> z = torch.zeros(1, 4, 3)
        >>> print(f"{sliced_epps_pulley(z, torch.eye(3)).item() / 4:.5f}")
        0.40205

    Source:
        T. W. Epps, L. B. Pulley, 1983; as in LeJEPA (R. Balestriero, Y. LeCun, 2025, arXiv
        2511.08544), whose code was read.
    """
    slices = _check_sketch(z, slices)
    spacing = _spacing(num_knots, t_max)
    if transformed():
        loss = _epps_pulley(z, slices, spacing, num_knots - 1)
    else:
        wants_gradient = torch.is_grad_enabled() and z.requires_grad
        loss = EPPS_PULLEY(z, slices, spacing, num_knots - 1, wants_gradient)[0]
    return loss.to(loss_dtype(z))


def sliced_characteristic(
    z: Tensor, slices: Tensor, *, num_knots: int = 17, t_max: float = 3.0
) -> Tensor:
    r"""Sum cosines and sines of projections over the batch: the empirical characteristic function.

    .. math::
        p = z A, \qquad S_{0,v,l,k} = \sum_n \cos t_l p_{vnk}, \qquad
        S_{1,v,l,k} = \sum_n \sin t_l p_{vnk}

    at the knots :math:`t_l = l\, t_{\max} / (L - 1)`, l = 1, ..., L - 1 (at 0 the sums are B and
    0). Sums, unlike means, may be added up over processes before a statistic is made of them. The
    backward pass computes the projections again.

    Args:
        z: as in :func:`sliced_epps_pulley`.
        slices: likewise.
        num_knots: L, at least 2, the knot 0 included.
        t_max: last knot, above 0.

    Returns:
        ``[2, V, L - 1, K]``; float64 for float64, else float32.

    Raises:
        TypeError: as :func:`sliced_epps_pulley`.
        ValueError: likewise.

    Example:
        >>> sums = sliced_characteristic(torch.zeros(1, 4, 3), torch.eye(3), num_knots=2)
        >>> sums[:, 0, 0].tolist()
        [[4.0, 4.0, 4.0], [0.0, 0.0, 0.0]]

    Source:
        Part of SIGReg (R. Balestriero, Y. LeCun, "LeJEPA", 2025, arXiv 2511.08544).
    """
    slices = _check_sketch(z, slices)
    spacing = _spacing(num_knots, t_max)
    if transformed():
        return _characteristic(z, slices, spacing, num_knots - 1)
    sums: Tensor = CHARACTERISTIC(z, slices, spacing, num_knots - 1)
    return sums


def sliced_quantile(z: Tensor, slices: Tensor, quantiles: Tensor) -> Tensor:
    r"""Compute the squared distance of sorted projections to given quantiles, fused.

    .. math::
        p = z A, \qquad
        L = \frac{1}{V B K} \sum_{v,i,k} \big(p_{v(i)k} - q_i\big)^2

    with :math:`p_{(1)} \le \dots \le p_{(B)}` the order statistics over the batch: the sliced
    2-Wasserstein distance to the distribution whose quantiles are q. The gradient is found in the
    forward pass, a block of slices at a time. Equal projections take quantiles in the order of
    their rows.

    Args:
        z: embeddings ``[V, B, D]``, as in :func:`sliced_epps_pulley`.
        slices: ``[D, K]`` or ``[G, D, K]``, likewise.
        quantiles: ``[B]``, ascending; dtypes as for ``slices``. Not differentiated through.

    Returns:
        The loss, a tensor with no dimensions; dtype of ``z``, float32 under autocast.

    Raises:
        TypeError: as :func:`sliced_epps_pulley`.
        ValueError: likewise.

    Example:
        >>> z = torch.tensor([[[3.0], [0.0]]])
        >>> sliced_quantile(z, torch.ones(1, 1), torch.tensor([0.0, 1.0]))
        tensor(2.)

    Source:
        The shape term of VISReg (2026, arXiv 2606.02572) and of sliced Wasserstein losses before
        it.
    """
    slices = _check_sketch(z, slices)
    check_floating("quantiles", quantiles)
    check_shape("quantiles", quantiles, (z.shape[1],), "[batch of z]")
    _check_constant("quantiles", quantiles, z)
    if transformed():
        loss = _quantile(z, slices, quantiles)
    else:
        wants_gradient = torch.is_grad_enabled() and z.requires_grad
        loss = QUANTILE(z, slices, quantiles, wants_gradient)[0]
    return loss.to(loss_dtype(z))


def _check_sketch(z: Tensor, slices: Tensor) -> Tensor:
    """Check both arguments and return the slices as [G, D, K]."""
    check_floating("z", z)
    check_shape("z", z, (None, None, None), "[views, batch, features]")
    if min(z.shape[:2]) < 1:
        raise ValueError(f"z must have at least one view and one row, got {list(z.shape)}")
    check_floating("slices", slices)
    if slices.dim() == 2:
        slices = slices[None]
    features = z.shape[2]
    # No sizes in the text: torch.compile would take a formatted one for a constant.
    check_shape("slices", slices, (None, features, None), "[[groups,] features of z, slices]")
    if slices.shape[2] < 1:
        raise ValueError("slices must have at least one column, got none")
    if slices.shape[0] < 1 or z.shape[0] % slices.shape[0] != 0:
        raise ValueError(
            f"slices must have a number of groups that divides the {z.shape[0]} views of z, "
            f"got {slices.shape[0]}"
        )
    _check_constant("slices", slices, z)
    return slices


def _check_constant(name: str, tensor: Tensor, z: Tensor) -> None:
    check_same_device(name, tensor, "z", z)
    if tensor.dtype not in (z.dtype, accumulate_dtype(z.dtype)):
        raise TypeError(f"{name} must have the dtype of z ({z.dtype}), got {tensor.dtype}")
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require grad: it is not differentiated through")


def _spacing(num_knots: int, t_max: float) -> float:
    check_at_least("num_knots", num_knots, 2)
    check_positive("t_max", t_max)
    return t_max / (num_knots - 1)


def _project(z: Tensor, slices: Tensor) -> Tensor:
    """Return p = z A [V, B, K] in the accumulation type, autocast or not."""
    wide = accumulate_dtype(z.dtype)
    views: Tensor = z.to(wide).unflatten(0, (slices.shape[0], -1))
    with full_precision(z.device):
        p: Tensor = views @ slices.to(wide)[:, None]
    return p.flatten(0, 1)


def _back_project(g: Tensor, slices: Tensor) -> Tensor:
    """Return dz = g A^T [V, B, D]."""
    views: Tensor = g.unflatten(0, (slices.shape[0], -1))
    dz: Tensor = views @ slices.to(g.dtype)[:, None].mT
    return dz.flatten(0, 1)


def knots(like: Tensor, spacing: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return t, phi and w phi at the knots 1, ..., ``count``, each [count, 1]."""
    t = spacing * torch.arange(1, count + 1, dtype=like.dtype, device=like.device)[:, None]
    phi = torch.exp(-(t**2) / 2)
    weight = 2 * spacing * phi
    weight[-1] /= 2  # the trapezoid rule
    return t, phi, weight


def epps_pulley_statistic(sums: Tensor, rows: int | Tensor, spacing: float) -> Tensor:
    """Return the statistic of every view and slice [V, K] from characteristic sums of ``rows``."""
    _, phi, weight = knots(sums, spacing, sums.shape[2])
    c, s = sums / rows
    statistic: Tensor = rows * (weight * ((c - phi) ** 2 + s**2)).sum(1)
    return statistic


def _phases(z: Tensor, slices: Tensor, spacing: float, count: int) -> Tensor:
    """Return t p [V, L - 1, K, B]: what the kernels avoid."""
    p = _project(z, slices)
    t, _, _ = knots(p, spacing, count)
    return t[..., None] * p.mT[:, None]


def _characteristic(z: Tensor, slices: Tensor, spacing: float, count: int) -> Tensor:
    """Compute the sums in plain, differentiable PyTorch; the specification."""
    phases = _phases(z, slices, spacing, count)
    return torch.stack([phases.cos().sum(-1), phases.sin().sum(-1)])


def _epps_pulley(z: Tensor, slices: Tensor, spacing: float, count: int) -> Tensor:
    """Compute the loss in plain, differentiable PyTorch; the specification."""
    sums = _characteristic(z, slices, spacing, count)
    return epps_pulley_statistic(sums, z.shape[1], spacing).mean()


def _quantile(z: Tensor, slices: Tensor, quantiles: Tensor) -> Tensor:
    """Compute the loss in plain, differentiable PyTorch; the specification."""
    ordered = torch.sort(_project(z, slices), dim=1, stable=True).values
    return ((ordered - quantiles.to(ordered.dtype)[:, None]) ** 2).mean()


def _characteristic_gradient(
    grad_sums: Tensor, z: Tensor, slices: Tensor, spacing: float, count: int
) -> Tensor:
    """Compute dz from the gradient of the sums, by formula, in the accumulation type."""
    phases = _phases(z, slices, spacing, count)
    t, _, _ = knots(phases, spacing, count)
    of_cosine, of_sine = (t * grad_sums.to(phases.dtype))[..., None]
    g = (of_sine * phases.cos() - of_cosine * phases.sin()).sum(1).mT  # [V, B, K]
    return _back_project(g, slices)


def epps_pulley_sums_gradient(sums: Tensor, rows: int, spacing: float) -> Tensor:
    """Return the gradient of the mean statistic with respect to the sums."""
    _, phi, weight = knots(sums, spacing, sums.shape[2])
    scale = 2 / (sums.shape[1] * sums.shape[3])
    c, s = sums / rows
    gradient: Tensor = scale * weight * torch.stack([c - phi, s])
    return gradient


def _epps_pulley_reference(
    z: Tensor, slices: Tensor, spacing: float, count: int, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    sums = _characteristic(z, slices, spacing, count)
    loss = epps_pulley_statistic(sums, z.shape[1], spacing).mean()
    if not wants_gradient:
        return loss, loss.new_empty(0)
    upstream = epps_pulley_sums_gradient(sums, z.shape[1], spacing)
    return loss, _characteristic_gradient(upstream, z, slices, spacing, count)


def _quantile_reference(
    z: Tensor, slices: Tensor, quantiles: Tensor, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    p = _project(z, slices)
    ordered, place = torch.sort(p, dim=1, stable=True)
    residual = ordered - quantiles.to(p.dtype)[:, None]
    loss = (residual**2).mean()
    if not wants_gradient:
        return loss, loss.new_empty(0)
    g = torch.empty_like(p).scatter_(1, place, residual * (2 / p.numel()))
    return loss, _back_project(g, slices)


def _characteristic_backward_reference(grad_sums: Tensor, z: Tensor, *call: Any) -> Tensor:
    return _characteristic_gradient(grad_sums, z, *call).to(z.dtype)


def _characteristic_fake(z: Tensor, slices: Tensor, spacing: float, count: int) -> Tensor:
    shape = (2, z.shape[0], count, slices.shape[2])
    return z.new_empty(shape, dtype=accumulate_dtype(z.dtype))


def _loss_fake(z: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    wide = accumulate_dtype(z.dtype)
    return z.new_empty((), dtype=wide), z.new_empty(z.shape if call[-1] else 0, dtype=wide)


def scale_gradient(grad_loss: Tensor, unit_gradient: Tensor, z: Tensor, *call: Any) -> Tensor:
    """Return the gradient of a loss that was found in the forward pass, up to a factor.

    Rounding to the type of z comes last: a gradient scaler multiplies the loss, which saves float16
    gradients from underflow only so.
    """
    return (grad_loss * unit_gradient).to(z.dtype)


def _characteristic_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _characteristic_backward(backend: str | None, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    call = (*ctx.saved_tensors, *ctx.options)
    return CHARACTERISTIC_BACKWARD.kernel(backend)(grad, *call), None, None, None


def _characteristic_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _characteristic_double_backward(
    backend: str | None, ctx: Any, cotangent: Tensor
) -> tuple[Any, ...]:
    grad_sums, z, slices = ctx.saved_tensors
    by_grad_sums, by_z = differentiate_backward(
        lambda z: _characteristic(z, slices, *ctx.options), grad_sums, [z], [cotangent]
    )
    return by_grad_sums, by_z, None, None, None


def _loss_operators(
    name: str, schema: str, reference: Callable[..., Any], plain: Callable[..., Tensor]
) -> tuple[Operator, Operator]:
    """Register a loss that finds its gradient in the forward pass, and its backward operator.

    Args:
        name: of the operator.
        schema: its arguments between ``z`` and ``wants_gradient``.
        reference: ``reference(z, ..., wants_gradient) -> (loss, unit_gradient)``.
        plain: ``plain(z, ...) -> loss`` in differentiable PyTorch, for second derivatives.
    """
    arguments = f"Tensor z, {schema}, bool wants_gradient"

    def context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[1])
        tensors = [item for item in inputs if isinstance(item, Tensor)]
        ctx.save_for_backward(output[1], *tensors)
        ctx.options = inputs[len(tensors) :]

    def first(backend: str | None, ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Any, ...]:
        unit_gradient, *tensors = ctx.saved_tensors
        call = (*tensors, *ctx.options)
        gradient = backward.kernel(backend)(grad_loss, unit_gradient, *call)
        return gradient, *(None for _ in call[1:])

    def backward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensors = [item for item in inputs if isinstance(item, Tensor)]
        ctx.save_for_backward(tensors[0], *tensors[2:])
        ctx.options = inputs[len(tensors) :]

    def second(backend: str | None, ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        grad_loss, z, *tensors = ctx.saved_tensors
        call = (*tensors, *ctx.options[:-1])
        by_loss, by_z = differentiate_backward(
            lambda z: plain(z, *call), grad_loss, [z], [cotangent]
        )
        return by_loss, None, by_z, *(None for _ in call), None

    forward = Operator(
        name,
        f"({arguments}) -> (Tensor loss, Tensor unit_gradient)",
        fake=_loss_fake,
        reference=reference,
        triton=f"sketch:{name}",
        setup_context=context,
        backward=first,
    )
    backward = Operator(
        f"{name}_backward",
        f"(Tensor grad_loss, Tensor unit_gradient, {arguments}) -> Tensor",
        fake=lambda grad_loss, unit_gradient, z, *call: z.new_empty(z.shape),
        reference=scale_gradient,
        triton="sketch:scale_gradient",
        setup_context=backward_context,
        backward=second,
    )
    return forward, backward


EPPS_PULLEY, EPPS_PULLEY_BACKWARD = _loss_operators(
    "sliced_epps_pulley",
    "Tensor slices, float spacing, SymInt knots",
    _epps_pulley_reference,
    _epps_pulley,
)
QUANTILE, QUANTILE_BACKWARD = _loss_operators(
    "sliced_quantile", "Tensor slices, Tensor quantiles", _quantile_reference, _quantile
)
CHARACTERISTIC = Operator(
    "sliced_characteristic",
    "(Tensor z, Tensor slices, float spacing, SymInt knots) -> Tensor",
    fake=_characteristic_fake,
    reference=_characteristic,
    triton="sketch:sliced_characteristic",
    setup_context=_characteristic_context,
    backward=_characteristic_backward,
)
CHARACTERISTIC_BACKWARD = Operator(
    "sliced_characteristic_backward",
    "(Tensor grad_sums, Tensor z, Tensor slices, float spacing, SymInt knots) -> Tensor",
    fake=lambda grad_sums, z, *call: z.new_empty(z.shape),
    reference=_characteristic_backward_reference,
    triton="sketch:sliced_characteristic_backward",
    setup_context=_characteristic_backward_context,
    backward=_characteristic_double_backward,
)
