"""Dropout x M, linear and cross-entropy in one: no stored mask, masked activation or logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_fraction,
    check_one_of,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
)
from regularizers._shared.randomness import draw_seed
from regularizers._shared.reductions import REDUCTIONS, Reduction
from regularizers._shared.scheduled import scheduled
from regularizers.ops._operator import (
    Operator,
    accumulate_dtype,
    autocast_dtype,
    differentiate_backward,
    transformed,
)
from regularizers.ops.philox import dropout_mask

_NONE, _MEAN, _SUM = range(3)
# Bits of the operator's `gradients`: which gradients the forward pass of a scalar loss is to leave
# behind.
_GRAD_X, _GRAD_WEIGHT, _GRAD_BIAS = 1, 2, 4


def multi_sample_dropout_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    p: float | Tensor = 0.5,
    num_samples: int = 8,
    label_smoothing: float | Tensor = 0.0,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Compute the cross-entropy of a linear head under many dropout masks of its input, fused.

    .. math::
        z^s_i = \frac{1}{1-p} (m^s_i \odot x_i) W^\top + b, \qquad
        \ell^s_i = \sum_c t_{ic} (\mathrm{lse}(z^s_i) - z^s_{ic}), \qquad
        L = \frac{1}{M n} \sum_{s,i} \ell^s_i

    with the target row :math:`t_{ic} = (1-\varepsilon) \omega_{y_i} [c = y_i] + \varepsilon
    \omega_c / C` (label smoothing :math:`\varepsilon`, class weights :math:`\omega`, both as in
    ``F.cross_entropy``; zero on ignored rows) and :math:`n = \sum_i \omega_{y_i}` over the rows
    that count. The *losses* are averaged over the M samples, not the logits.

    Masks are those of :func:`dropout_samples` for the same seed. A scalar loss finds its gradients
    in the forward pass, while the logits of a chunk of rows are in cache; row-wise losses compute
    the logits again in the backward pass. Memory beyond the gradients does not grow with
    ``num_samples``. Under autocast the linear part takes the autocast type and the loss is float32,
    as ``F.linear`` and ``F.cross_entropy`` behave.

    Args:
        x: features ``[B, D]``; float32, float64, bfloat16 or float16.
        weight: ``[C, D]``, dtype of ``x``.
        bias: ``[C]``, dtype of ``x``, or None.
        target: class indices ``[B]``, int64, in [0, C) or equal to ``ignore_index``.
        p: probability that a feature is dropped, in [0, 1); a number or a tensor with no
            dimensions.
        num_samples: number of masks M, at least 1.
        label_smoothing: :math:`\varepsilon` in [0, 1); a number or a tensor with no dimensions.
        ignore_index: target value whose rows do not count.
        class_weight: ``[C]``, dtype of ``x`` (float32 under autocast), or None.
        reduction: ``"mean"`` (over rows and samples), ``"sum"`` (over rows, mean over samples) or
            ``"none"`` (mean over samples).
        seed: int or int64 tensor with no dimensions; drawn from the default generator when omitted.
        generator: generator to draw the seed from; not inside ``torch.compile`` or activation
            checkpointing.

    Returns:
        The loss, a tensor with no dimensions, or ``[B]`` for ``reduction="none"``; dtype of ``x``,
        float32 under autocast. The mean over no rows is NaN, as in ``F.cross_entropy``.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument is out of range, of the wrong shape or on another device than ``x``.
            Target values are checked on a CPU, before anything is computed; on CUDA they are not.

    Example:
        >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.eye(2)
        >>> loss = multi_sample_dropout_cross_entropy(x, weight, None, torch.tensor([1]), p=0.0)
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(x, torch.tensor([1])))
        True

    Source:
        H. Inoue, "Multi-Sample Dropout for Accelerated Training and Better Generalization", 2019,
        arXiv 1905.09788. The formula follows from the abstract; there is no code of the author.
    """
    _check_arguments(x, weight, bias, target, class_weight)
    check_at_least("num_samples", num_samples, 1)
    check_one_of("reduction", reduction, REDUCTIONS)
    low = autocast_dtype(x.device)
    result_dtype = x.dtype if low is None else accumulate_dtype(x.dtype)
    if low is not None:
        x, weight = _autocast(x, low), _autocast(weight, low)
        bias = None if bias is None else _autocast(bias, low)
    check_same_dtype("weight", weight, "x", x)
    if bias is not None:
        check_same_dtype("bias", bias, "x", x)
    if class_weight is not None and class_weight.dtype not in (x.dtype, result_dtype):
        check_same_dtype("class_weight", class_weight, "x", x)
    rate = scheduled("p", p, x, check_fraction)
    smoothing = scheduled("label_smoothing", label_smoothing, x, check_fraction)
    bits = draw_seed(seed, generator, x)
    code = REDUCTIONS.index(reduction)
    data = (x, weight, bias, target, class_weight, rate, smoothing, bits)
    if transformed():
        return _loss(code, *data, num_samples, ignore_index).to(result_dtype)
    gradients = _wanted_gradients(x, weight, bias) if torch.is_grad_enabled() else 0
    loss: Tensor = FORWARD(*data, num_samples, ignore_index, code, gradients)[0]
    return loss.to(result_dtype)


