"""Rows of a batch mixed with other rows of it, blended or box by box, in one pass over memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regularizers._shared.checks import (
    NUMBERS,
    check_floating,
    check_probability,
    check_same_device,
    check_shape,
    check_tensor,
    known_range,
)
from regularizers.ops._operator import (
    Operator,
    accumulate_dtype,
    differentiate_backward,
    transformed,
)

MOST_BOX_SIDES = 3


def mix(x: Tensor, perm: Tensor, lam: float | Tensor) -> Tensor:
    r"""Blend every row of a batch with another row of it, in one pass.

    .. math:: y_i = \lambda_i x_i + (1 - \lambda_i) x_{\pi(i)}, \qquad i = 1, \dots, B

    Differentiable in x and :math:`\lambda`. One pass over memory finds both derivatives: since
    :math:`\pi` takes every value at most once, x gathers its gradient through the inverse of
    :math:`\pi`, without atomic additions.

    .. math::
        \dot x_j = \lambda_j \dot y_j + (1 - \lambda_{\pi^{-1}(j)})\, \dot y_{\pi^{-1}(j)}, \qquad
        \dot \lambda_i = \langle x_i - x_{\pi(i)},\, \dot y_i \rangle

    Args:
        x: ``[N, *]``; float32, float64, bfloat16 or float16.
        perm: ``[B]``, int64, B <= N different row numbers. With B = N a permutation; with B < N the
            first B rows are mixed with partners from all rows.
        lam: weight of the row itself, in [0, 1]: a number, a tensor with no dimensions, or ``[B]``
            with one for each row.

    Returns:
        ``[B, *]``, dtype of ``x``. Contiguous and channels_last inputs keep their layout, others
        become contiguous.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, ``perm`` not int64, or ``lam`` neither a
            number nor a floating-point tensor.
        ValueError: a shape or device does not fit, ``perm`` names a row twice or one that does not
            exist, or ``lam`` is outside [0, 1] or NaN. Values of tensors are checked on a CPU; on
            CUDA they are not.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [4.0, 8.0]])
        >>> mix(x, torch.tensor([1, 0]), 0.75)
        tensor([[1., 2.],
                [3., 6.]])

    Source:
        The operator under mixup (H. Zhang et al., 2018, arXiv 1710.09412) and the methods built on
        it.
    """
    check_floating("x", x)
    _check_rows(x, perm)
    weights = row_weights(lam, perm.shape[0], x, "x")
    x = x.contiguous(memory_format=_layout(x))
    if transformed():
        return _mix(x, perm, weights)
    result: Tensor = MIX(x, perm, weights)
    return result


def paste_boxes(x: Tensor, perm: Tensor, box: Tensor) -> Tensor:
    r"""Paste into every row of a batch a box cut from another row of it, in one pass.

    .. math::
        y_{i,s} = \begin{cases} x_{\pi(i),s} & s \in \mathrm{box}_i \\ x_{i,s} &
        \text{elsewhere} \end{cases}

    over all channels alike. Each element of the result is copied from the one place it comes from;
    the other is not read. Differentiable in x; the gradient gathers through the inverse of
    :math:`\pi`.

    Args:
        x: ``[N, *, S_1, ..., S_d]`` of any dtype (images may be uint8), d from 1 to 3 as ``box``
            says.
        perm: ``[B]``, int64, B <= N different row numbers.
        box: ``[d, 2]``, or ``[B, d, 2]`` with one for each row, int64: for every side the first
            place inside and the first one behind, 0 <= begin <= end <= S.

    Returns:
        ``[B, *, S_1, ..., S_d]``, dtype of ``x``. Contiguous and channels_last inputs keep their
        layout, others become contiguous.

    Raises:
        TypeError: ``x`` is not a tensor, or ``perm`` or ``box`` is not int64.
        ValueError: a shape or device does not fit, ``perm`` names a row twice or one that does not
            exist, or a box leaves the row. Values are checked on a CPU; on CUDA they are not, and a
            box is cut off at the edges.

    Example:
        >>> x = torch.tensor([[0, 0, 0, 0], [5, 6, 7, 8]])
        >>> paste_boxes(x, torch.tensor([1, 0]), torch.tensor([[1, 3]]))
        tensor([[0, 6, 7, 0],
                [5, 0, 0, 8]])

    Source:
        The operator under CutMix (S. Yun et al., 2019, arXiv 1905.04899).
    """
    check_tensor("x", x)
    _check_rows(x, perm)
    boxes = _boxes(box, x, perm)
    all_sides = boxes.shape[1] == x.dim() - 1  # channels too: they have to come first in memory
    x = x.contiguous(memory_format=torch.contiguous_format if all_sides else _layout(x))
    if transformed():
        return _paste(x, perm, boxes)
    result: Tensor = PASTE(x, perm, boxes)
    return result


def _check_rows(x: Tensor, perm: Tensor) -> None:
    if x.dim() < 1:
        raise ValueError("x must have shape [rows, ...], got no dimensions")
    check_tensor("perm", perm)
    if perm.dtype != torch.int64:
        raise TypeError(f"perm must be int64, got {perm.dtype}")
    check_shape("perm", perm, (None,), "[rows of the result]")
    check_same_device("perm", perm, "x", x)
    if perm.shape[0] > x.shape[0]:
        raise ValueError("perm must have at most as many entries as x has rows")


def row_weights(lam: float | Tensor, count: int, like: Tensor, name: str) -> Tensor:
    """Return lam as one weight for each of ``count`` rows, in the accumulation type of ``like``."""
    wide = accumulate_dtype(like.dtype)
    if not isinstance(lam, Tensor):
        if isinstance(lam, bool) or not isinstance(lam, NUMBERS):
            raise TypeError(f"lam must be a number or a tensor, got {type(lam).__name__}")
        check_probability("lam", lam)
        return torch.full((count,), lam, dtype=wide, device=like.device)
    check_floating("lam", lam)
    check_same_device("lam", lam, name, like)
    if lam.dim() != 0:
        check_shape("lam", lam, (count,), "[] or [rows]")
    return lam.to(wide).expand(count)


def _boxes(box: Tensor, x: Tensor, perm: Tensor) -> Tensor:
    """Return the boxes as the kernels take them: [B, d, 2]."""
    check_tensor("box", box)
    if box.dtype != torch.int64:
        raise TypeError(f"box must be int64, got {box.dtype}")
    check_same_device("box", box, "x", x)
    if box.dim() not in (2, 3) or box.shape[-1] != 2 or not 1 <= box.shape[-2] <= MOST_BOX_SIDES:
        raise ValueError(
            f"box must have shape [sides, 2] or [rows, sides, 2] with 1 to {MOST_BOX_SIDES} sides, "
            f"got {list(box.shape)}"
        )
    if box.dim() == 3:
        check_shape("box", box, (perm.shape[0], None, None), "[rows of perm, sides, 2]")
    if box.shape[-2] >= x.dim():
        raise ValueError(
            f"box must have fewer sides than x has dimensions ({x.dim()}), got {box.shape[-2]}"
        )
    return box.expand(perm.shape[0], *box.shape[-2:])


def _layout(x: Tensor) -> torch.memory_format:
    """Return the layout that the kernels are given: that of x if its rows are blocks of memory."""
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def _rows_like(x: Tensor, rows: int) -> Tensor:
    """Return a new tensor of so many rows, each laid out in memory as those of x."""
    strides = (max(math.prod(x.shape[1:]), 1), *x.stride()[1:])
    return torch.empty_strided((rows, *x.shape[1:]), strides, dtype=x.dtype, device=x.device)


def _mix(x: Tensor, perm: Tensor, lam: Tensor) -> Tensor:
    """Blend rows; the specification."""
    wide = x.to(lam.dtype)
    weight = lam.reshape(-1, *[1] * (x.dim() - 1))
    return (weight * wide[: perm.shape[0]] + (1 - weight) * wide[perm]).to(x.dtype)


def _inside(box: Tensor, like: Tensor) -> Tensor:
    """Return which places of the last dimensions lie in the boxes, [B, 1, ..., S_1, ..., S_d]."""
    count, sides, _ = box.shape
    inside = torch.ones((count, *[1] * (like.dim() - 1)), dtype=torch.bool, device=like.device)
    for side in range(sides):
        dimension = like.dim() - sides + side
        shape = [-1 if d == dimension else 1 for d in range(like.dim())]
        place = torch.arange(like.shape[dimension], device=like.device).reshape(shape)
        begin, end = (bound.reshape(-1, *[1] * (like.dim() - 1)) for bound in box[:, side].T)
        inside = inside & (place >= begin) & (place < end)
    return inside


def _paste(x: Tensor, perm: Tensor, box: Tensor) -> Tensor:
    """Select by boxes; the specification."""
    return torch.where(_inside(box, x), x[perm], x[: perm.shape[0]])


def _paste_adjoint(y: Tensor, perm: Tensor, box: Tensor, rows: int) -> Tensor:
    """Compute the transposed map [B, *] -> [rows, *]."""
    inside = _inside(box, y)
    wide = y.to(accumulate_dtype(y.dtype))
    own = torch.nn.functional.pad(
        torch.where(inside, 0, wide), [0, 0] * (y.dim() - 1) + [0, rows - y.shape[0]]
    )
    return own.index_add(0, perm, torch.where(inside, wide, 0)).to(y.dtype)


def _check_perm(perm: Tensor, rows: int) -> None:
    """Check values where that costs no synchronisation; messages as in csrc/cpu/mix.cpp."""
    if perm.device.type != "cpu" or perm.numel() == 0:
        return
    least, largest = (value.item() for value in perm.aminmax())
    if least < 0 or largest >= rows:
        raise ValueError(
            f"perm must hold rows in [0, {rows}), got {least if least < 0 else largest}"
        )
    if perm.unique().numel() < perm.numel():
        raise ValueError("perm must not name a row twice")


def _check_weights(lam: Tensor) -> None:
    for value in known_range(lam) or ():
        check_probability("lam", value)


def _check_box(box: Tensor, sizes: tuple[int, ...]) -> None:
    if box.device.type != "cpu":
        return
    begin, end = box.unbind(-1)
    fits = (begin >= 0) & (begin <= end) & (end <= torch.tensor(sizes))
    if not bool(fits.all()):
        raise ValueError("box must have 0 <= begin <= end <= size on every side")


def _mix_reference(x: Tensor, perm: Tensor, lam: Tensor) -> Tensor:
    _check_perm(perm, x.shape[0])
    _check_weights(lam)
    return _mix_fake(x, perm, lam).copy_(_mix(x, perm, lam))


def _mix_fake(x: Tensor, perm: Tensor, lam: Tensor) -> Tensor:
    return _rows_like(x, perm.shape[0])


def _mix_backward_reference(
    grad: Tensor, x: Tensor, perm: Tensor, lam: Tensor, want_x: bool, want_lam: bool
) -> tuple[Tensor, Tensor]:
    grad_x, grad_lam = _mix_backward_fake(grad, x, perm, lam, want_x, want_lam)
    wide = grad.to(lam.dtype)
    if want_x:
        weight = lam.reshape(-1, *[1] * (x.dim() - 1))
        total = torch.zeros(x.shape, dtype=lam.dtype, device=x.device)
        total[: perm.shape[0]] = weight * wide
        grad_x.copy_(total.index_add_(0, perm, (1 - weight) * wide))
    if want_lam:
        difference = x[: perm.shape[0]].to(lam.dtype) - x[perm].to(lam.dtype)
        grad_lam.copy_((difference * wide).flatten(1).sum(1) if x.dim() > 1 else difference * wide)
    return grad_x, grad_lam


def _mix_backward_fake(
    grad: Tensor, x: Tensor, perm: Tensor, lam: Tensor, want_x: bool, want_lam: bool
) -> tuple[Tensor, Tensor]:
    return (
        _rows_like(x, x.shape[0]) if want_x else x.new_empty(0),
        lam.new_empty(lam.shape) if want_lam else lam.new_empty(0),
    )


def _mix_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, perm, lam = inputs
    # Only the derivative in lam reads x. For the other, a gradient of x's shape tells as much.
    keeps_x = ctx.needs_input_grad[2] or perm.shape[0] != x.shape[0]
    ctx.save_for_backward(x if keeps_x else None, perm, lam)
    ctx.layout = _layout(x)


def _mix_rule(backend: str | None, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, perm, lam = ctx.saved_tensors
    want_x, _, want_lam = ctx.needs_input_grad
    grad = grad.contiguous(memory_format=ctx.layout)
    grad_x, grad_lam = MIX_BACKWARD.kernel(backend)(
        grad, grad.detach() if x is None else x, perm, lam, want_x, want_lam
    )
    return grad_x if want_x else None, None, grad_lam if want_lam else None


def _mix_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.wanted = inputs[4:]


def _mix_backward_rule(
    backend: str | None, ctx: Any, *cotangents: Tensor
) -> tuple[Tensor | None, ...]:
    grad, x, perm, lam = ctx.saved_tensors
    wanted = [c if want else None for c, want in zip(cotangents, ctx.wanted, strict=True)]
    second_grad, second_x, second_lam = differentiate_backward(
        lambda x, lam: _mix(x, perm, lam), grad, (x, lam), wanted
    )
    return second_grad, second_x, None, second_lam, None, None


def _paste_reference(x: Tensor, perm: Tensor, box: Tensor) -> Tensor:
    _check_perm(perm, x.shape[0])
    _check_box(box, tuple(x.shape[-box.shape[1] :]))
    return _paste_fake(x, perm, box).copy_(_paste(x, perm, box))


def _paste_fake(x: Tensor, perm: Tensor, box: Tensor) -> Tensor:
    return _rows_like(x, perm.shape[0])


def _paste_adjoint_reference(y: Tensor, perm: Tensor, box: Tensor, rows: int) -> Tensor:
    return _paste_adjoint_fake(y, perm, box, rows).copy_(_paste_adjoint(y, perm, box, rows))


def _paste_adjoint_fake(y: Tensor, perm: Tensor, box: Tensor, rows: int) -> Tensor:
    return _rows_like(y, rows)


# The map is linear in x and its adjoint linear in y, so each is the other's derivative.
def _paste_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensor, perm, box, *_ = inputs
    ctx.save_for_backward(perm, box)
    ctx.rows = tensor.shape[0]
    ctx.layout = _layout(tensor)


def _paste_rule(backend: str | None, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad = grad.contiguous(memory_format=ctx.layout)
    return PASTE_ADJOINT.kernel(backend)(grad, *ctx.saved_tensors, ctx.rows), None, None


def _paste_adjoint_rule(backend: str | None, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad = grad.contiguous(memory_format=ctx.layout)
    return PASTE.kernel(backend)(grad, *ctx.saved_tensors), None, None, None


MIX = Operator(
    "mix",
    "(Tensor x, Tensor perm, Tensor lam) -> Tensor",
    fake=_mix_fake,
    reference=_mix_reference,
    triton="mix:mix",
    setup_context=_mix_context,
    backward=_mix_rule,
)
MIX_BACKWARD = Operator(
    "mix_backward",
    "(Tensor grad, Tensor x, Tensor perm, Tensor lam, bool want_x, bool want_lam)"
    " -> (Tensor grad_x, Tensor grad_lam)",
    fake=_mix_backward_fake,
    reference=_mix_backward_reference,
    triton="mix:mix_backward",
    setup_context=_mix_backward_context,
    backward=_mix_backward_rule,
)
PASTE = Operator(
    "paste_boxes",
    "(Tensor x, Tensor perm, Tensor box) -> Tensor",
    fake=_paste_fake,
    reference=_paste_reference,
    triton="mix:paste_boxes",
    setup_context=_paste_context,
    backward=_paste_rule,
)
PASTE_ADJOINT = Operator(
    "paste_boxes_adjoint",
    "(Tensor y, Tensor perm, Tensor box, SymInt rows) -> Tensor",
    fake=_paste_adjoint_fake,
    reference=_paste_adjoint_reference,
    triton="mix:paste_boxes_adjoint",
    setup_context=_paste_context,
    backward=_paste_adjoint_rule,
)
