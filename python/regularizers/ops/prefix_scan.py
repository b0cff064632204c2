"""All prefixes of a linear classifier in one pass over the features, by running sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_one_of,
    check_same_device,
    check_shape,
    check_tensor,
    known_range,
)
from regularizers._shared.reductions import Reduction
from regularizers.ops._operator import (
    Operator,
    accumulate_dtype,
    autocast_dtype,
    differentiate_backward,
    full_precision,
    loss_dtype,
    transformed,
)
from regularizers.ops.nested import check_linear


def prefix_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    r"""Compute the logits of a linear layer on every prefix of its features.

    .. math:: z_k = b + \sum_{d \le k} x_d W_{:, d}, \qquad k = 1, \dots, D

    One pass of B D C multiplications, where a loop over prefixes does D / 2 times as many. The
    result is large; :func:`prefix_accuracy` and :func:`expected_prefix_cross_entropy` do not make
    it.

    Args:
        x: ``[B, D]``; float32, float64, bfloat16 or float16.
        weight: ``[C, D]``, dtype of ``x``.
        bias: ``[C]``, dtype of ``x``, or None.

    Returns:
        ``[D, B, C]``, dtype of ``x``; entry k - 1 belongs to the first k features. Under autocast
        as ``F.linear``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, or another tensor is of another dtype.
        ValueError: a shape does not fit, or a tensor is on another device.

    Example:
        >>> prefix_logits(torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3), None).flatten()
        tensor([1., 3., 6.])

    Source:
        Nested dropout for noisy labels, arXiv 2206.13140, evaluates every prefix; as one running
        sum here.
    """
    x, weight, bias = _classifier(x, weight, bias)
    if transformed():
        return _logits(x, weight, bias)
    result: Tensor = PREFIX_LOGITS(x, weight, bias)
    return result


def prefix_accuracy(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    r"""Count the right answers of a linear classifier with every prefix of its features.

    .. math:: a_k = \sum_i 1\big[\operatorname{argmax}_c z_{ikc} = y_i\big]

    Of level logits the first wins, as in ``torch.argmax``; a row whose target has a NaN logit is
    wrong, and NaN logits of other classes never win. Nothing is differentiated.

    Args:
        x: ``[B, D]``; float32, float64, bfloat16 or float16.
        weight: ``[C, D]``, dtype of ``x``.
        bias: ``[C]``, dtype of ``x``, or None.
        target: int64 ``[B]``, in [0, C); unchecked on CUDA.

    Returns:
        int64 ``[D]``; entry k - 1 belongs to the first k features.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, another tensor is of another dtype, or
            ``target`` is not int64.
        ValueError: a shape does not fit, a target is out of range, or a tensor is on another
            device.

    Example:
        >>> x, target = torch.tensor([[1.0, -3.0], [1.0, 1.0]]), torch.tensor([0, 0])
        >>> prefix_accuracy(x, torch.tensor([[1.0, 1.0], [0.0, 0.0]]), None, target)
        tensor([2, 1])

    Source:
        Nested dropout for noisy labels, arXiv 2206.13140: the search of k on validation data.
    """
    x, weight, bias = _classifier(x, weight, bias)
    _check_target(target, x)
    x, weight, bias = x.detach(), weight.detach(), None if bias is None else bias.detach()
    if transformed():
        return _accuracy(x, weight, bias, target)
    result: Tensor = PREFIX_ACCURACY(x, weight, bias, target)
    return result


def expected_prefix_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    probs: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy of a linear classifier on a random prefix, in expectation over its length.

    .. math::
        L = \frac{1}{n} \sum_i \sum_k \pi_k \mathrm{CE}(z_{ik}, y_i), \qquad
        z_{ik} = b + \sum_{d \le k} x_{id} W_{:, d}

    The gradient is exact: what nested dropout estimates from one k a step, without its variance.
    The logits of all prefixes are never stored; prefixes of probability 0 are not evaluated, and
    features behind the last that counts get a gradient of exactly 0.

    Args:
        x: ``[B, D]``; float32, float64, bfloat16 or float16.
        weight: ``[C, D]``, dtype of ``x``.
        bias: ``[C]``, dtype of ``x``, or None.
        target: int64 ``[B]``, in [0, C) or ``ignore_index``; unchecked on CUDA.
        probs: ``[D]`` floating point, the law :math:`\pi` over k = 1, ..., D; finite and not
            negative (unchecked on CUDA). Taken as it is: its sum is the caller's affair. Not
            differentiated through. ``PrefixDistribution.probs`` fits.
        ignore_index: target value whose rows do not count.
        reduction: ``"mean"`` over the rows that count, ``"sum"``, or ``"none"``.

    Returns:
        The loss without dimensions, or ``[B]`` for ``"none"``; dtype of ``x``, under autocast
        float32, as ``F.cross_entropy``. The mean over no rows is NaN.

    Raises:
        TypeError: a tensor is of the wrong dtype.
        ValueError: a shape does not fit, a value is out of range, ``probs`` requires grad, or a
            tensor is on another device.

    Example:
        >>> x, weight, target = torch.randn(4, 6), torch.randn(3, 6), torch.tensor([0, 2, 1, 1])
        >>> only_two = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
        >>> loss = expected_prefix_cross_entropy(x, weight, None, target, only_two)
        >>> expected = torch.nn.functional.cross_entropy(x[:, :2] @ weight[:, :2].T, target)
        >>> torch.allclose(loss, expected)
        True

    Source:
        The expectation of the loss of arXiv 2206.13140 over its law of k; the formula of the
        gradient is ours, checked against autograd.
    """
    dtype = loss_dtype(x) if isinstance(x, Tensor) else None
    x, weight, bias = _classifier(x, weight, bias)
    check_one_of("reduction", reduction, ("none", "mean", "sum"))
    _check_target(target, x)
    check_tensor("probs", probs)
    check_shape("probs", probs, (x.shape[1],), "[features of x]")
    if not probs.is_floating_point():
        raise TypeError(f"probs must be floating point, got {probs.dtype}")
    if probs.requires_grad:
        raise ValueError("probs must not require grad: it is not differentiated through")
    check_same_device("probs", probs, "x", x)
    law = probs.to(torch.float32 if x.device.type == "mps" else torch.float64)
    if transformed():
        rows = _row_losses(x, weight, bias, target, law, ignore_index)
    else:
        rows = PREFIX_CROSS_ENTROPY(x, weight, bias, target, law, ignore_index)[0]
    if reduction == "sum":
        rows = rows.sum()
    elif reduction == "mean":
        rows = rows.sum() / (target != ignore_index).sum()
    return rows.to(dtype)


