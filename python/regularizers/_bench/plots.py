"""Scaling curves as PNG: one figure a curve, time and memory over the size, both axes logarithmic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter, NullLocator

from regularizers._bench.results import CurveResult, Measurement, Report

# Okabe and Ito's colours, which stay apart for colour-blind readers.
_OURS = "#0072B2"
_PEERS = ("#D55E00", "#E69F00", "#CC79A7", "#009E73")
_FLOOR_STYLES = ("--", ":", "-.", (0, (1, 3)))

Value = Callable[[Measurement], float | None]


def save_plots(report: Report, folder: Path) -> list[Path]:
    """Write ``<family>-<device>-<curve>.png`` for every curve of a report and return the paths."""
    paths = []
    for curve in report.curves:
        device = "cpu" if report.machine["device"] == "cpu" else "cuda"
        path = folder / f"{report.family}-{device}-{curve.name}.png"
        _figure(curve, str(report.machine["cpu" if device == "cpu" else "device"])).savefig(path, dpi=160)
        paths.append(path)
    return paths


def _figure(curve: CurveResult, machine: str) -> Figure:
    timed = any(case.rounds for case in curve.cases)
    figure = Figure(figsize=(9.6 if timed else 5.6, 4.4), layout="constrained")
    figure.suptitle(curve.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    axes = list(figure.subplots(1, 1 + timed, squeeze=False)[0])
    if timed:
        _draw(axes[0], curve, _seconds, with_floors=True)
        axes[0].set_title("time of one call (median, quartiles)", fontsize=9, loc="left")
        axes[0].yaxis.set_major_formatter(EngFormatter("s"))
    _draw(axes[-1], curve, _mebibytes, with_floors=False)
    axes[-1].set_title("peak memory of one call", fontsize=9, loc="left")
    axes[-1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} MiB"))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, fontsize=8, frameon=False)
    figure.text(0.99, 0.985, machine, ha="right", va="top", fontsize=7, color="grey")
    return figure


def _seconds(found: Measurement) -> float | None:
    return None if found.seconds is None else found.seconds.median


def _mebibytes(found: Measurement) -> float | None:
    return found.peak_bytes / 2**20 if found.peak_bytes else None


def _draw(axes: Axes, curve: CurveResult, value: Value, *, with_floors: bool) -> None:
    """Draw a line for every candidate; floors hold their memory before the call, so they have none to show."""
    peers, floors = iter(_PEERS * 2), iter(_FLOOR_STYLES * 2)
    for first in curve.cases[0].measurements:
        if first.role == "floor" and not with_floors:
            continue
        found = [case[first.name] for case in curve.cases]
        points = [
            (size, y, m) for size, m in zip(curve.sizes, found, strict=True) if (y := value(m)) is not None
        ]
        if not points:
            continue
        sizes, values, measured = zip(*points, strict=True)
        if first.role == "floor":
            axes.plot(sizes, values, color="0.45", linestyle=next(floors), linewidth=1.3, label=first.name)
            continue
        colour = _OURS if first.role == "ours" else next(peers)
        width = 2.4 if first.role == "ours" else 1.5
        axes.plot(sizes, values, color=colour, marker="o", markersize=4, linewidth=width, label=first.name)
        if value is _seconds:
            quartiles = [(m.seconds.low, m.seconds.high) for m in measured if m.seconds is not None]
            axes.fill_between(sizes, *zip(*quartiles, strict=True), color=colour, alpha=0.18, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(curve.sizes, [str(size) for size in curve.sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(curve.size)
    axes.grid(True, which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
