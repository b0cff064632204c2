"""The terminal: a progress bar while a family is measured, a table for every case that is done."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from regularizers._bench.results import (
    CaseResult,
    CurveResult,
    GoalResult,
    Measurement,
    Report,
    Spread,
)

_STYLES = {"ours": "bold cyan", "peer": "", "floor": "dim"}
_TIME_COLUMNS = {"time": 7, "±": 4, "ours is": 12, "faults": 6}
_MEMORY_COLUMNS = {"peak MiB": 8, "resident": 8}
_QUIET_LOAD = 0.75  # average number of busy threads before anything was measured
_REASON_LENGTH = 300  # of a missing candidate; the JSON has all of it


class Screen:
    """Everything printed while one family is measured; a context manager around the measuring.

    Args:
        family: what is measured.
        machine: facts for the first lines.
        total: number of cases, points of curves included.
    """

    def __init__(self, family: str, machine: dict[str, Any], total: int) -> None:
        self._console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
        self._console.rule(f"[bold]{family}[/] on {machine['gpu'] or 'the CPU'}")
        self._console.print(
            f"{machine['cpu']}, {machine['threads']} threads on {machine['cores']} cores, "
            f"{machine['instruction_set']}; "
            f"torch {machine['torch']}, regularizers {machine['regularizers']}\n",
            style="dim",
        )
        if machine["load_before"] > _QUIET_LOAD:
            self._console.print(
                f"[yellow]Other processes are busy[/] (load {machine['load_before']:.1f}): "
                "times will be too long, and ratios off.\n"
            )
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=total)
        self._done = 0

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def begin(self, what: str) -> None:
        """Say what is measured now."""
        self._progress.update(self._task, description=what)

    def progress(self, fraction: float) -> None:
        """Say which fraction of it is done."""
        self._progress.update(self._task, completed=self._done + fraction)

    def end(self) -> None:
        """Say that it is done."""
        self._done += 1
        self.progress(0)

    def show_case(self, result: CaseResult) -> None:
        """Print one case: every candidate, what is missing and why, the goals."""
        timed = result.rounds > 0
        columns = (_TIME_COLUMNS if timed else {}) | _MEMORY_COLUMNS
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column(width=20, no_wrap=True)
        for heading, width in columns.items():
            table.add_column(heading, width=width, justify="right", no_wrap=True)
        for found in result.measurements:
            times = _time_cells(found) if timed else []
            memory = [_mebibytes(found.peak_bytes), _mebibytes(found.resident_bytes)]
            table.add_row(found.name, *times, *memory, style=_STYLES[found.role])
        self._console.print(result.name, style="bold", markup=False)
        if timed:
            self._console.print(f"{result.rounds} rounds{_rate(result)}", style="dim")
        self._console.print(table)
        for found in result.measurements:
            if found.missing:
                reason = found.missing[:_REASON_LENGTH]
                self._console.print(f"{found.name} is missing: {reason}", markup=False)
        for goal in result.goals:
            self._console.print(_goal_line(goal))
        self._console.print()

    def show_curve(self, curve: CurveResult) -> None:
        """Print one scaling curve: sizes down, candidates across."""
        timed = any(case.rounds for case in curve.cases)
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column(curve.size, justify="right", vertical="bottom")
        for found in curve.cases[0].measurements:
            table.add_column(found.name, justify="right", style=_STYLES[found.role])
        names = [found.name for found in curve.cases[0].measurements]
        for size, case in zip(curve.sizes, curve.cases, strict=True):
            cells = [
                "" if found is None
                else _time(found.seconds) if timed
                else _mebibytes(found.peak_bytes)
                for found in map(case.get, names)
            ]  # fmt: skip
            table.add_row(str(size), *cells)
        self._console.print(curve.title, style="bold", markup=False)
        self._console.print("median time" if timed else "peak memory, MiB", style="dim")
        self._console.print(table)
        self._console.print()

    def show_end(self, report: Report, paths: Sequence[Path]) -> None:
        """Print how many goals were met and where the results are."""
        goals = [goal for case in report.cases for goal in case.goals]
        if goals:
            met = sum(goal.met is True for goal in goals)
            self._console.print(f"[bold]{met} of {len(goals)} goals met[/]")
        for path in paths:
            self._console.print(f"wrote {path}", markup=False, soft_wrap=True)


def _time_cells(found: Measurement) -> list[str]:
    if found.seconds is None:
        return ["missing", "", "", ""]
    spread = (found.seconds.high - found.seconds.low) / 2 / found.seconds.median
    faults = f"{found.minor_faults:.0f}"
    if found.major_faults:
        faults += f"+{found.major_faults:.0f}"
    return [_time(found.seconds), f"{spread:.0%}", _comparison(found), faults]


def _comparison(found: Measurement) -> str:
    if found.role == "ours" or found.time_ratio is None:
        return ""
    ratio = found.time_ratio.median
    return f"{1 / ratio:.3g}x faster" if ratio < 1 else f"{ratio:.3g}x slower"


def _rate(case: CaseResult) -> str:
    seconds = case["ours"].seconds
    if seconds is None:
        return ""
    if case.flops is not None:
        return f", ours at {case.flops / seconds.median / 1e9:.0f} GFLOP/s"
    if case.bytes_moved is not None:
        return f", ours at {case.bytes_moved / seconds.median / 1e9:.1f} GB/s"
    return ""


def _time(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if spread.median >= scale:
            return f"{spread.median / scale:.3g} {unit}"
    return f"{spread.median / 1e-6:.3g} µs"


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f}"


def _goal_line(goal: GoalResult) -> str:
    if goal.ratio is None:
        return f"[yellow]goal not measured[/]: {goal.goal}"
    ratio = goal.ratio
    if goal.at_most < 1:
        ratio = Spread(1 / ratio.median, 1 / ratio.high, 1 / ratio.low)
    verdict = "[green]goal met[/]" if goal.met else "[red]goal missed[/]"
    quartiles = f" ({ratio.low:.2f} to {ratio.high:.2f})" if goal.quantity == "time" else ""
    return f"{verdict}: {goal.goal}: {ratio.median:.2f}x{quartiles}"
