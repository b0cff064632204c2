"""Argument checks that read like sentences and name the argument, what came and what was due."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

NUMBERS = (int, float, torch.SymFloat, torch.SymInt)  # symbolic ones inside torch.compile
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_probability(name: str, value: float) -> None:
    """Raise unless ``value`` lies in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def check_fraction(name: str, value: float) -> None:
    """Raise unless ``value`` lies in [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def check_positive(name: str, value: float) -> None:
    """Raise unless ``value`` is a number above 0 and finite."""
    _check_number(name, value)
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name} must be above 0 and finite, got {value}")


def check_not_negative(name: str, value: float) -> None:
    """Raise unless ``value`` is a number of at least 0 and finite."""
    _check_number(name, value)
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")


def check_finite(name: str, value: float) -> None:
    """Raise unless ``value`` is a finite number."""
    _check_number(name, value)
    if not float("-inf") < value < float("inf"):
        raise ValueError(f"{name} must be finite, got {value}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_tensor(name: str, value: object) -> None:
    """Raise unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_module(name: str, value: object) -> None:
    """Raise unless ``value`` is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is a tensor of one of the four types that the kernels know."""
    check_tensor(name, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...], meaning: str) -> None:
    """Raise unless ``tensor`` has ``shape`` (None: any size); ``meaning`` spells the shape out."""
    fits = tensor.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must have shape {meaning}, got {list(tensor.shape)}")


def check_same_device(name: str, tensor: Tensor, reference_name: str, reference: Tensor) -> None:
    """Raise unless both tensors are on one device."""
    if tensor.device != reference.device:
        raise ValueError(
            f"{name} must be on the device of {reference_name} ({reference.device}), "
            f"got {tensor.device}"
        )


def check_same_dtype(name: str, tensor: Tensor, reference_name: str, reference: Tensor) -> None:
    """Raise unless both tensors have one dtype."""
    if tensor.dtype != reference.dtype:
        raise TypeError(
            f"{name} must have the dtype of {reference_name} ({reference.dtype}), "
            f"got {tensor.dtype}"
        )


def known_range(values: Tensor) -> tuple[float, float] | None:
    """Return the least and the largest value, or None where looking would cost a synchronisation.

    Under ``torch.compile`` and functorch there are no values to look at; None as well.
    """
    if values.device.type != "cpu" or values.numel() == 0 or torch.compiler.is_compiling():
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(values):
        return None
    least, largest = values.aminmax()
    return least.item(), largest.item()


def check_values(condition: Tensor, message: Callable[[], str]) -> None:
    """Raise unless a boolean tensor with no dimensions is true.

    On a device, where looking would cost a synchronisation, and in compiled code this is an
    assertion of the device, without the values in its message.
    """
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(condition):
            raise ValueError(message())
    else:
        torch._assert_async(condition, "a value is not finite or out of range")


def check_labels(name: str, labels: Tensor, size: int) -> None:
    """Raise unless ``labels`` is a vector of ``size`` integers."""
    check_tensor(name, labels)
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{name} must be integers, got {labels.dtype}")
    if labels.dtype == torch.bool or labels.dim() != 1 or labels.shape[0] != size:
        raise ValueError(
            f"{name} must be integers of shape [{size}], got {labels.dtype} of {list(labels.shape)}"
        )