def _classifier(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check the operands of the layer and give them the type that autocast asks for."""
    check_linear(x, weight, bias)
    check_shape("x", x, (None, None), "[batch, features]")
    low = autocast_dtype(x.device)
    if low is None or x.dtype == torch.float64:
        return x, weight, bias
    return x.to(low), weight.to(low), None if bias is None else bias.to(low)


def _check_target(target: Tensor, x: Tensor) -> None:
    check_tensor("target", target)
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64 class indices, got {target.dtype}")
    check_shape("target", target, (x.shape[0],), "[batch of x]")
    check_same_device("target", target, "x", x)


def _wide_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = accumulate_dtype(x.dtype)
    steps = x.T.to(wide)[:, :, None] * weight.T.to(wide)[:, None, :]
    z = steps.cumsum(0)
    return z if bias is None else z + bias.to(wide)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute all logits in plain PyTorch; the specification, as the two that follow."""
    return _wide_logits(x, weight, bias).to(x.dtype)


def _accuracy(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    z = _wide_logits(x, weight, bias)
    own = z.gather(2, target[None, :, None].expand(z.shape[0], -1, 1))
    before = torch.arange(z.shape[2], device=z.device) < target[:, None]
    beaten = ((z > own) | ((z == own) & before)).any(2)
    return (~beaten & ~own[..., 0].isnan()).sum(1)


def _row_losses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    probs: Tensor,
    ignore_index: int,
) -> Tensor:
    with full_precision(x.device):
        z = _wide_logits(x, weight, bias)
        every = target.expand(z.shape[:2]).flatten()
        losses = F.cross_entropy(
            z.flatten(0, 1), every, reduction="none", ignore_index=ignore_index
        ).reshape(z.shape[:2])
    counts = probs[:, None] > 0
    return torch.where(counts, probs[:, None].to(z.dtype) * losses, 0).sum(0)


def _check_values(
    weight: Tensor, target: Tensor, probs: Tensor | None, ignore_index: int | None
) -> None:
    """Check values where that costs no synchronisation."""
    if target.device.type != "cpu":
        return
    classes = weight.shape[0]
    outside = (target < 0) | (target >= classes)
    if ignore_index is not None:
        outside &= target != ignore_index
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        allowed = "" if ignore_index is None else f" or equal ignore_index {ignore_index}"
        raise ValueError(
            f"target must lie in [0, {classes}){allowed}, got {int(target[row])} in row {row}"
        )
    values = None if probs is None else known_range(probs)
    if values is not None and not 0 <= values[0] <= values[1] < float("inf"):
        raise ValueError(
            f"probs must be finite and not negative, got values from {values[0]} to {values[1]}"
        )


def _accuracy_reference(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    _check_values(weight, target, None, None)
    return _accuracy(x, weight, bias, target)


def _loss_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    probs: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    _check_values(weight, target, probs, ignore_index)
    counted = (probs > 0) & (target != ignore_index)[:, None]
    log_sum_exp = torch.where(counted, _wide_logits(x, weight, bias).logsumexp(2).T, 0)
    rows = _row_losses(x, weight, bias, target, probs, ignore_index)
    return rows, log_sum_exp.contiguous()


def _loss_backward_reference(
    grad_rows: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    probs: Tensor,
    log_sum_exp: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients by formula: G_d is the sum of the gradients g_k of z_k over k >= d."""
    z = _wide_logits(x, weight, bias)
    wide = z.dtype
    counted = (target != ignore_index)[:, None]
    one_hot = counted & (target[:, None] == torch.arange(z.shape[2], device=z.device))
    factor = probs.to(wide)[:, None, None] * grad_rows.to(wide)[:, None]
    g = factor * (torch.exp(z - log_sum_exp.T[:, :, None]) - one_hot.to(wide))
    g = torch.where(counted & (probs[:, None, None] > 0), g, 0)
    total = g.flip(0).cumsum(0).flip(0)
    with full_precision(x.device):
        grad_x = torch.einsum("dbc,cd->bd", total, weight.to(wide))
        grad_weight = torch.einsum("dbc,bd->cd", total, x.to(wide))
    return (
        grad_x.to(x.dtype).contiguous(),
        grad_weight.to(x.dtype).contiguous(),
        g.sum((0, 1)).to(x.dtype),
    )


def _logits_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[1], x.shape[0], weight.shape[0])


def _accuracy_fake(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    return target.new_empty(x.shape[1])


def _loss_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = accumulate_dtype(x.dtype)
    return x.new_empty(x.shape[0], dtype=wide), x.new_empty(x.shape, dtype=wide)


def _loss_backward_fake(
    grad_rows: Tensor, x: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(weight.shape), x.new_empty(weight.shape[0])


def _logits_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


# G_d, the sum over k >= d of the gradients of z_k, is as large as the result: plain PyTorch is
# bound by its memory, as a kernel would be.
def _logits_rule(backend: str | None, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    wide = accumulate_dtype(x.dtype)
    total = grad.to(wide).flip(0).cumsum(0).flip(0)
    with full_precision(x.device):
        grad_x = torch.einsum("dbc,cd->bd", total, weight.to(wide)).to(x.dtype)
        grad_weight = torch.einsum("dbc,bd->cd", total, x.to(wide)).to(x.dtype)
    wants_bias = ctx.needs_input_grad[2]
    grad_bias = grad.to(wide).sum((0, 1)).to(x.dtype) if wants_bias else None
    return grad_x, grad_weight, grad_bias


def _loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.ignore_index = inputs[5]


def _loss_rule(backend: str | None, ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    grad_x, grad_weight, grad_bias = PREFIX_CROSS_ENTROPY_BACKWARD.kernel(backend)(
        grad, *ctx.saved_tensors, ctx.ignore_index
    )
    bias = ctx.saved_tensors[2]
    return grad_x, grad_weight, None if bias is None else grad_bias, None, None, None


def _loss_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.ignore_index = inputs[7]


def _loss_backward_rule(backend: str | None, ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
    """Differentiate the gradients through the reference, which holds all logits."""
    grad_rows, x, weight, bias, target, probs = ctx.saved_tensors
    data = [tensor for tensor in (x, weight, bias) if tensor is not None]

    def rows(*data: Tensor) -> Tensor:
        call: list[Any] = [*data, *(None,) * (bias is None), target, probs, ctx.ignore_index]
        return _row_losses(*call)

    by_rows, *by_data = differentiate_backward(rows, grad_rows, data, cotangents[: len(data)])
    return (by_rows, *by_data, *(None,) * (7 - len(data)))


PREFIX_LOGITS = Operator(
    "prefix_logits",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=_logits_fake,
    reference=_logits,
    setup_context=_logits_context,
    backward=_logits_rule,
)
PREFIX_ACCURACY = Operator(
    "prefix_accuracy",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor target) -> Tensor",
    fake=_accuracy_fake,
    reference=_accuracy_reference,
    triton="prefix_scan:prefix_accuracy",
)
PREFIX_CROSS_ENTROPY = Operator(
    "prefix_cross_entropy",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor probs, int ignore_index) -> "
    "(Tensor row_loss, Tensor log_sum_exp)",
    fake=_loss_fake,
    reference=_loss_reference,
    triton="prefix_scan:prefix_cross_entropy",
    setup_context=_loss_context,
    backward=_loss_rule,
)
PREFIX_CROSS_ENTROPY_BACKWARD = Operator(
    "prefix_cross_entropy_backward",
    "(Tensor grad_rows, Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor probs, "
    "Tensor log_sum_exp, int ignore_index) -> "
    "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    fake=_loss_backward_fake,
    reference=_loss_backward_reference,
    triton="prefix_scan:prefix_cross_entropy_backward",
    setup_context=_loss_backward_context,
    backward=_loss_backward_rule,
)
