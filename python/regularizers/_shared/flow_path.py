"""The paths between data and noise of flow matching."""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import Tensor

from regularizers._shared.checks import (
    check_floating,
    check_same_device,
    check_same_dtype,
    known_range,
)

Path = Literal["linear", "cosine"]
PATHS: tuple[str, ...] = get_args(Path)


def on_path(data: Tensor, noise: Tensor, t: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """Return the points ``[B, *]`` at times ``[B]`` and their velocities; data stand at t = 0.

    Raises:
        TypeError: a tensor is not floating-point, or of another dtype than the data.
        ValueError: shapes do not fit, or a time is outside [0, 1] (checked on CPU tensors outside
            of ``torch.compile``).
    """
    _check("noise", noise, data, tuple(data.shape))
    _check("t", t, data, (len(data),))
    times = known_range(t.detach())
    if times is not None and not (times[0] >= 0 and times[1] <= 1):
        raise ValueError(f"t must lie in [0, 1], got values from {times[0]} to {times[1]}")
    t = t.view(-1, *[1] * (data.dim() - 1))
    if path == "linear":
        return (1 - t) * data + t * noise, noise - data
    angle = math.pi / 2 * t
    cosine, sine = angle.cos(), angle.sin()
    return cosine * data + sine * noise, math.pi / 2 * (cosine * noise - sine * data)


def _check(name: str, tensor: Tensor, data: Tensor, shape: tuple[int, ...]) -> None:
    check_floating(name, tensor)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    check_same_dtype(name, tensor, "data", data)
    check_same_device(name, tensor, "data", data)
