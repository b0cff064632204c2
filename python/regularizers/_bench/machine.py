"""The machine that a report's numbers come from."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import sys
from pathlib import Path

import torch

from regularizers import info


def describe(device: str) -> dict[str, str | float]:
    """Return what a reader needs to place the numbers: hardware, versions, settings, command."""
    facts = info()
    return {
        "cpu": _cpu_model(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "",
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "memory_bytes": _memory_bytes(),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "regularizers": facts["regularizers"],
        "instruction_set": facts["build"].get("instruction_set", "none: nothing compiled"),
        "backend": facts["forced"] or "automatic",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _cpu_model() -> str:
    match = re.search(r"^model name\s*: (.*)$", _read("/proc/cpuinfo"), re.M)
    return match[1] if match else platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # fewer than the machine has, inside a container
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return 0
