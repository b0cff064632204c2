"""Regularization for PyTorch: every mechanism of 170 papers, on fused C++, CUDA and Triton kernels.

``regularizers.ops`` holds the fused operators; the families (``regularizers.dropout``, ...) hold
the methods. See ``regularizers.catalog`` or ``python -m regularizers list`` for which paper is
where.
"""

from __future__ import annotations

import importlib
from typing import Any

from regularizers import ops
from regularizers._info import info
from regularizers._version import __version__
from regularizers.backend import use_backend

# Families load on first use; __init__.pyi spells them out for type checkers.
_LAZY = (
    "catalog",
    "dropout",
    "finetuning",
    "generative",
    "geometry",
    "information",
    "mixing",
    "optim",
    "representation",
    "robustness",
    "scaling",
    "tasks",
    "transport",
    "weights",
)

__all__ = [
    "__version__",
    "catalog",
    "dropout",
    "finetuning",
    "generative",
    "geometry",
    "info",
    "information",
    "mixing",
    "ops",
    "optim",
    "representation",
    "robustness",
    "scaling",
    "tasks",
    "transport",
    "use_backend",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"regularizers.{name}")
    raise AttributeError(f"module 'regularizers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
