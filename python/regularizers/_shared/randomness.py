"""Where randomness comes from: one int64 seed a call, from which a kernel makes all its bits."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from regularizers._shared.checks import check_same_device


def draw_seed(seed: int | Tensor | None, generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Return the seed of one operator call: a 0-dimensional int64 tensor beside ``like``.

    A given seed is used as it is. Without one, a fresh seed is drawn from ``generator`` or from the
    device's default generator; no host synchronisation, so a CUDA graph replays with fresh seeds.

    Args:
        seed: an int in [-2^63, 2^63), an int64 tensor with no dimensions on the device of ``like``,
            or None.
        generator: a generator of that device, or None; not inside ``torch.compile`` or activation
            checkpointing.
        like: the tensor whose device the seed goes to.

    Raises:
        TypeError: the seed is neither an int nor an int64 tensor.
        ValueError: both are given, or one is out of range, of the wrong shape or on another device.
        RuntimeError: ``generator`` inside ``torch.compile`` or ``torch.utils.checkpoint``: a
            recomputed forward pass would draw again from the caller's generator and get other
            masks, silently.
    """
    if generator is not None:
        if seed is not None:
            raise ValueError("seed and generator must not both be given")
        _check_generator(generator, like)
        return torch.empty((), dtype=torch.int64, device=like.device).random_(generator=generator)
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=like.device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int or an int64 tensor, got dtype {seed.dtype}")
        if seed.dim() != 0:
            raise ValueError(f"seed must have no dimensions, got shape {list(seed.shape)}")
        check_same_device("seed", seed, "x", like)
        return seed
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed must be an int or an int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must lie in [-2^63, 2^63), got {seed}")
    return torch.full((), seed, dtype=torch.int64, device=like.device)


def _check_generator(generator: torch.Generator, like: Tensor) -> None:
    check_caller_draws(generator)
    if generator.device.type != like.device.type:
        raise ValueError(
            f"generator must be on the device of x ({like.device}), got {generator.device}"
        )


def check_caller_draws(generator: torch.Generator) -> None:
    """Raise unless ``generator`` is one, and is used where every draw happens once."""
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "generator must not be given inside torch.compile; give a seed or nothing instead"
        )
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            raise RuntimeError(
                "generator must not be given inside torch.utils.checkpoint, whose second forward "
                "pass would draw other masks from it; give a seed or nothing instead"
            )
