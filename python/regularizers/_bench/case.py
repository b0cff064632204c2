"""What a benchmark file writes down: cases, their goals, and curves of cases over a size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Call = Callable[[], object]
Quantity = Literal["time", "memory"]


@dataclass(frozen=True)
class Goal:
    """A bound that the project sets itself: ours / against is to be at most ``at_most``.

    Args:
        against: name of a peer or floor of the case, or of an entry of its ``best_of``.
        at_most: the bound; 1 / 7 reads "at least 7 times faster".
        quantity: what is compared, the time of a call or its peak memory.
    """

    against: str
    at_most: float
    quantity: Quantity = "time"

    def __str__(self) -> str:
        if self.quantity == "memory":
            return f"at most {self.at_most:g}x the memory of {self.against}"
        if self.at_most < 1:
            return f"at least {1 / self.at_most:g}x faster than {self.against}"
        return f"at most {self.at_most:g}x the time of {self.against}"


@dataclass(frozen=True)
class Case:
    """One thing to measure: our way, what users write today, and what no way can avoid.

    A candidate is a function without arguments. It leaves nothing behind (gradients are reset), and
    its result is dropped at once: giving memory back is part of the time of a call. One that raises
    while it warms up is reported as missing, with the reason.

    Args:
        name: operator and sizes, as the table shows it.
        ours: the candidate that everything is compared with.
        peers: what a user would write without this library.
        floors: work that cannot be avoided, done alone.
        best_of: names for the fastest of several floors, such as one product computed in two ways.
        goals: the project's goals for this case.
        bytes_moved: bytes that ``ours`` has to read and write at least; the table shows a rate.
        flops: likewise, floating-point operations.
        fresh_memory: True gives the heap's free memory back to the system before every call, so
            that each candidate pays for every page it touches. False lets them recycle; then a
            large result is new or recycled as the calls before it left the heap.
        timed: False measures memory only, for calls too slow to repeat.
    """

    name: str
    ours: Call
    peers: Mapping[str, Call] = field(default_factory=dict)
    floors: Mapping[str, Call] = field(default_factory=dict)
    best_of: Mapping[str, Sequence[str]] = field(default_factory=dict)
    goals: Sequence[Goal] = ()
    bytes_moved: int | None = None
    flops: int | None = None
    fresh_memory: bool = False
    timed: bool = True

    def __post_init__(self) -> None:
        candidates = ["ours", *self.peers, *self.floors]
        if len(set(candidates)) < len(candidates):
            raise ValueError(f"candidates must have different names, got {candidates}")
        for name in (name for members in self.best_of.values() for name in members):
            if name not in self.floors:
                raise ValueError(f"best_of must name floors, got {name!r}")
        for goal in self.goals:
            if goal.against not in (*self.peers, *self.floors, *self.best_of):
                raise ValueError(f"goals must name a peer or a floor, got {goal.against!r}")


@dataclass(frozen=True)
class ScalingCurve:
    """A case over a range of sizes: one plot of time (where the case is timed) and memory.

    Args:
        name: short, for the file name of the plot.
        title: the operator and the sizes that stay fixed.
        size: what varies, the label of the axis.
        sizes: its values, ascending.
        case: makes the case of one size; called when its turn comes, so that one lives at a time.
    """

    name: str
    title: str
    size: str
    sizes: Sequence[int]
    case: Callable[[int], Case]
