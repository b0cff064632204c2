"""Rates over depth and training progress, and what writes them into a model's modules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

from torch import nn

from regularizers._shared.checks import (
    check_at_least,
    check_fraction,
    check_one_of,
    check_probability,
)

Kind = Literal["constant", "linear", "cosine", "late", "early"]
_KINDS = ("constant", "linear", "cosine", "late", "early")
_RAMPS = ("linear", "cosine")

# nn.MultiheadAttention calls its rate `dropout`, every other module here `p`.
DROPOUT_TYPES: tuple[type[nn.Module], ...] = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.MultiheadAttention,
)

ModuleTypes = type[nn.Module] | tuple[type[nn.Module], ...]


def check_progress(name: str, value: float) -> float:
    """Return a training progress, at most 1; raise where it is below 0 or not a number."""
    if not value >= 0.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return min(float(value), 1.0)


def _check_curve(kind: str, start: float, end: float) -> None:
    check_one_of("kind", kind, _KINDS)
    check_probability("start", start)
    check_probability("end", end)
    if kind in _RAMPS and start >= end:
        raise ValueError(f"start must be below end for kind={kind!r}, got {start} and {end}")


def _curve(kind: str, place: float, start: float, end: float) -> float:
    """Return the share of the full value at a place in [0, 1]."""
    if kind == "constant":
        return 1.0
    if kind in ("late", "early"):
        return float((place >= start) == (kind == "late"))
    ramp = min(max((place - start) / (end - start), 0.0), 1.0)
    return ramp if kind == "linear" else (1 - math.cos(math.pi * ramp)) / 2


@dataclass(frozen=True)
class TimeSchedule:
    r"""Share of a rate's full value over training progress t in [0, 1].

    .. math::
        \begin{array}{ll}
        \text{constant} & 1 \\
        \text{linear} & u = \operatorname{clip}\big(\tfrac{t - start}{end - start}, 0, 1\big) \\
        \text{cosine} & (1 - \cos \pi u) / 2 \\
        \text{late} & [t \ge start] \\
        \text{early} & [t < start]
        \end{array}

    Args:
        kind: ``"constant"``, ``"linear"``, ``"cosine"``, ``"late"`` or ``"early"``.
        start: in [0, 1]; where a ramp begins, or where a step is.
        end: in [0, 1]; where a ramp ends, above ``start``.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> [TimeSchedule("late", start=0.5)(t) for t in (0.49, 0.5)]
        [0.0, 1.0]

    Source:
        Shared by the schedules of arXiv 1707.07012 (linear) and 2305.13230 (late).
    """

    kind: Kind = "constant"
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _check_curve(self.kind, self.start, self.end)

    def __call__(self, progress: float) -> float:
        """Return the share at ``progress``; above 1 it counts as 1."""
        return _curve(self.kind, check_progress("progress", progress), self.start, self.end)


@dataclass(frozen=True)
class DepthSchedule:
    r"""Share of a rate's full value over depth: layer l of L, counted from 0.

    .. math:: \rho = \frac{l + 1}{L}, \quad \text{or } \frac{l}{L - 1} \text{ from zero}

    and then the curve of :class:`TimeSchedule` at :math:`\rho`. The last layer has the full value;
    the first has 1 / L of it, or nothing.

    Args:
        kind: as for :class:`TimeSchedule`.
        from_zero: count depth from 0 at the first layer; a single layer then has depth 0.
        start: as for :class:`TimeSchedule`.
        end: likewise.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> [DepthSchedule()(layer, 4) for layer in range(4)]
        [0.25, 0.5, 0.75, 1.0]

    Source:
        ``from_zero=False`` is the code of arXiv 1707.07012, ``True`` that of 2408.17081.
    """

    kind: Kind = "linear"
    from_zero: bool = False
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _check_curve(self.kind, self.start, self.end)

    def __call__(self, layer_index: int, num_layers: int) -> float:
        """Return the share of layer ``layer_index`` in [0, num_layers)."""
        check_at_least("num_layers", num_layers, 1)
        check_at_least("layer_index", layer_index, 0)
        if layer_index >= num_layers:
            raise ValueError(
                f"layer_index must be below num_layers = {num_layers}, got {layer_index}"
            )
        if self.from_zero:
            depth = layer_index / (num_layers - 1) if num_layers > 1 else 0.0
        else:
            depth = (layer_index + 1) / num_layers
        return _curve(self.kind, depth, self.start, self.end)


@dataclass(frozen=True)
class RateSchedule:
    r"""A rate over depth and time: the full rate times both shares.

    .. math:: p_{l,t} = p \cdot \mathrm{depth}(l, L) \cdot \mathrm{time}(t)

    Args:
        p: the full rate, in [0, 1].
        depth: share over depth.
        time: share over training progress.

    Raises:
        ValueError: ``p`` is out of range.

    Example:
        >>> schedule = RateSchedule(0.4, time=TimeSchedule("linear"))
        >>> schedule(layer_index=9, num_layers=20, progress=0.5)
        0.1

    Source:
        The product is that of ScheduledDropPath (arXiv 1707.07012).
    """

    p: float
    depth: DepthSchedule = field(default_factory=DepthSchedule)
    time: TimeSchedule = field(default_factory=TimeSchedule)

    def __post_init__(self) -> None:
        check_probability("p", self.p)

    def __call__(self, layer_index: int, num_layers: int, progress: float) -> float:
        """Return the rate of a layer at a time."""
        return self.p * self.depth(layer_index, num_layers) * self.time(progress)


def apply_schedule(
    model: nn.Module,
    module_types: ModuleTypes,
    schedule: Callable[[int, int, float], float],
    progress: float,
) -> int:
    """Write the current rate into every module of some types, in place, in order of registration.

    Modules of this library take the rate without a second compilation; the plain numbers in
    ``torch.nn.Dropout`` are constants of a compiled graph.

    Args:
        model: any module.
        module_types: a type or a tuple of types with a rate ``p`` (``dropout`` in
            ``torch.nn.MultiheadAttention``).
        schedule: ``schedule(layer_index, num_layers, progress)``, a rate in [0, 1];
            for example a :class:`RateSchedule`.
        progress: share of the training that is done, at least 0; above 1 it counts as 1.

    Returns:
        The number of modules found, which is ``num_layers``.

    Raises:
        TypeError: a module of these types has no rate.
        ValueError: ``progress`` or a rate is out of range; then no rate was changed.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.ReLU(), nn.Dropout())
        >>> apply_schedule(model, nn.Dropout, RateSchedule(0.2), progress=1.0)
        2
        >>> [model[0].p, model[2].p]
        [0.1, 0.2]

    Source:
        Shared by the methods of arXiv 1707.07012, 2510.15527, 2408.17081 and 2305.13230.
    """
    progress = check_progress("progress", progress)
    found = [module for module in model.modules() if isinstance(module, module_types)]
    rates = [schedule(index, len(found), progress) for index in range(len(found))]
    for module, rate in zip(found, rates, strict=True):
        _rate_of(module)
        check_probability("the scheduled rate", rate)
    for module, rate in zip(found, rates, strict=True):
        _write_rate(module, rate)
    return len(found)


def _name_of_rate(module: nn.Module) -> str:
    return "dropout" if isinstance(module, nn.MultiheadAttention) else "p"


def _rate_of(module: nn.Module) -> float:
    rate: Any = getattr(module, _name_of_rate(module), None)
    if rate is None:
        raise TypeError(f"module_types must have a rate p, {type(module).__name__} has none")
    return float(rate)


def _write_rate(module: nn.Module, rate: float) -> None:
    setattr(module, _name_of_rate(module), rate)


@dataclass(frozen=True)
class DropoutSchedule:
    r"""A dropout rate over the progress t of a training that repeats its data.

    .. math::
        p_t = p \cdot \begin{cases}
        1 & \text{constant} \\
        [t \ge start] & \text{late} \\
        [t < start] & \text{early} \\
        \operatorname{clip}\big(\tfrac{t - start}{end - start}, 0, 1\big) & \text{linear}
        \end{cases}

    Dropout offsets what repeated epochs do to the loss, and may begin late: until then training
    goes as fast as without.

    Args:
        p: full rate, in [0, 1).
        kind: ``"constant"``, ``"late"``, ``"early"`` or ``"linear"``; ``"cosine"`` as well.
        start: in [0, 1]; where the step is, or the ramp begins.
        end: in [0, 1]; where the ramp ends.

    Raises:
        ValueError: ``p`` is outside [0, 1), ``kind`` is unknown, or a ramp does not have
            start < end.

    Example:
        >>> schedule = DropoutSchedule(0.2, kind="late", start=0.5)
        >>> schedule.value(0.49), schedule.value(0.5)
        (0.0, 0.2)

    Source:
        "To Repeat or Not To Repeat", 2023, arXiv 2305.13230: that dropout may come in late stands
        in the abstract; the forms and the defaults (p = 0.1 for small models, 0.2 for large ones,
        start = 0.5) are reconstructed.
    """

    p: float
    kind: Kind = field(default="constant", kw_only=True)
    start: float = field(default=0.5, kw_only=True)
    end: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        check_fraction("p", self.p)
        _check_curve(self.kind, self.start, self.end)

    def value(self, progress: float) -> float:
        """Return the rate at ``progress``; above 1 it counts as 1."""
        return self.p * _curve(
            self.kind, check_progress("progress", progress), self.start, self.end
        )


def set_dropout(model: nn.Module, p: float, *, types: ModuleTypes = DROPOUT_TYPES) -> int:
    """Write one dropout rate into all dropout modules of a model, in place.

    Modules are not replaced, so optimizers and references to them hold. They drop in training mode
    only, as before. ``F.dropout`` calls inside a ``forward`` are out of reach.

    Args:
        model: any module.
        p: rate, in [0, 1).
        types: which modules; by default all dropout modules of torch and
            ``torch.nn.MultiheadAttention``, whose rate is called ``dropout``.

    Returns:
        The number of modules whose rate was written.

    Raises:
        ValueError: ``p`` is out of range.
        TypeError: a module of these types has no rate.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, dropout=0.0)
        >>> set_dropout(layer, 0.1)
        4

    Source:
        Part of the schedule of arXiv 2305.13230.
    """
    check_fraction("p", p)
    return apply_schedule(model, types, lambda *_: p, 0.0)


class ScheduledDropout:
    """Run a model's dropout rates by a schedule; as a context, put the old rates back at the end.

    Args:
        model: any module.
        schedule: the rate over training progress.
        types: as for :func:`set_dropout`.

    Raises:
        TypeError: ``schedule`` has no ``value(progress)``.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        >>> with ScheduledDropout(model, DropoutSchedule(0.2, kind="late")) as dropout:
        ...     rates = [dropout.step(progress) for progress in (0.0, 0.5, 1.0)]
        >>> rates, model[1].p
        ([0.0, 0.2, 0.2], 0.5)

    Source:
        Part of the schedule of arXiv 2305.13230; the interface is this library's.
    """

    def __init__(
        self, model: nn.Module, schedule: DropoutSchedule, *, types: ModuleTypes = DROPOUT_TYPES
    ) -> None:
        if not callable(getattr(schedule, "value", None)):
            raise TypeError(f"schedule must have value(progress), got {type(schedule).__name__}")
        self.model = model
        self.schedule = schedule
        self.types = types
        self._before: list[tuple[nn.Module, float]] = []

    def step(self, progress: float) -> float:
        """Write the rate at ``progress`` into the model and return it."""
        rate = self.schedule.value(progress)
        set_dropout(self.model, rate, types=self.types)
        return rate

    def __enter__(self) -> ScheduledDropout:
        found = (module for module in self.model.modules() if isinstance(module, self.types))
        self._before = [(module, _rate_of(module)) for module in found]
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for module, rate in self._before:
            _write_rate(module, rate)
