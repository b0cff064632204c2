"""Quantities that a schedule may change: tensors, so that a compiled graph serves every value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regularizers._shared.checks import NUMBERS, check_same_device, known_range


def scheduled(
    name: str, value: float | Tensor, like: Tensor, check: Callable[[str, float], None]
) -> Tensor:
    """Return a scheduled quantity as the kernels take it: float64, no dimensions, beside ``like``.

    A number is checked here. The value of a tensor is checked by the kernel on a CPU and not at all
    on CUDA, where reading it would stop the stream.
    """
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, NUMBERS):
            raise TypeError(
                f"{name} must be a number or a 0-dimensional tensor, got {type(value).__name__}"
            )
        check(name, value)
        return torch.full((), value, dtype=_dtype(like.device), device=like.device)
    if value.dim() != 0 or not value.is_floating_point():
        raise ValueError(
            f"{name} must be a number or a floating-point tensor with no dimensions, "
            f"got {value.dtype} of shape {list(value.shape)}"
        )
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad: it is not differentiated through")
    check_same_device(name, value, "x", like)
    return value.to(_dtype(like.device))


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def known_zero(value: float | Tensor) -> bool:
    """Tell whether a scheduled quantity is 0, as far as looking costs no synchronisation.

    Inside ``torch.compile`` a tensor is never known: one graph serves every value.
    """
    if isinstance(value, Tensor):
        return known_range(value) == (0.0, 0.0)
    return value == 0


class ScheduledModule(nn.Module):
    """A module with scheduled quantities: attributes that hold a tensor and are assigned numbers.

    ``module.p = 0.3`` writes into the tensor in place, so a compiled model needs no second
    compilation. The tensors follow the module from device to device, keep float64 under ``.half()``
    or ``.to(torch.bfloat16)`` (a rounded rate would be another rate) and stay out of the state
    dict.
    """

    _scheduled: dict[str, Callable[[str, float], None]]

    def schedule(self, name: str, value: float, check: Callable[[str, float], None]) -> None:
        """Make ``name`` a scheduled quantity; ``check`` raises on bad values, now and later."""
        check(name, value)
        if "_scheduled" not in self.__dict__:
            self.__dict__["_scheduled"] = {}
        self._scheduled[name] = check
        # The device is named, so that a model built under torch.device("meta") has its rates too.
        buffer = torch.tensor(float(value), dtype=torch.float64, device="cpu")
        self.register_buffer(name, buffer, persistent=False)

    def __setattr__(self, name: str, value: Any) -> None:
        check = self.__dict__.get("_scheduled", {}).get(name)
        if check is None:
            super().__setattr__(name, value)
            return
        if isinstance(value, Tensor) and value.dim() != 0:
            raise ValueError(f"{name} must have no dimensions, got shape {list(value.shape)}")
        check(name, float(value))
        getattr(self, name).fill_(float(value))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScheduledModule:
        kept = {name: getattr(self, name) for name in self.__dict__.get("_scheduled", {})}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in kept.items():
            moved = getattr(self, name)
            device = value.device if moved.device.type == "meta" else moved.device
            self._buffers[name] = value.to(device=device, dtype=_dtype(device))
        return self
