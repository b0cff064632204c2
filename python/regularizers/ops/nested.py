"""Prefixes of features: a linear map of the first k of them that does only the work that is kept.

The scan over all prefixes at once stands in ``prefix_scan``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_floating,
    check_same_device,
    check_same_dtype,
    check_shape,
    known_range,
)
from regularizers._shared.prefix import check_prefix_length, check_prefix_lengths
from regularizers.ops._operator import (
    Operator,
    accumulate_dtype,
    autocast_dtype,
    full_precision,
    transformed,
)


def prefix_linear(x: Tensor, weight: Tensor, bias: Tensor | None, k: int | Tensor) -> Tensor:
    r"""Apply a linear layer to the first ``k`` features of each row: a smaller product, not a mask.

    .. math:: y_{ic} = b_c + \sum_{d < k_i} x_{id} W_{cd}

    Nothing is rescaled. Neither pass touches what is dropped, up to the rest of a panel: columns of
    ``x.grad`` from k on are exactly 0, as are columns of ``weight.grad`` from the largest k on, and
    a NaN among the dropped entries of ``x`` reaches neither the result nor a gradient. (A NaN or
    infinity in a dropped column of ``weight`` may.) With k spread evenly over 1, ..., D both passes
    do a little over half the work of the full layer.

    Args:
        x: ``[..., D]``; float32, float64, bfloat16 or float16.
        weight: ``[C, D]``, dtype of ``x``.
        bias: ``[C]``, dtype of ``x``, or None.
        k: how many features count, in [1, D]: an int (then both products are of slices), an int64
            tensor with no dimensions, or one a row, ``[...]``, on the device of ``x``. Values of a
            tensor on CUDA are not checked.

    Returns:
        ``[..., C]``, dtype of ``x``; under autocast as ``F.linear``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, ``weight`` or ``bias`` is of another dtype,
            or ``k`` is neither an int nor an int64 tensor.
        ValueError: a shape does not fit, ``k`` is out of range, or a tensor is on another device.

    Example:
        >>> x, weight = torch.ones(3, 4), torch.ones(2, 4)
        >>> prefix_linear(x, weight, None, torch.tensor([1, 4, 2]))
        tensor([[1., 1.],
                [4., 4.],
                [2., 2.]])
        >>> prefix_linear(x, weight, torch.tensor([0.5, 0.0]), 3)[0]
        tensor([3.5000, 3.0000])

    Source:
        Nested dropout (O. Rippel, M. Gelbart, R. Adams, 2014, arXiv 1402.0915), of which this is
        the linear layer behind the mask.
    """
    check_linear(x, weight, bias)
    size = x.shape[-1]
    if isinstance(k, Tensor):
        check_prefix_lengths(k, size, x, x.dim() - 1)
    else:
        check_prefix_length(k, size)
        if x.device.type != "cpu" or x.dtype.itemsize == 2 or transformed():
            return F.linear(x[..., :k], weight[:, :k], bias)
        # Autograd's gradient of a slice is a full one that it fills with zeros and copies into.
        k = torch.full((), k)
    low = autocast_dtype(x.device)
    if low is not None and x.dtype != torch.float64:
        x, weight = x.to(low), weight.to(low)
        bias = None if bias is None else bias.to(low)
    if transformed():
        return _linear(x, weight, bias, k)
    lengths = k if k.dim() == 0 else k.expand(x.shape[:-1]).reshape(-1)
    y: Tensor = PREFIX_LINEAR(x.reshape(-1, size), weight, bias, lengths)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless the three are the operands of a linear layer."""
    check_floating("x", x)
    if x.dim() < 1:
        raise ValueError(f"x must have shape [..., features], got {list(x.shape)}")
    check_floating("weight", weight)
    if bias is not None:
        check_floating("bias", bias)
    check_shape("weight", weight, (None, x.shape[-1]), "[classes, features of x]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_same_device(name, tensor, "x", x)
            if autocast_dtype(x.device) is None:
                check_same_dtype(name, tensor, "x", x)
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],), "[classes of weight]")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, k: Tensor) -> Tensor:
    """Compute the layer in plain PyTorch; the specification."""
    kept = torch.arange(x.shape[-1], device=x.device) < k.unsqueeze(-1)
    wide = accumulate_dtype(x.dtype)
    with full_precision(x.device):
        y = F.linear(
            torch.where(kept, x, 0).to(wide),
            weight.to(wide),
            None if bias is None else bias.to(wide),
        )
    return y.to(x.dtype)


