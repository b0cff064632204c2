"""The terminal: a progress bar while a family is measured, and a table for every case as it is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from regularizers._bench.results import CaseResult, CurveResult, GoalResult, Measurement, Report, Spread

_STYLES = {"ours": "bold cyan", "peer": "", "floor": "dim"}
_NAME_WIDTH = 30  # the same in every table, so that columns line up


class Screen:
    """Everything that is printed while one family is measured; a context manager around the measuring.

    Args:
        family: what is measured.
        machine: facts for the first lines.
        total: number of cases, points of curves included.
    """

    def __init__(self, family: str, machine: dict[str, Any], total: int) -> None:
        self._console = Console(highlight=False)
        self._console.rule(f"[bold]{family}[/] on {machine['device']}")
        self._console.print(
            f"{machine['cpu']}, {machine['threads']} threads on {machine['cores']} cores, "
            f"{machine['instruction_set']}; torch {machine['torch']}, regularizers {machine['regularizers']}",
            style="dim",
        )
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", table_column=None),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=total)
        self._done = 0

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
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
        """Print one case: every candidate, then the goals."""
        timed = result.rounds > 0
        title = f"{result.name}  [dim]({result.rounds} rounds)" if timed else result.name
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        table.add_column(min_width=_NAME_WIDTH)
        for heading in (*(_TIME_COLUMNS if timed else ()), *_MEMORY_COLUMNS):
            table.add_column(heading, justify="right")
        for found in result.measurements:
            cells = (_time_cells(found, result) if timed else ()) + _memory_cells(found)
            table.add_row(found.name, *cells, style=_STYLES[found.role])
        self._console.print(table)
        for found in result.measurements:
            if found.missing:
                self._console.print(f"  {found.name} is missing: {found.missing[:300]}", markup=False)
        for goal in result.goals:
            self._console.print(f"  {_goal_line(goal)}")
        self._console.print()

    def show_curve(self, curve: CurveResult) -> None:
        """Print one scaling curve: sizes down, candidates across."""
        timed = curve.cases[0].rounds > 0
        title = f"{curve.title}  [dim](median {'time' if timed else 'peak memory'})"
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        table.add_column(curve.size, justify="right")
        for found in curve.cases[0].measurements:
            table.add_column(found.name, justify="right", style=_STYLES[found.role])
        for size, case in zip(curve.sizes, curve.cases, strict=True):
            cells = [_median(m.seconds) if timed else _bytes(m.peak_bytes) for m in case.measurements]
            table.add_row(str(size), *cells)
        self._console.print(table)
        self._console.print()

    def show_end(self, report: Report, paths: Sequence[Path]) -> None:
        """Print how many goals were met and where the results are."""
        goals = [goal for case in report.cases for goal in case.goals]
        if goals:
            met = sum(goal.met is True for goal in goals)
            self._console.print(f"[bold]{met} of {len(goals)} goals met.[/] ", end="")
        self._console.print(f"Results in {', '.join(map(str, paths))}", soft_wrap=True)


_TIME_COLUMNS = ("time", "±", "ours is", "rate", "faults")
_MEMORY_COLUMNS = ("peak memory", "ours has", "resident")


def _time_cells(found: Measurement, case: CaseResult) -> tuple[str, ...]:
    if found.seconds is None:
        return ("missing", "", "", "", "")
    faults = f"{found.minor_faults:.0f}" + (f"+{found.major_faults:.0f}" if found.major_faults else "")
    rate = _rate(case, found.seconds.median) if found.role == "ours" else ""
    spread = (found.seconds.high - found.seconds.low) / 2 / found.seconds.median
    return (_median(found.seconds), f"{spread:.0%}", _comparison(found), rate, faults)


def _memory_cells(found: Measurement) -> tuple[str, ...]:
    ratio = "" if found.memory_ratio is None or found.role == "ours" else f"{found.memory_ratio:.2f}x"
    return (_bytes(found.peak_bytes), ratio, _bytes(found.resident_bytes))


def _comparison(found: Measurement) -> str:
    if found.role == "ours" or found.time_ratio is None:
        return ""
    ratio = found.time_ratio.median
    return f"{1 / ratio:.2f}x faster" if ratio < 1 else f"{ratio:.2f}x slower"


def _rate(case: CaseResult, seconds: float) -> str:
    if case.flops is not None:
        return f"{case.flops / seconds / 1e9:.0f} GFLOP/s"
    return "" if case.bytes_moved is None else f"{case.bytes_moved / seconds / 1e9:.1f} GB/s"


def _median(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    unit, scale = next(
        (unit, scale) for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 0.0)) if spread.median >= scale
    )
    return f"{spread.median / (scale or 1e-6):.3g} {unit}"


def _bytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f} MiB"


def _goal_line(goal: GoalResult) -> str:
    if goal.ratio is None:
        return f"[yellow]goal not measured[/]: {goal.goal}"
    ratio = goal.ratio
    if goal.at_most < 1:
        ratio = Spread(1 / ratio.median, 1 / ratio.high, 1 / ratio.low)
    verdict = "[green]goal met[/]" if goal.met else "[red]goal missed[/]"
    spread = f" ({ratio.low:.2f} to {ratio.high:.2f})" if goal.quantity == "time" else ""
    return f"{verdict}: {goal.goal}: {ratio.median:.2f}x{spread}"
