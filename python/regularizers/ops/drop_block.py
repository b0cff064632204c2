"""Fused DropBlock: whole squares of an image are dropped, the rest is scaled up."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_fraction,
    check_one_of,
    check_shape,
)
from regularizers._shared.randomness import draw_seed
from regularizers._shared.scheduled import scheduled
from regularizers.ops._layout import empty_dense
from regularizers.ops._operator import Operator, accumulate_dtype, transformed
from regularizers.ops.philox import philox_words

Gamma = Literal["simple", "exact"]
Normalize = Literal["batch", "sample"]


def drop_block(
    x: Tensor,
    p: float | Tensor,
    block_size: int = 7,
    *,
    gamma: Gamma = "simple",
    normalize: Normalize = "batch",
    shared_channels: bool = True,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Drop squares of b x b pixels and scale up what is left.

    .. math::
        s_{iyx} \sim \mathrm{Bernoulli}(\gamma), \qquad
        m_{iyx} = 1 - \max_{|u|, |v| \le (b - 1) / 2} s_{i, y+u, x+v}, \qquad
        y = \frac{\mathrm{numel}(m)}{\sum m}\, m \odot x

    ``gamma="simple"`` takes :math:`\gamma = p / b^2`; blocks may stick out of the image, and a
    pixel far from the border is dropped with probability :math:`1 - (1 - \gamma)^{b^2}`, a little
    below p. ``gamma="exact"`` centres blocks only where they fit, with
    :math:`\gamma = \frac{p}{b^2} \frac{H W}{(H - b + 1)(W - b + 1)}`.

    The mask of a pixel comes from Philox words (stream 0, or the channel; element
    :math:`(i H + y) W + x`), is made again in the backward pass and never stored. Dropped elements
    are selected out: a NaN under a block does not reach the result, nor its gradient. The map is
    linear in ``x`` and its own adjoint.

    Args:
        x: ``[B, C, H, W]``; float32, float64, bfloat16 or float16.
        p: rate of dropped pixels, in [0, 1); a number, or a floating-point tensor with no
            dimensions on the device of ``x`` (then a compiled graph serves every value). Not
            differentiated through.
        block_size: side b of a block, odd; for ``"exact"`` at most H and W.
        gamma: ``"simple"`` or ``"exact"``.
        normalize: whether the factor counts over the whole ``"batch"`` or over each ``"sample"``.
            Where nothing is kept the result is 0.
        shared_channels: one mask for all channels of a sample; otherwise one for each.
        seed: int in [-2^63, 2^63) or int64 tensor with no dimensions. The same seed gives the same
            masks on every device, backend, thread count and memory layout. Drawn from the default
            generator when omitted.
        generator: generator to draw the seed from; not inside ``torch.compile`` or activation
            checkpointing.

    Returns:
        The shape and dtype of ``x``; channels_last where ``x`` is, row-major otherwise.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, or another argument is of the wrong type.
        ValueError: ``x`` does not have four dimensions, ``p`` is outside [0, 1), ``block_size`` is
            even, below 1 or too large for ``"exact"``, or an option is unknown.

    Example:
        >>> drop_block(torch.ones(1, 1, 5, 8), 0.3, 3, seed=13)
        tensor([[[[1.2903, 1.2903, 1.2903, 1.2903, 1.2903, 1.2903, 1.2903, 1.2903],
                  [1.2903, 1.2903, 1.2903, 1.2903, 0.0000, 0.0000, 0.0000, 1.2903],
                  [1.2903, 1.2903, 1.2903, 1.2903, 0.0000, 0.0000, 0.0000, 1.2903],
                  [1.2903, 1.2903, 1.2903, 1.2903, 0.0000, 0.0000, 0.0000, 1.2903],
                  [1.2903, 1.2903, 1.2903, 1.2903, 1.2903, 1.2903, 1.2903, 1.2903]]]])

    Source:
        The operator under DropBlock (2018, arXiv 1810.12890; ``"exact"`` is its formula) and under
        progressive DropBlock (2025, arXiv 2510.15527, whose public model file has ``"simple"``).
        That file adds 1e-7 to the sum of the mask; here it is exact, and an empty mask gives 0.
    """
    check_floating("x", x)
    check_shape("x", x, (None,) * 4, "[batch, channels, height, width]")
    check_block_size(block_size)
    check_one_of("gamma", gamma, ("simple", "exact"))
    check_one_of("normalize", normalize, ("batch", "sample"))
    if gamma == "exact" and not (block_size <= x.shape[2] and block_size <= x.shape[3]):
        raise ValueError(
            f"block_size must be at most the height and width of x for gamma='exact', "
            f"got {block_size} for {list(x.shape)}"
        )
    rate = scheduled("p", p, x, check_fraction)
    bits = draw_seed(seed, generator, x)
    options = (block_size, gamma == "exact", normalize == "sample", shared_channels)
    if transformed():
        return _blocks(x, rate, bits, *options)
    result: Tensor = DROP_BLOCK(x, rate, bits, *options)
    return result


