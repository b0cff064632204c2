"""Loads the compiled kernels, if they were built, and says what is there."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent


def _load(name: str) -> str:
    """Load one kernel library; the empty string on success, else why it is not there."""
    path = _FOLDER / f"lib{name}.so"
    if not path.exists():
        return "not built"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return str(error)
    return ""


def _load_cuda() -> str:
    # The library uses torch's CUDA stream shim: a CPU-only torch cannot resolve it.
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return _load("regularizers_cuda")


cpp_missing = _load("regularizers_cpu")
cuda_missing = _load_cuda()


def build_facts() -> dict[str, str]:
    """Return what the build wrote down about itself; empty where nothing was compiled."""
    try:
        module = importlib.import_module("regularizers._C")
    except ImportError:
        return {}
    facts: dict[str, str] = module.build_facts()
    facts["instruction_set"] = module.instruction_set()
    return facts
