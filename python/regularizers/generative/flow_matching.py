"""Flow matching: regress the velocity that carries data to noise along a fixed path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_floating,
    check_one_of,
)
from regularizers._shared.flow_path import PATHS, Path, on_path
from regularizers._shared.reductions import REDUCTIONS, Reduction, reduce_rows
from regularizers.ops._operator import loss_dtype


def flow_matching_loss(
    velocity_fn: Callable[..., Tensor],
    data: Tensor,
    cond: Any = None,
    *,
    noise: Tensor | None = None,
    t: Tensor | None = None,
    path: Path = "linear",
    reduction: Reduction = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Compare a model's velocity with that of the path between data and noise.

    .. math::
        x_t = \alpha_t x + \sigma_t \epsilon, \qquad v = \alpha'_t x + \sigma'_t \epsilon, \qquad
        L = \operatorname{mean} (v_\theta(x_t, t, c) - v)^2

    with :math:`\alpha_t = 1 - t,\ \sigma_t = t,\ v = \epsilon - x` for ``"linear"``, and
    :math:`\alpha_t = \cos\frac{\pi t}{2},\ \sigma_t = \sin\frac{\pi t}{2}` for ``"cosine"``. Data
    stand at t = 0 and noise at t = 1 throughout this library: sample by integrating from 1 down to
    0. Robot policies after pi-0 count the other way; theirs is -v at 1 - t.

    Args:
        velocity_fn: ``velocity_fn(x_t, t)``, or ``velocity_fn(x_t, t, cond)`` where ``cond`` is
            given; returns the shape of ``data``.
        data: x, ``[B, *]``, such as chunks of actions ``[B, H, D]``.
        cond: anything, handed on.
        noise: :math:`\epsilon`, shape of ``data``; standard normal when omitted.
        t: times ``[B]`` in [0, 1]; uniform when omitted.
        path: ``"linear"`` or ``"cosine"``.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for the square of every element, which a
            mask of padded actions may then weight.
        generator: to draw noise and times from; not inside ``torch.compile``.

    Returns:
        The loss, with no dimensions (shape of ``data`` for ``"none"``); dtype of ``data``, float32
        under autocast.

    Raises:
        TypeError: a tensor is not floating-point or of another dtype than ``data``.
        ValueError: shapes do not fit, a time is outside [0, 1] (checked on CPU tensors outside of
            ``torch.compile``), or a word is unknown.

    Example:
        >>> policy = torch.nn.Linear(7 + 1 + 3, 7)
        >>> def velocity(x, t, state):
        ...     horizon = x.shape[1]
        ...     extra = torch.cat([t[:, None], state], -1)[:, None].expand(-1, horizon, -1)
        ...     return policy(torch.cat([x, extra], -1))
        >>> actions, state = torch.randn(16, 10, 7), torch.randn(16, 3)
        >>> flow_matching_loss(velocity, actions, state).backward()
        >>> x, noise = torch.zeros(1, 2), torch.ones(1, 2)
        >>> flow_matching_loss(lambda x, t: 3 * x, x, noise=noise, t=torch.tensor([0.5]))
        tensor(0.2500)

    Source:
        Y. Lipman et al., "Flow Matching for Generative Modeling", 2022, arXiv 2210.02747, and X.
        Liu, C. Gong, Q. Liu, 2022, arXiv 2209.03003, for the linear path; the loss that the study
        of arXiv 2602.09722 trains its policies with. Which times it draws is not known; uniform
        here.
    """
    check_floating("data", data)
    check_one_of("path", path, PATHS)
    check_one_of("reduction", reduction, REDUCTIONS)
    if data.dim() < 1:
        raise ValueError("data must have shape [batch, ...], got no dimensions")
    if generator is not None and torch.compiler.is_compiling():
        raise RuntimeError("generator must not be given inside torch.compile; give noise and t")
    if noise is None:
        noise = torch.randn(data.shape, dtype=data.dtype, device=data.device, generator=generator)
    if t is None:
        t = torch.rand(len(data), dtype=data.dtype, device=data.device, generator=generator)
    x_t, velocity = on_path(data, noise, t, path)
    predicted = velocity_fn(x_t, t) if cond is None else velocity_fn(x_t, t, cond)
    if predicted.shape != data.shape:
        raise ValueError(
            f"velocity_fn must return the shape of data ({list(data.shape)}), "
            f"got {list(predicted.shape)}"
        )
    wide = torch.promote_types(data.dtype, torch.float32)
    squares = (predicted.to(wide) - velocity.to(wide)).square()
    return reduce_rows(squares, reduction).to(loss_dtype(data))
