"""What a run found, and its JSON: one format for every benchmark."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from regularizers._bench.case import Case, Quantity
from regularizers._bench.measure import Samples

FORMAT = 1
Role = Literal["ours", "peer", "floor"]


@dataclass(frozen=True)
class Spread:
    """The middle of some numbers and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one number."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Measurement:
    """One candidate of a case. Ratios are ours / this; faults are medians over the calls."""

    name: str
    role: Role
    missing: str | None = None
    seconds: Spread | None = None
    time_ratio: Spread | None = None
    minor_faults: float | None = None
    major_faults: float | None = None
    peak_bytes: int | None = None
    memory_ratio: float | None = None
    resident_bytes: int | None = None


@dataclass(frozen=True)
class GoalResult:
    """A goal and what came of it; ``met`` is None where it could not be measured."""

    goal: str
    against: str
    quantity: Quantity
    at_most: float
    ratio: Spread | None
    met: bool | None


@dataclass(frozen=True)
class CaseResult:
    """One case measured; ``best`` tells which floor each name of ``Case.best_of`` stands for."""

    name: str
    rounds: int
    bytes_moved: int | None
    flops: int | None
    measurements: list[Measurement]
    best: dict[str, str]
    goals: list[GoalResult]

    def __getitem__(self, name: str) -> Measurement:
        """Return a candidate by its name, or by a name in ``best``."""
        found = self.get(name)
        if found is None:
            raise KeyError(name)
        return found

    def get(self, name: str) -> Measurement | None:
        """Return a candidate, or None: a curve may drop some where sizes become too large."""
        name = self.best.get(name, name)
        return next((found for found in self.measurements if found.name == name), None)


@dataclass(frozen=True)
class CurveResult:
    """A scaling curve measured: the case of ``sizes[i]`` is ``cases[i]``."""

    name: str
    title: str
    size: str
    sizes: list[int]
    cases: list[CaseResult]


@dataclass(frozen=True)
class Report:
    """Everything one run found about one family."""

    format: int
    family: str
    device: str
    machine: dict[str, Any]
    quick: bool
    cases: list[CaseResult]
    curves: list[CurveResult]

    @property
    def stem(self) -> str:
        """What the names of its files begin with."""
        return f"{self.family}-{self.device}"

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        text = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read a report that ``save`` wrote.

        Raises:
            ValueError: the file has another format.
        """
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("format") != FORMAT:
            raise ValueError(f"{path} must have format {FORMAT}, got {data.get('format')}")
        report: Report = _restore(cls, data)
        return report


def _restore(kind: Any, value: Any) -> Any:
    """Turn parsed JSON back into the annotated type."""
    if isinstance(kind, types.UnionType):  # "something | None"
        return None if value is None else _restore(get_args(kind)[0], value)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        constructor: Any = kind
        return constructor(**{name: _restore(hints[name], entry) for name, entry in value.items()})
    if get_origin(kind) is list:
        return [_restore(get_args(kind)[0], entry) for entry in value]
    return value


def summarise(
    case: Case,
    *,
    missing: Mapping[str, str],
    samples: Mapping[str, Samples],
    peak_bytes: Mapping[str, int],
    resident_bytes: Mapping[str, int | None],
) -> CaseResult:
    """Turn what was measured, by name of the candidate, into medians, ratios and goals."""
    roles: dict[str, Role] = {"ours": "ours"}
    roles.update(dict.fromkeys(case.peers, "peer"))
    roles.update(dict.fromkeys(case.floors, "floor"))
    measurements = [
        Measurement(
            name,
            role,
            missing=missing.get(name),
            peak_bytes=peak_bytes.get(name),
            memory_ratio=_memory_ratio(peak_bytes, name),
            resident_bytes=resident_bytes.get(name),
            **_summary(samples, name),
        )
        for name, role in roles.items()
    ]
    medians = {m.name: m.seconds.median for m in measurements if m.seconds is not None}
    best = {
        name: min(members, key=lambda member: medians.get(member, math.inf))
        for name, members in case.best_of.items()
    }
    rounds = max((len(found.seconds) for found in samples.values()), default=0)
    result = CaseResult(case.name, rounds, case.bytes_moved, case.flops, measurements, best, [])
    result.goals.extend(_goals(case, result))
    return result


def _summary(samples: Mapping[str, Samples], name: str) -> dict[str, Any]:
    if name not in samples:
        return {}
    found = samples[name]
    pairs = zip(samples["ours"].seconds, found.seconds, strict=True) if "ours" in samples else ()
    ratios = [ours / other for ours, other in pairs]
    return {
        "seconds": Spread.of(found.seconds),
        "time_ratio": Spread.of(ratios) if ratios else None,
        "minor_faults": statistics.median(found.minor_faults),
        "major_faults": statistics.median(found.major_faults),
    }


def _memory_ratio(peak_bytes: Mapping[str, int], name: str) -> float | None:
    ours, other = peak_bytes.get("ours"), peak_bytes.get(name)
    return ours / other if ours is not None and other else None


def _goals(case: Case, result: CaseResult) -> list[GoalResult]:
    found = []
    for goal in case.goals:
        other = result[goal.against]
        ratio = other.time_ratio
        if goal.quantity == "memory":
            ratio = None if other.memory_ratio is None else Spread.of([other.memory_ratio])
        met = None if ratio is None else ratio.median <= goal.at_most
        found.append(GoalResult(str(goal), goal.against, goal.quantity, goal.at_most, ratio, met))
    return found
