"""The gate of gradient dropout: what another gradient opposes is dropped at random, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_not_negative,
    check_probability,
    check_same_device,
    check_same_dtype,
)
from regularizers._shared.randomness import draw_seed
from regularizers._shared.scheduled import scheduled
from regularizers.ops._layout import in_layout_of
from regularizers.ops._operator import Operator, accumulate_dtype, transformed
from regularizers.ops.philox import philox_words


def gradient_gate(
    g_task: Tensor,
    g_reg: Tensor,
    drop_strength: float | Tensor = 1.0,
    *,
    eps: float = 1e-8,
    stream: int = 0,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Keep or weaken each entry of a gradient by its agreement with another, in one pass.

    .. math::
        y &= g_a \text{ where } U < P, \qquad (1 - \lambda)\, g_a \text{ elsewhere} \\
        P &= \tfrac12 \Bigl(1 + \mathrm{sign}(g_a) \frac{g_a + g_b}{|g_a| + |g_b| + \epsilon}\Bigr),
        \qquad U \sim U(0, 1)

    U is made of the upper 24 bits of Philox word e of the stream for entry e, in row-major order. P
    is 1 where a gradient is infinite or NaN. Reading two gradients and writing one is all the
    memory traffic: 12 bytes a float32 entry; neither P nor U is stored. Where the result is
    differentiated, the gate is a constant, and is made again in the backward pass.

    Args:
        g_task: :math:`g_a` ``[*]``; float32, float64, bfloat16 or float16.
        g_reg: :math:`g_b`, same shape, dtype and device.
        drop_strength: :math:`\lambda` in [0, 1]: 1 drops entirely; a number, or a floating-point
            tensor with no dimensions on the device of ``g_task``.
        eps: added to the denominator, at least 0.
        stream: number of the random stream, in [0, 2^32).
        seed: int in [-2^63, 2^63) or int64 tensor with no dimensions; drawn when omitted.
        generator: generator to draw the seed from; not inside ``torch.compile`` or activation
            checkpointing.

    Returns:
        The shape and dtype of ``g_task``; channels_last where ``g_task`` is, row-major otherwise.

    Raises:
        TypeError: a gradient is not a floating-point tensor, or their dtypes differ.
        ValueError: shapes or devices differ, or a number is out of range.

    Example:
        >>> g_task = torch.ones(4)
        >>> gradient_gate(g_task, torch.tensor([1.0, 1.0, -1e6, -1e6]), seed=0)
        tensor([1., 1., 0., 0.])

    Source:
        The operator under :func:`regularizers.optim.gradient_dropout` (2023, arXiv 2307.15049).
    """
    check_gradients(g_task, g_reg)
    check_not_negative("eps", eps)
    check_at_least("stream", stream, 0)
    if stream >= 2**32:
        raise ValueError(f"stream must be below 2^32, got {stream}")
    strength = scheduled("drop_strength", drop_strength, g_task, check_probability)
    bits = draw_seed(seed, generator, g_task)
    arguments = (g_task, g_task.detach(), g_reg.detach(), strength, bits, float(eps), stream)
    if transformed():
        return _gated(*arguments)
    return in_layout_of(g_task, GRADIENT_GATE(*arguments))


def agreement(g_task: Tensor, g_reg: Tensor, eps: float) -> Tensor:
    """Return how likely each entry is kept, in the accumulation type."""
    dtype = accumulate_dtype(g_task.dtype)
    task, reg = g_task.to(dtype), g_reg.to(dtype)
    share = (task.sign() * reg + task.abs()) / (task.abs() + reg.abs() + eps)
    return share.nan_to_num(1.0) * 0.5 + 0.5


def check_gradients(g_task: Tensor, g_reg: Tensor) -> None:
    """Raise unless both are gradients of one tensor."""
    check_floating("g_task", g_task)
    check_floating("g_reg", g_reg)
    if g_reg.shape != g_task.shape:
        raise ValueError(
            f"g_reg must have the shape of g_task {list(g_task.shape)}, got {list(g_reg.shape)}"
        )
    check_same_dtype("g_reg", g_reg, "g_task", g_task)
    check_same_device("g_reg", g_reg, "g_task", g_task)


def check_strength(drop_strength: Tensor) -> None:
    """Check the value of the strength where that costs no synchronisation."""
    if drop_strength.device.type == "cpu":
        check_probability("drop_strength", drop_strength.item())


def _gated(
    value: Tensor,
    g_task: Tensor,
    g_reg: Tensor,
    drop_strength: Tensor,
    seed: Tensor,
    eps: float,
    stream: int,
) -> Tensor:
    """Gate ``value`` in plain PyTorch; the specification."""
    probability = agreement(g_task, g_reg, eps)
    upper = philox_words(seed, g_task.numel(), stream=stream) >> 8
    uniform = upper.reshape(g_task.shape).to(probability.dtype) * 2.0**-24
    # Selected, so that an infinite entry that is dropped entirely gives 0 and not NaN.
    rest = torch.where(drop_strength < 1, value * (1 - drop_strength).to(probability.dtype), 0)
    return torch.where(uniform < probability, value, rest).to(value.dtype)


def _reference(
    value: Tensor,
    g_task: Tensor,
    g_reg: Tensor,
    drop_strength: Tensor,
    seed: Tensor,
    eps: float,
    stream: int,
) -> Tensor:
    check_strength(drop_strength)
    return _gated(value, g_task, g_reg, drop_strength, seed, eps, stream).contiguous()


# Linear in `value`; the map is its own adjoint.
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, eps, stream = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (eps, stream)


def _backward(backend: str | None, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return GRADIENT_GATE.kernel(backend)(grad, *ctx.saved_tensors, *ctx.options), *[None] * 6


GRADIENT_GATE = Operator(
    "gradient_gate",
    "(Tensor value, Tensor g_task, Tensor g_reg, Tensor drop_strength, Tensor seed, float eps, "
    "SymInt stream) -> Tensor",
    fake=lambda value, *_: value.new_empty(value.shape),
    reference=_reference,
    triton="gradient_gate:gradient_gate",
    setup_context=_setup_context,
    backward=_backward,
)
