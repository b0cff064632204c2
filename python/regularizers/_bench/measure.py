"""Measuring calls: interleaved times, page faults and peak memory, in one process.

Every round runs every candidate once, in a newly shuffled order: clock speed, neighbours on the
machine and the state of caches and heap reach all of them alike. Ratios are taken round by round.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import random
import re
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile

from regularizers._bench.case import Call

MIN_ROUNDS = 5
MAX_ROUNDS = 1000


@dataclass
class Samples:
    """What the rounds gave for one candidate: one entry a round."""

    seconds: list[float] = field(default_factory=list)
    minor_faults: list[int] = field(default_factory=list)
    major_faults: list[int] = field(default_factory=list)


def interleave(
    calls: Mapping[str, Call],
    *,
    seconds: float,
    device: str = "cpu",
    fresh_memory: bool = False,
    seed: int = 0,
    progress: Callable[[float], None] = lambda fraction: None,
) -> dict[str, Samples]:
    """Run rounds of all calls, each round in a new order, until the time is spent.

    Args:
        calls: the candidates, already warm.
        seconds: time budget; at least ``MIN_ROUNDS`` rounds run, at most ``MAX_ROUNDS``.
        device: ``"cpu"`` or ``"cuda"``.
        fresh_memory: whether to give the heap's free memory back before every call, off the clock.
        seed: seed of the orders.
        progress: told after every round which fraction of the work is done.

    Returns:
        The samples of each candidate; entry i of all of them comes from round i.
    """
    time_call = _time_cuda if device == "cuda" else _time_cpu
    order = list(calls)
    shuffle = random.Random(seed).shuffle
    samples = {name: Samples() for name in calls}
    gc.collect()
    gc.disable()  # a collection would be charged to whichever candidate happens to trigger it
    try:
        start = time.perf_counter()
        for done in range(1, MAX_ROUNDS + 1):
            shuffle(order)
            for name in order:
                if fresh_memory:
                    trim_heap()
                _sample(calls[name], time_call, samples[name])
            elapsed = time.perf_counter() - start
            progress(min(1.0, elapsed / max(seconds, 1e-9), done / MIN_ROUNDS))
            if elapsed >= seconds and done >= MIN_ROUNDS:
                break
    finally:
        gc.enable()
    return samples


def _sample(call: Call, time_call: Callable[[Call], float], samples: Samples) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF)
    samples.seconds.append(time_call(call))
    after = resource.getrusage(resource.RUSAGE_SELF)
    samples.minor_faults.append(after.ru_minflt - before.ru_minflt)
    samples.major_faults.append(after.ru_majflt - before.ru_majflt)


def _time_cpu(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _time_cuda(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def peak_allocated(call: Call, device: str = "cpu") -> int:
    """Return how far one call raises the memory handed out by torch's allocator, in bytes.

    On a CPU the profiler records every allocation and free, from Python and C++ alike; replayed in
    order, they give the exact peak, the same on every run. What is taken past the allocator (the
    packing buffers of MKL and oneDNN, ``std::vector``) or on a thread of a parallel loop is not
    seen: ``peak_resident`` is the check on that.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes its diary to stderr
    with profile(profile_memory=True) as trace:
        call()
    assert trace.kineto_results is not None
    memory = (event for event in trace.kineto_results.events() if event.name() == "[memory]")
    running = peak = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        running += event.nbytes()
        peak = max(peak, running)
    return peak


def peak_resident(call: Call) -> int | None:
    """Return how far one call raises the resident memory of the process, in bytes.

    Linux keeps the high-water mark, which is set back first: no sampling, nothing missed. Free
    memory of the heap is given back first, so that whatever the call touches counts. Beyond
    ``peak_allocated`` this sees memory taken past torch's allocator and the fragmentation of the
    heap; it does not see memory that is allocated and never touched. It varies by several MiB.

    Returns:
        Bytes, or None where there is no Linux with glibc.
    """
    if not trim_heap():
        return None
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def trim_heap() -> bool:
    """Give the free memory of the heap back to the system; False where the C library cannot."""
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is None:
        return False
    trim(0)
    return True


@functools.cache
def _c_library() -> Any:
    return ctypes.CDLL(None)


def _status(field_name: str) -> int:
    match = re.search(rf"^{field_name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert match is not None
    return int(match[1]) * 1024
