"""The benchmark framework: what ``python -m regularizers bench`` runs.

A benchmark file (``benchmarks/<family>.py``) lists cases; this package measures them side by side
and writes a table, JSON and plots.
"""

from regularizers._bench.case import Case, Goal, ScalingCurve
from regularizers._bench.runner import run

__all__ = ["Case", "Goal", "ScalingCurve", "run"]
