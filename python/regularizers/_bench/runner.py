"""From benchmark files to reports: finds the files, measures what they list, saves the results."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from regularizers._bench import machine
from regularizers._bench.case import Call, Case, ScalingCurve
from regularizers._bench.measure import Samples, interleave, peak_allocated, peak_resident
from regularizers._bench.results import FORMAT, CaseResult, CurveResult, Report, summarise

if TYPE_CHECKING:
    from regularizers._bench.table import Screen

SECONDS, QUICK_SECONDS = 10.0, 1.0  # time budget of one case
POINT_SHARE = 0.25  # of that budget, for one point of a curve
WARM_UP_SECONDS = 0.05  # after the first call, of which at least one more follows


def run(
    family: str | None,
    *,
    device: str = "cpu",
    quick: bool = False,
    output: Path,
    seconds: float | None = None,
) -> int:
    """Run the benchmarks of one family, or of all; write its JSON and a PNG for every curve.

    Args:
        family: name of a file in ``benchmarks/``; None runs all of them.
        device: ``"cpu"`` or ``"cuda"``.
        quick: fewer cases and rounds, without ``torch.compile``.
        output: folder for the results, made if needed.
        seconds: time budget of the rounds of one case (10, or 1 with ``quick``). Slow cases take
            longer: a few rounds always run, and warm-up and memory come on top.

    Returns:
        0, whether goals were met or not; 1 where a candidate of ours failed; 2 where nothing could
        run, with the reason on stderr.
    """
    try:
        _check_installed()
        _check_device(device)
        modules = discover(family)
    except (ModuleNotFoundError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    from regularizers._bench.plots import save_plots
    from regularizers._bench.table import Screen

    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if seconds is None:
        seconds = QUICK_SECONDS if quick else SECONDS
    failed = False
    for name, module in modules.items():
        cases: Sequence[Case] = module.cases(device, quick)
        curves: Sequence[ScalingCurve] = getattr(module, "scaling", lambda *_: ())(device, quick)
        facts = machine.describe(device)
        with Screen(name, facts, len(cases) + sum(len(curve.sizes) for curve in curves)) as screen:
            case_results = [_measure_and_show(case, seconds, device, screen) for case in cases]
            curve_results = [_measure_curve(curve, seconds, device, screen) for curve in curves]
        report = Report(FORMAT, name, device, facts, quick, case_results, curve_results)
        path = output / f"{report.stem}.json"
        report.save(path)
        screen.show_end(report, [path, *save_plots(report, output)])
        results = [*case_results, *(case for curve in curve_results for case in curve.cases)]
        failed = failed or any(result["ours"].missing for result in results)
    return int(failed)


def discover(family: str | None) -> dict[str, ModuleType]:
    """Import the benchmark files: one of them, or all for None.

    Raises:
        ValueError: there is no such file; the message lists those there are.
    """
    package = importlib.import_module("regularizers.benchmarks")
    names = sorted(found.name for found in pkgutil.iter_modules(package.__path__))
    if family is not None and family not in names:
        raise ValueError(f"family must be one of {', '.join(names)}, got {family!r}")
    chosen = names if family is None else [family]
    return {name: importlib.import_module(f"regularizers.benchmarks.{name}") for name in chosen}


def measure_case(
    case: Case,
    *,
    seconds: float,
    device: str = "cpu",
    progress: Callable[[float], None] = lambda fraction: None,
) -> CaseResult:
    """Warm the candidates up, time them in interleaved rounds, then measure memory, a call each."""
    calls = {"ours": case.ours, **case.peers, **case.floors}
    missing: dict[str, str] = {}
    for name, call in list(calls.items()):
        try:
            _warm_up(call, device, timed=case.timed)
        except Exception as error:  # whatever a candidate needs and this machine lacks
            missing[name] = f"{type(error).__name__}: {error}"
            del calls[name]
    samples: dict[str, Samples] = {}
    if case.timed and calls:
        samples = interleave(
            calls,
            seconds=seconds,
            device=device,
            fresh_memory=case.fresh_memory,
            progress=progress,
        )
    return summarise(
        case,
        missing=missing,
        samples=samples,
        peak_bytes={name: peak_allocated(call, device) for name, call in calls.items()},
        resident_bytes={
            name: peak_resident(call) if device == "cpu" else None for name, call in calls.items()
        },
    )


def _warm_up(call: Call, device: str, *, timed: bool) -> None:
    """Let a candidate compile, allocate and fill caches; what cannot run raises here."""
    call()
    end = time.perf_counter() + WARM_UP_SECONDS
    while timed:
        call()
        if time.perf_counter() >= end:
            break
    if device == "cuda":
        torch.cuda.synchronize()


def _measure_and_show(case: Case, seconds: float, device: str, screen: Screen) -> CaseResult:
    screen.begin(case.name)
    result = measure_case(case, seconds=seconds, device=device, progress=screen.progress)
    screen.end()
    screen.show_case(result)
    return result


def _measure_curve(curve: ScalingCurve, seconds: float, device: str, screen: Screen) -> CurveResult:
    results = []
    for size in curve.sizes:
        screen.begin(f"{curve.title}, {curve.size} {size}")
        case = curve.case(size)
        results.append(
            measure_case(
                case, seconds=seconds * POINT_SHARE, device=device, progress=screen.progress
            )
        )
        screen.end()
    found = CurveResult(curve.name, curve.title, curve.size, list(curve.sizes), results)
    screen.show_curve(found)
    return found


def _check_installed() -> None:
    wanted = ("rich", "matplotlib")
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{' and '.join(missing)} must be installed: pip install 'regularizers[bench]'"
        )


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu: this torch finds no CUDA device")