def check_block_size(block_size: int) -> None:
    """Raise unless ``block_size`` is an odd int of at least 1."""
    check_at_least("block_size", block_size, 1)
    if block_size % 2 == 0:
        raise ValueError(f"block_size must be odd, got {block_size}")


def centre_ratio(height: int, width: int, block_size: int, exact: bool) -> float:
    """Return gamma / p: which share of the rate a pixel carries as the centre of a block."""
    pixels = height * width
    places = (height - block_size + 1) * (width - block_size + 1) if exact else pixels
    return pixels / (block_size * block_size * places)


def _keep(x: Tensor, p: Tensor, seed: Tensor, block_size: int, exact: bool, shared: bool) -> Tensor:
    """Return which pixels lie under no block, bool [B, 1 or C, H, W]."""
    batch, channels, height, width = x.shape
    streams = torch.arange(1 if shared else channels, device=seed.device)
    words = philox_words(seed, batch * height * width, stream=streams)
    words = words.reshape(-1, batch, height, width).transpose(0, 1)
    gamma = p * centre_ratio(height, width, block_size, exact)
    centres = words < (gamma * 2.0**32 + 0.5).to(torch.int64)
    reach = block_size // 2
    if exact:
        inside = torch.zeros_like(centres)
        inside[..., reach : height - reach, reach : width - reach] = True
        centres = centres & inside
    return F.max_pool2d(centres.float(), block_size, stride=1, padding=reach) == 0


def _blocks(
    x: Tensor,
    p: Tensor,
    seed: Tensor,
    block_size: int,
    exact: bool,
    per_sample: bool,
    shared_channels: bool,
) -> Tensor:
    """Apply DropBlock in plain PyTorch; the specification."""
    if x.numel() == 0:
        return x.clone()
    keep = _keep(x, p, seed, block_size, exact, shared_channels)
    among = keep[0].numel() if per_sample else keep.numel()
    kept = keep.sum((1, 2, 3) if per_sample else (0, 1, 2, 3), keepdim=True)
    wide = x.to(accumulate_dtype(x.dtype))
    factor = (among / kept.clamp(min=1).to(p.dtype)).to(wide.dtype)
    return torch.where(keep, wide * factor, 0).to(x.dtype)


def check_rate(p: Tensor) -> None:
    """Check the value of a scheduled rate where that costs no synchronisation."""
    if p.device.type == "cpu":
        check_fraction("p", p.item())


def _reference(x: Tensor, p: Tensor, seed: Tensor, *options: Any) -> Tensor:
    check_rate(p)
    return empty_dense(x).copy_(_blocks(x, p, seed, *options))


def _fake(x: Tensor, p: Tensor, seed: Tensor, *options: Any) -> Tensor:
    return empty_dense(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, p, seed, *options = inputs
    ctx.save_for_backward(p, seed)
    ctx.options = options


def _backward(backend: str | None, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return DROP_BLOCK.kernel(backend)(grad, *ctx.saved_tensors, *ctx.options), *[None] * 6


DROP_BLOCK = Operator(
    "drop_block",
    "(Tensor x, Tensor p, Tensor seed, SymInt block_size, bool exact, bool per_sample, "
    "bool shared_channels) -> Tensor",
    fake=_fake,
    reference=_reference,
    triton="drop_block:drop_block",
    setup_context=_setup_context,
    backward=_backward,
)
