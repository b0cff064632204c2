"""Which kernels serve the operators: automatic, or forced for a block or the whole process."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from regularizers import _extension

BACKENDS = ("reference", "cpp", "triton", "cuda")

# A plain global on purpose: a ContextVar cannot be traced by torch.compile, and a thread-local
# value is lost on the thread that runs the backward pass on CUDA. Only the operators' public
# functions read it.
_forced: str | None = None


def interpreting() -> bool:
    """Whether Triton runs in its interpreter, which accepts CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_unavailable(backend: str) -> str:
    """Say why a backend cannot be used in this process; the empty string where it can."""
    if backend == "cpp":
        return _extension.cpp_missing and f"the C++ kernels are missing: {_extension.cpp_missing}"
    if backend == "triton":
        if not _has_triton():
            return "Triton is not installed (pip install 'regularizers[triton]')"
        if not torch.cuda.is_available() and not interpreting():
            return "Triton needs a CUDA device, or TRITON_INTERPRET=1 set before import"
    if backend == "cuda":
        if _extension.cuda_missing:
            return f"the CUDA kernels are missing: {_extension.cuda_missing}"
        if not torch.cuda.is_available():
            return "there is no CUDA device"
    return ""


def _checked(backend: str | None, source: str) -> str | None:
    if backend is None:
        return None
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = why_unavailable(backend)
    if reason:
        raise RuntimeError(f"{source}={backend!r} cannot be used: {reason}")
    return backend


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Force one backend for the operators called inside the block.

    A backward pass uses the backend of its forward pass, wherever it runs. With ``torch.compile``,
    put the block around or inside the compiled function; a change of backend compiles again.

    Args:
        backend: ``"reference"`` (plain PyTorch), ``"cpp"`` (compiled CPU kernels), ``"triton"``,
            ``"cuda"`` (compiled CUDA kernels), or None for the automatic choice.

    Raises:
        ValueError: ``backend`` is not one of these names.
        RuntimeError: the backend cannot run in this process; the message says why.

    Example:
        >>> import torch, regularizers
        >>> from regularizers.ops import dropout_samples
        >>> x = torch.ones(2, 4)
        >>> with regularizers.use_backend("reference"):
        ...     y = dropout_samples(x, 0.5, num_samples=3, seed=0)
        >>> torch.equal(y, dropout_samples(x, 0.5, num_samples=3, seed=0))
        True
    """
    global _forced
    previous = _forced
    _forced = _checked(backend, "backend")
    try:
        yield
    finally:
        _forced = previous


def forced_backend() -> str | None:
    """Return the forced backend, or None while the choice is automatic."""
    return _forced


_forced = _checked(os.environ.get("REGULARIZERS_BACKEND") or None, "REGULARIZERS_BACKEND")
