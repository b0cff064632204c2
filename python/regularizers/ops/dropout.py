"""Fused dropout samples: many masks of one tensor in one pass, and the adjoint of that map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regularizers._shared.checks import check_at_least, check_floating, check_probability
from regularizers._shared.randomness import draw_seed
from regularizers._shared.scheduled import scheduled
from regularizers.ops._operator import Operator, accumulate_dtype, transformed
from regularizers.ops.philox import dropout_mask


def dropout_samples(
    x: Tensor,
    p: float | Tensor = 0.5,
    num_samples: int = 8,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw ``num_samples`` inverted-dropout masks of one tensor and apply them, in one pass.

    .. math:: y_{s,e} = \frac{m_{s,e}}{1 - p} x_e, \qquad P(m_{s,e} = 0) = p \text{ independently}

    Masks come from Philox words (stream s, element e in row-major order) and are made again in the
    backward pass, never stored. Dropped elements are selected out: a NaN under a dropped element
    does not reach the result, nor its gradient.

    Args:
        x: ``[*]``, any shape; float32, float64, bfloat16 or float16.
        p: probability that an element is dropped, in [0, 1]; a number, or a floating-point tensor
            with no dimensions on the device of ``x`` (then a compiled graph serves every value).
            Not differentiated through.
        num_samples: number of masks, at least 1.
        seed: int in [-2^63, 2^63) or int64 tensor with no dimensions. The same seed gives the same
            masks on every device, backend, thread count and memory layout. Drawn from the default
            generator when omitted.
        generator: generator to draw the seed from; not inside ``torch.compile`` or activation
            checkpointing.

    Returns:
        ``[num_samples, *]``, dtype of ``x``; every sample is laid out in memory as
        ``torch.empty_like(x)``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, or ``seed`` or ``num_samples`` is of the
            wrong type.
        ValueError: ``p`` is outside [0, 1], ``num_samples`` is below 1, ``seed`` is out of range,
            or a tensor argument is of the wrong shape or on another device than ``x``.

    Example:
        >>> x = torch.arange(4.0)
        >>> dropout_samples(x, 0.5, num_samples=2, seed=42)
        tensor([[0., 0., 0., 0.],
                [0., 0., 0., 6.]])

    Source:
        The operator under multi-sample dropout (H. Inoue, 2019, arXiv 1905.09788).
    """
    check_floating("x", x)
    check_at_least("num_samples", num_samples, 1)
    rate = scheduled("p", p, x, check_probability)
    bits = draw_seed(seed, generator, x)
    if transformed():
        return _samples(x, rate, bits, num_samples)
    result: Tensor = DROPOUT_SAMPLES(x, rate, bits, num_samples)
    return result


def _scale(p: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(p < 1, 1 / (1 - p), 0).to(dtype)


def _samples(x: Tensor, p: Tensor, seed: Tensor, num_samples: int) -> Tensor:
    """Compute the samples in plain PyTorch; the specification."""
    keep = dropout_mask(tuple(x.shape), p, seed, num_samples)
    wide = x.to(accumulate_dtype(x.dtype))
    return torch.where(keep, wide * _scale(p, wide.dtype), 0).to(x.dtype)


def _adjoint(y: Tensor, p: Tensor, seed: Tensor) -> Tensor:
    """Compute the transposed map [s, *] -> [*] in plain PyTorch."""
    keep = dropout_mask(tuple(y.shape[1:]), p, seed, y.shape[0])
    wide = y.to(accumulate_dtype(y.dtype))
    return (torch.where(keep, wide, 0).sum(0) * _scale(p, wide.dtype)).to(y.dtype)


def _check_rate(p: Tensor) -> None:
    """Check the value of a scheduled rate where that costs no synchronisation."""
    if p.device.type == "cpu":
        check_probability("p", p.item())


def _reference(x: Tensor, p: Tensor, seed: Tensor, num_samples: int) -> Tensor:
    _check_rate(p)
    return _fake(x, p, seed, num_samples).copy_(_samples(x, p, seed, num_samples))


def _adjoint_reference(y: Tensor, p: Tensor, seed: Tensor) -> Tensor:
    _check_rate(p)
    return _adjoint_fake(y, p, seed).copy_(_adjoint(y, p, seed))


def _fake(x: Tensor, p: Tensor, seed: Tensor, num_samples: int) -> Tensor:
    like = torch.empty_like(x)
    return torch.empty_strided(
        (num_samples, *x.shape), (max(x.numel(), 1), *like.stride()), dtype=x.dtype, device=x.device
    )


def _adjoint_fake(y: Tensor, p: Tensor, seed: Tensor) -> Tensor:
    return torch.empty_like(y[0])


# The map is linear in x and its adjoint linear in y, so each is the other's derivative, to any
# order.
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, p, seed, *_ = inputs
    ctx.save_for_backward(p, seed)
    ctx.num_samples = inputs[0].shape[0] if len(inputs) == 3 else inputs[3]


def _samples_backward(backend: str | None, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return DROPOUT_SAMPLES_ADJOINT.kernel(backend)(grad, *ctx.saved_tensors), None, None, None


def _adjoint_backward(backend: str | None, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return DROPOUT_SAMPLES.kernel(backend)(grad, *ctx.saved_tensors, ctx.num_samples), None, None


DROPOUT_SAMPLES = Operator(
    "dropout_samples",
    "(Tensor x, Tensor p, Tensor seed, SymInt num_samples) -> Tensor",
    fake=_fake,
    reference=_reference,
    triton="dropout:dropout_samples",
    cuda=True,
    setup_context=_setup_context,
    backward=_samples_backward,
)
DROPOUT_SAMPLES_ADJOINT = Operator(
    "dropout_samples_adjoint",
    "(Tensor y, Tensor p, Tensor seed) -> Tensor",
    fake=_adjoint_fake,
    reference=_adjoint_reference,
    triton="dropout:dropout_samples_adjoint",
    cuda=True,
    setup_context=_setup_context,
    backward=_adjoint_backward,
)
