"""Scaling curves as PNG: time and memory over a size, both axes logarithmic."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, LogLocator, NullLocator

from regularizers._bench.results import CurveResult, Report, Spread

# Okabe and Ito's colours, which stay apart for colour-blind readers. Floors are grey dashes.
_OURS = {"color": "#0072B2", "linewidth": 2.4, "marker": "o", "zorder": 3}
_PEER = {"linewidth": 1.5, "marker": "o"}
_PEER_COLOURS = ("#D55E00", "#E69F00", "#CC79A7", "#009E73", "#56B4E9")
_FLOOR = {"color": "0.45", "linewidth": 1.3}
_FLOOR_DASHES = ("--", ":", "-.", (0, (6, 3)), (0, (1, 4)))


def save_plots(report: Report, folder: Path) -> list[Path]:
    """Write ``<family>-<device>-<curve>.png`` for every curve of a report; return the paths."""
    hardware = report.machine["gpu"] or report.machine["cpu"]
    paths = []
    for curve in report.curves:
        paths.append(folder / f"{report.stem}-{curve.name}.png")
        _figure(curve, hardware).savefig(paths[-1], dpi=160)
    return paths


def _figure(curve: CurveResult, hardware: str) -> Figure:
    timed = any(case.rounds for case in curve.cases)
    figure = Figure(figsize=(9.6 if timed else 6.4, 4.4), layout="constrained")
    figure.suptitle(curve.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    *time_axes, memory_axes = figure.subplots(1, 1 + timed, squeeze=False)[0]
    styles = _styles(curve)
    for axes in time_axes:
        _draw_times(axes, curve, styles)
    _draw_memory(memory_axes, curve, styles)
    memory_axes.set_title(hardware, loc="right", fontsize=8, color="grey")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower left", ncols=len(labels), fontsize=8, frameon=False
    )
    return figure


def _styles(curve: CurveResult) -> dict[str, dict[str, Any]]:
    colours, dashes = itertools.cycle(_PEER_COLOURS), itertools.cycle(_FLOOR_DASHES)
    styles: dict[str, dict[str, Any]] = {}
    for found in curve.cases[0].measurements:
        if found.role == "ours":
            style = _OURS
        elif found.role == "peer":
            style = _PEER | {"color": next(colours)}
        else:
            style = _FLOOR | {"linestyle": next(dashes)}
        styles[found.name] = style | {"label": found.name, "markersize": 4}
    return styles


def _draw_times(axes: Axes, curve: CurveResult, styles: dict[str, dict[str, Any]]) -> None:
    for name, style in styles.items():
        points = [
            (size, spread)
            for size, spread in zip(curve.sizes, _times(curve, name), strict=True)
            if spread is not None
        ]
        sizes = [size for size, _ in points]
        axes.plot(sizes, [spread.median for _, spread in points], **style)
        low, high = ([getattr(spread, end) for _, spread in points] for end in ("low", "high"))
        axes.fill_between(sizes, low, high, color=style["color"], alpha=0.15, linewidth=0)
    _finish(axes, curve, "time of one call: median and quartiles", EngFormatter("s"))


def _times(curve: CurveResult, name: str) -> list[Spread | None]:
    found = (case.get(name) for case in curve.cases)
    return [None if measurement is None else measurement.seconds for measurement in found]


def _draw_memory(axes: Axes, curve: CurveResult, styles: dict[str, dict[str, Any]]) -> None:
    """Draw ours and the peers; a floor brings its memory along, so its calls take none.

    The larger of both measures: torch's allocator does not see what kernels take past it, resident
    memory does not see what is allocated and never touched.
    """
    for found in curve.cases[0].measurements:
        if found.role != "floor":
            measured = [case.get(found.name) for case in curve.cases]
            peaks = [one and max(one.peak_bytes or 0, one.resident_bytes or 0) for one in measured]
            mebibytes = [peak / 2**20 if peak else math.nan for peak in peaks]
            axes.plot(curve.sizes, mebibytes, **styles[found.name])
    mebibytes_formatter = FuncFormatter(lambda value, _: f"{value:g} MiB")
    _finish(axes, curve, "peak memory of one call", mebibytes_formatter)


def _finish(axes: Axes, curve: CurveResult, title: str, formatter: Formatter) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(curve.size)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(curve.sizes, [str(size) for size in curve.sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(formatter)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