def _linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, k: Tensor, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    kept = torch.arange(x.shape[-1], device=x.device) < k.unsqueeze(-1)
    wide = accumulate_dtype(x.dtype)
    g = grad.to(wide)
    with full_precision(x.device):
        grad_x = torch.where(kept, g @ weight.to(wide), 0) if wants_x else x.new_empty(0)
        grad_weight = g.T @ torch.where(kept, x, 0).to(wide) if wants_weight else x.new_empty(0)
    return grad_x.to(x.dtype), grad_weight.to(x.dtype)


def _check_values(k: Tensor, size: int) -> None:
    values = known_range(k)
    if values is not None and not 1 <= values[0] <= values[1] <= size:
        raise ValueError(f"k must lie in [1, {size}], got values from {values[0]} to {values[1]}")


def _linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, k: Tensor) -> Tensor:
    _check_values(k, x.shape[1])
    return _linear(x, weight, bias, k)


def _linear_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, k: Tensor, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    _check_values(k, x.shape[1])
    return _linear_backward(grad, x, weight, k, wants_x, wants_weight)


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, k: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _linear_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, k: Tensor, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if wants_x else 0),
        x.new_empty(weight.shape if wants_weight else 0),
    )


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, k = inputs
    ctx.save_for_backward(x, weight, k)


def _linear_rule(backend: str | None, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, k = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
    grad_x, grad_weight = PREFIX_LINEAR_BACKWARD.kernel(backend)(
        grad, x, weight, k, wants_x, wants_weight
    )
    return (
        grad_x if wants_x else None,
        grad_weight if wants_weight else None,
        grad.sum(0) if wants_bias else None,
        None,
    )


def _linear_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, x, weight, k, wants_x, wants_weight = inputs
    ctx.save_for_backward(grad, x, weight, k)
    ctx.wants = (wants_x, wants_weight)


# The layer is bilinear in x and W, so its second derivatives are layers and gradients of layers
# again: those of <u, dx> + <V, dW> = <g, P_k(u) W' + P_k(x) V'>.
def _linear_backward_rule(
    backend: str | None, ctx: Any, by_x: Tensor, by_weight: Tensor
) -> tuple[Any, ...]:
    grad, x, weight, k = ctx.saved_tensors
    wants_x, wants_weight = ctx.wants
    forward = PREFIX_LINEAR.kernel(backend)
    backward = PREFIX_LINEAR_BACKWARD.kernel(backend)
    parts = []
    grad_x = grad_weight = None
    if wants_x:
        parts.append(forward(by_x, weight, None, k))
        _, grad_weight = backward(grad, by_x, weight, k, False, True)
    if wants_weight:
        parts.append(forward(x, by_weight, None, k))
        grad_x, _ = backward(grad, x, by_weight, k, True, False)
    grad_grad = None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return grad_grad, grad_x, grad_weight, None, None, None


PREFIX_LINEAR = Operator(
    "prefix_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor k) -> Tensor",
    fake=_linear_fake,
    reference=_linear_reference,
    triton="nested:prefix_linear",
    setup_context=_linear_context,
    backward=_linear_rule,
)
PREFIX_LINEAR_BACKWARD = Operator(
    "prefix_linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor k, bool wants_x, bool wants_weight) -> "
    "(Tensor grad_x, Tensor grad_weight)",
    fake=_linear_backward_fake,
    reference=_linear_backward_reference,
    triton="nested:prefix_linear_backward",
    setup_context=_linear_backward_context,
    backward=_linear_backward_rule,
)
