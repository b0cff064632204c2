"""MeanFlow: learn average velocities, so that one step carries noise to data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_not_negative,
    check_one_of,
    check_probability,
    check_same_device,
    check_same_dtype,
    known_range,
)
from regularizers._shared.flow_path import on_path
from regularizers._shared.reductions import REDUCTIONS, Reduction
from regularizers.ops._operator import accumulate_dtype

_TIME_MEAN, _TIME_DEVIATION = -0.4, 1.0  # of the logits of times


def meanflow_loss(
    u: Callable[..., Any],
    data: Tensor,
    cond: Any = None,
    *,
    noise: Tensor | None = None,
    r: Tensor | None = None,
    t: Tensor | None = None,
    flow_ratio: float = 0.5,
    adaptive_power: float = 0.0,
    eps: float = 1e-3,
    reduction: Reduction = "mean",
    has_aux: bool = False,
    generator: torch.Generator | None = None,
) -> Any:
    r"""Compare a model's average velocity with what the MeanFlow identity makes of it.

    .. math::
        z_t = (1 - t)\, x + t \epsilon, \quad v = \epsilon - x, \qquad
        u_{\mathrm{tgt}} = v - (t - r) \frac{d}{dt} u(z_t, r, t), \qquad
        L = \operatorname{mean} w\, (u - u_{\mathrm{tgt}})^2

    The total derivative goes along (v, 0, 1) in (z, r, t), by forward-mode differentiation: model
    and derivative are one pass. The target is a constant. Data stand at t = 0 and noise at t = 1,
    as in :func:`flow_matching_loss`, which this is where r = t; :func:`meanflow_sample` goes from 1
    down to 0. The weight w is 1, or :math:`1 / (\|u - u_{\mathrm{tgt}}\|^2 + \epsilon_0)^p`, a
    constant too, with the norm of a whole sample.

    Args:
        u: ``u(z, r, t)``, or ``u(z, r, t, cond)`` where ``cond`` is given; returns the shape of
            ``data``. All that it is made of must have a forward-mode derivative (not the fused
            kernels of attention: take ``torch.nn.attention.SDPBackend.MATH``).
        data: x, ``[B, *]``, such as chunks of actions ``[B, H, D]``.
        cond: anything, handed on.
        noise: :math:`\epsilon`, shape of ``data``; standard normal when omitted.
        r: times ``[B]`` in [0, t]; given with ``t`` or not at all.
        t: times ``[B]`` in [0, 1]. Omitted, r and t are the smaller and the larger of two
            logistic-normal draws, :math:`\mathrm{sigmoid}(N(-0.4, 1))`.
        flow_ratio: probability that a sample has r = t, plain flow matching; for drawn times.
        adaptive_power: p, at least 0; 0 for none, 1 as MeanFlow trains on images.
        eps: :math:`\epsilon_0`, at least 0.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for the weighted square of every element.
        has_aux: ``u`` returns ``(velocity, aux)``, and this function ``(loss, aux)``, as in
            ``torch.func.jvp``: for the penalty of a
            :class:`~regularizers.representation.DispersiveRegularizer`. What leaves ``u`` by
            another way belongs to the derivative that is being taken and must not be used.
        generator: to draw noise and times from; not inside ``torch.compile``.

    Returns:
        The loss, with no dimensions (shape of ``data`` for ``"none"``); float64 for float64, else
        float32.

    Raises:
        TypeError: a tensor is not floating-point or of another dtype than ``data``.
        ValueError: shapes do not fit, a time is outside [0, 1] or r above t (checked on CPU tensors
            outside of ``torch.compile``), or a number is out of range. NaN gives NaN.

    Example:
        >>> from regularizers.representation import DispersiveRegularizer
        >>> class Policy(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.hidden = torch.nn.Linear(7 + 2, 64)
        ...         self.out = torch.nn.Linear(64, 7)
        ...     def forward(self, z, r, t):
        ...         return self.out(self.hidden(torch.cat([z, r[:, None], t[:, None]], 1)).tanh())
        >>> policy = DispersiveRegularizer(Policy(), ["hidden"], weight=0.5)
        >>> loss, penalty = meanflow_loss(policy, torch.randn(32, 7), has_aux=True)
        >>> (loss + penalty).backward()
        >>> actions = meanflow_sample(policy.model, (32, 7))

    Source:
        Z. Geng, M. Deng, X. Bai, J. Z. Kolter, K. He, "Mean Flows for One-step Generative
        Modeling", 2025, arXiv 2505.13447, in the form that G. Zou et al., arXiv 2510.07865, train
        policies with; their released code read for times and direction, which their text has the
        other way round. There half the batch has r = t; here each sample, with that probability.
    """
    check_floating("data", data)
    check_probability("flow_ratio", flow_ratio)
    check_not_negative("adaptive_power", adaptive_power)
    check_not_negative("eps", eps)
    check_one_of("reduction", reduction, REDUCTIONS)
    if data.dim() < 1 or data.numel() == 0:
        raise ValueError(f"data must have shape [batch >= 1, ...], got {list(data.shape)}")
    if generator is not None and torch.compiler.is_compiling():
        raise RuntimeError("generator must not be given inside torch.compile; give noise, r and t")
    if (r is None) != (t is None):
        raise ValueError("r and t must both be given, or neither")
    if noise is None:
        noise = torch.randn(data.shape, dtype=data.dtype, device=data.device, generator=generator)
    if r is None or t is None:
        r, t = _times(data, flow_ratio, generator)
    else:
        _check_before(r, t, data)
    z, velocity = on_path(data, noise, t, "linear")

    def field(z: Tensor, r: Tensor, t: Tensor) -> Any:
        found = u(z, r, t) if cond is None else u(z, r, t, cond)
        predicted = found[0] if has_aux else found
        if predicted.shape != data.shape:
            raise ValueError(
                f"u must return the shape of data ({list(data.shape)}), got {list(predicted.shape)}"
            )
        return found

    tangents = (velocity, torch.zeros_like(r), torch.ones_like(t))
    predicted, slope, *aux = torch.func.jvp(field, (z, r, t), tangents, has_aux=has_aux)
    wide = accumulate_dtype(data.dtype)
    span = (t - r).to(wide).view(-1, *[1] * (data.dim() - 1))
    # Where r = t nothing is left of the slope, not even an infinite one.
    correction = torch.where(span == 0, 0, span * slope.detach().to(wide))
    squares = (predicted.to(wide) - (velocity.to(wide) - correction).detach()).square()
    if adaptive_power:
        total = squares.detach().flatten(1).sum(1) if data.dim() > 1 else squares.detach()
        squares = squares * (total + eps).pow(-adaptive_power).view_as(span)
    loss = squares
    if reduction != "none":
        loss = squares.mean() if reduction == "mean" else squares.sum()
    return (loss, *aux) if has_aux else loss


def meanflow_sample(
    u: Callable[..., Tensor],
    shape: Sequence[int],
    cond: Any = None,
    *,
    steps: int = 1,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Carry noise to data along average velocities, in one step or a few equal ones.

    .. math:: z_r = z_t - (t - r)\, u(z_t, r, t), \qquad t = 1 \to 0

    Args:
        u: ``u(z, r, t)``, or ``u(z, r, t, cond)`` where ``cond`` is given; r and t are ``[B]``.
        shape: of the samples, ``[B, *]``.
        cond: anything, handed on.
        steps: at least 1.
        noise: where to start, of that shape; standard normal when omitted.
        generator: to draw the noise from.
        device: of the noise that is drawn.
        dtype: likewise.

    Returns:
        Samples of ``shape``. Gradients flow unless you call it under ``torch.no_grad()``.

    Raises:
        TypeError: ``noise`` is not floating-point, or ``steps`` not an int.
        ValueError: ``steps`` is below 1 or ``noise`` of another shape.

    Example:
        >>> field = lambda z, r, t: -(z + 1) / (2 - t)[:, None]  # where data = 2 noise + 1
        >>> meanflow_sample(field, (1, 1), noise=torch.tensor([[0.7]]))
        tensor([[2.4000]])

    Source:
        Z. Geng et al., 2025, arXiv 2505.13447, and G. Zou et al., arXiv 2510.07865; released code
        read.
    """
    check_at_least("steps", steps, 1)
    if len(shape) < 1:
        raise ValueError(f"shape must have a batch, got {tuple(shape)}")
    if noise is None:
        noise = torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)
    check_floating("noise", noise)
    if tuple(noise.shape) != tuple(shape):
        raise ValueError(f"noise must have shape {list(shape)}, got {list(noise.shape)}")
    z = noise
    times = [step / steps for step in range(steps, -1, -1)]
    for late, early in itertools.pairwise(times):
        t, r = (z.new_full((len(z),), time) for time in (late, early))
        z = z - (late - early) * (u(z, r, t) if cond is None else u(z, r, t, cond))
    return z


def _times(
    data: Tensor, flow_ratio: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw the pairs of times [B]."""
    options = {"dtype": accumulate_dtype(data.dtype), "device": data.device, "generator": generator}
    logits = torch.randn((2, len(data)), **options)  # type: ignore[call-overload]
    early, late = (_TIME_MEAN + _TIME_DEVIATION * logits).sigmoid().to(data.dtype).aminmax(dim=0)
    flow = torch.rand((len(data),), **options) < flow_ratio  # type: ignore[call-overload]
    return torch.where(flow, late, early), late


def _check_before(r: Tensor, t: Tensor, data: Tensor) -> None:
    check_floating("r", r)
    check_floating("t", t)
    check_same_dtype("r", r, "data", data)
    check_same_device("r", r, "data", data)
    for name, time in (("r", r), ("t", t)):
        if time.shape != data.shape[:1]:
            raise ValueError(f"{name} must have shape [{len(data)}], got {list(time.shape)}")
    least = known_range(r.detach())
    if least is not None and not least[0] >= 0:
        raise ValueError(f"r must be at least 0, got {least[0]}")
    gap = known_range((t - r).detach())
    if gap is not None and not gap[0] >= 0:
        raise ValueError(f"r must not be above t, got {-gap[0]} above it")