def _check_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None
) -> None:
    check_floating("x", x)
    check_shape("x", x, (None, None), "[batch, features]")
    check_floating("weight", weight)
    check_shape("weight", weight, (None, x.shape[1]), f"[classes, features = {x.shape[1]}]")
    classes = weight.shape[0]
    if classes < 1:
        raise ValueError("weight must have at least one class, got shape [0, ...]")
    for name, vector in (("bias", bias), ("class_weight", class_weight)):
        if vector is not None:
            check_floating(name, vector)
            check_shape(name, vector, (classes,), f"[classes = {classes}]")
            check_same_device(name, vector, "x", x)
    if class_weight is not None and class_weight.requires_grad:
        raise ValueError("class_weight must not require grad: it is not differentiated through")
    check_tensor("target", target)
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64 class indices, got {target.dtype}")
    # No size in the text: torch.compile would take a formatted one for a constant.
    check_shape("target", target, (x.shape[0],), "[batch of x]")
    check_same_device("weight", weight, "x", x)
    check_same_device("target", target, "x", x)


def _autocast(tensor: Tensor, low: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(low)


def _wanted_gradients(x: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    wanted = _GRAD_X * x.requires_grad + _GRAD_WEIGHT * weight.requires_grad
    return wanted + _GRAD_BIAS * (bias is not None and bias.requires_grad)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulate_dtype(tensor.dtype))


def _logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, p: Tensor, seed: Tensor, num_samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [M, B, C], masked features [M, B, D] and mask; r follows the product."""
    keep = dropout_mask(tuple(x.shape), p, seed, num_samples)
    masked = torch.where(keep, _wide(x), 0)
    z = masked @ _wide(weight).T / (1 - p).to(masked.dtype)
    return (z if bias is None else z + _wide(bias)), masked, keep


def _target_rows(
    target: Tensor,
    class_weight: Tensor | None,
    label_smoothing: Tensor,
    ignore_index: int,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return target rows t [B, C] and row weights omega_y [B], both zero where ignored."""
    classes = like.shape[-1]
    omega = like.new_ones(classes) if class_weight is None else class_weight.to(like.dtype)
    counts = (target != ignore_index)[:, None]
    one_hot = torch.where(counts, target[:, None], 0) == torch.arange(classes, device=like.device)
    epsilon = label_smoothing.to(like.dtype)
    hard = torch.where(one_hot & counts, omega, 0)
    return torch.where(counts, (1 - epsilon) * hard + epsilon * omega / classes, 0), hard.sum(-1)


def _loss(
    reduction: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    p: Tensor,
    label_smoothing: Tensor,
    seed: Tensor,
    num_samples: int,
    ignore_index: int,
) -> Tensor:
    """Compute the loss in plain, differentiable PyTorch; the specification."""
    z, _, _ = _logits(x, weight, bias, p, seed, num_samples)
    t, omega_y = _target_rows(target, class_weight, label_smoothing, ignore_index, z)
    # Without smoothing only the target's class counts, and another's log-probability may be -inf.
    counts = (t != 0) | ((label_smoothing > 0) & (target != ignore_index)[:, None])
    rows = torch.where(counts, -t * torch.log_softmax(z, -1), 0).sum(-1).mean(0)
    if reduction == _NONE:
        return rows
    return rows.sum() / omega_y.sum() if reduction == _MEAN else rows.sum()


def _gradients(
    gradients: int,
    grad_rows: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    p: Tensor,
    label_smoothing: Tensor,
    seed: Tensor,
    num_samples: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the wanted gradients from those of the row losses [B]; by formula, not autograd.

    They come in the accumulation type. A gradient scaler multiplies the loss, which saves float16
    gradients from underflow only if they are rounded after the multiplication.
    """
    z, masked, keep = _logits(x, weight, bias, p, seed, num_samples)
    t, _ = _target_rows(target, class_weight, label_smoothing, ignore_index, z)
    g = (torch.softmax(z, -1) * t.sum(-1, keepdim=True) - t) * (grad_rows / num_samples)[:, None]
    g = torch.where((target == ignore_index)[:, None], 0, g)
    r = 1 / (1 - p).to(g.dtype)
    return (
        torch.where(keep, g @ _wide(weight), 0).sum(0) * r
        if gradients & _GRAD_X
        else g.new_empty(0),
        torch.einsum("sbc,sbd->cd", g, masked) * r if gradients & _GRAD_WEIGHT else g.new_empty(0),
        g.sum((0, 1)) if gradients & _GRAD_BIAS else g.new_empty(0),
    )


def _check_values(
    weight: Tensor, target: Tensor, p: Tensor, label_smoothing: Tensor, ignore_index: int
) -> None:
    """Check values where that costs no synchronisation."""
    if target.device.type != "cpu":
        return
    check_fraction("p", p.item())
    check_fraction("label_smoothing", label_smoothing.item())
    classes = weight.shape[0]
    outside = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"target must lie in [0, {classes}) or equal ignore_index {ignore_index}, "
            f"got {int(target[row])} in row {row}"
        )


def _forward_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *call, reduction, gradients = arguments
    x, weight, _, target, class_weight, p, label_smoothing, _, _, ignore_index = call
    _check_values(weight, target, p, label_smoothing, ignore_index)
    loss = _loss(reduction, *call)
    if reduction == _NONE:
        gradients = 0
    unit = torch.ones(x.shape[0], dtype=loss.dtype, device=x.device)
    if reduction == _MEAN:
        like = loss.new_empty(0, weight.shape[0])
        unit /= _target_rows(target, class_weight, label_smoothing, ignore_index, like)[1].sum()
    return loss, *_gradients(gradients, unit, *call)


def backward_by(recompute: Callable[..., Sequence[Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    """Return an implementation of the backward operator.

    The gradients of a scalar loss were found in the forward pass, up to the factor ``grad_loss``.
    Those of row-wise losses come from ``recompute(gradients, grad_loss, *call)``. Rounding to the
    type of x comes last.
    """

    def backward(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *unit_gradients, x = arguments[:4]
        *call, reduction, gradients = arguments[3:]
        if reduction == _NONE:
            found = recompute(gradients, grad_loss, *call)
        else:
            found = [gradient * grad_loss for gradient in unit_gradients]
        return tuple(gradient.to(x.dtype) for gradient in found)

    return backward


def _gradients_fake(
    x: Tensor, weight: Tensor, gradients: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if gradients & _GRAD_X else 0, dtype=dtype),
        x.new_empty(weight.shape if gradients & _GRAD_WEIGHT else 0, dtype=dtype),
        x.new_empty(weight.shape[0] if gradients & _GRAD_BIAS else 0, dtype=dtype),
    )


def _forward_fake(
    x: Tensor, weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, reduction, gradients = arguments
    shape = x.shape[:1] if reduction == _NONE else ()
    dtype = accumulate_dtype(x.dtype)
    loss = x.new_empty(shape, dtype=dtype)
    return loss, *_gradients_fake(x, weight, 0 if reduction == _NONE else gradients, dtype)


def _backward_fake(
    grad_loss: Tensor,
    unit_grad_x: Tensor,
    unit_grad_weight: Tensor,
    unit_grad_bias: Tensor,
    x: Tensor,
    weight: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_fake(x, weight, arguments[-1], x.dtype)


def _forward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *unit_gradients = output
    ctx.mark_non_differentiable(*unit_gradients)
    ctx.save_for_backward(*unit_gradients, *inputs[:8])
    ctx.options = inputs[8:]


def _forward_backward(
    backend: str | None, ctx: Any, grad_loss: Tensor, *_: Tensor
) -> tuple[Any, ...]:
    found = BACKWARD.kernel(backend)(grad_loss, *ctx.saved_tensors, *ctx.options)
    return _if_wanted(found, ctx.options[-1]) + (None,) * 9


def _if_wanted(found: Sequence[Any], gradients: int) -> tuple[Any, ...]:
    bits = (_GRAD_X, _GRAD_WEIGHT, _GRAD_BIAS)
    return tuple(item if gradients & bit else None for item, bit in zip(found, bits, strict=True))


def _backward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], *inputs[4:12])
    ctx.options = inputs[12:]


def _double_backward(backend: str | None, ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
    """Differentiate the gradients through the reference, which holds masks and logits."""
    grad_loss, x, weight, bias, *rest = ctx.saved_tensors
    num_samples, ignore_index, reduction, gradients = ctx.options
    data = [tensor for tensor in (x, weight, bias) if tensor is not None]

    def loss(*data: Tensor) -> Tensor:
        call: list[Any] = [*data, *(None,) * (bias is None), *rest, num_samples, ignore_index]
        return _loss(reduction, *call)

    wanted = _if_wanted(cotangents, gradients)[: len(data)]
    by_loss, *by_data = differentiate_backward(loss, grad_loss, data, wanted)
    if bias is None:
        by_data.append(None)
    return (by_loss, None, None, None, *by_data, *(None,) * 9)


_DATA = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, "
    "Tensor p, Tensor label_smoothing, Tensor seed, "
    "SymInt num_samples, int ignore_index, int reduction, int gradients"
)
FORWARD = Operator(
    "multi_sample_dropout_cross_entropy",
    f"({_DATA}) -> (Tensor loss, Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    fake=_forward_fake,
    reference=_forward_reference,
    triton="masked_linear_cross_entropy:forward",
    setup_context=_forward_context,
    backward=_forward_backward,
)
BACKWARD = Operator(
    "multi_sample_dropout_cross_entropy_backward",
    "(Tensor grad_loss, Tensor unit_grad_x, Tensor unit_grad_weight, Tensor unit_grad_bias, "
    f"{_DATA}) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    fake=_backward_fake,
    reference=backward_by(_gradients),
    triton="masked_linear_cross_entropy:backward",
    setup_context=_backward_context,
    backward=_double_backward,
)
