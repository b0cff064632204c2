"""What an issue report needs: versions, build facts, and what serves each operator."""

from __future__ import annotations

import platform
from typing import Any

import torch

from regularizers import _extension, backend
from regularizers._version import __version__


def info() -> dict[str, Any]:
    """Tell which kernels were built and which of them serve which operator on which device.

    Returns:
        A dict: versions (``regularizers``, ``torch``, ``python``, ``platform``), ``build`` (facts
        of the compiled kernels, empty without), ``backends`` (for each, "available" or why not),
        ``forced`` (the forced backend or None) and ``operators`` (for each operator the backend
        that serves CPU and CUDA tensors by itself).

    Example:
        >>> import regularizers
        >>> sorted(regularizers.info())
        ['backends', 'build', 'forced', 'operators', 'platform', 'python', 'regularizers', 'torch']
    """
    from regularizers.ops._operator import OPERATORS

    return {
        "regularizers": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "build": _extension.build_facts(),
        "backends": {
            name: backend.why_unavailable(name) or "available" for name in backend.BACKENDS
        },
        "forced": backend.forced_backend(),
        "operators": {
            name: {device: operator.serving(device) for device in ("cpu", "cuda")}
            for name, operator in OPERATORS.items()
        },
    }
