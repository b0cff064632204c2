"""Draw docs/pictures/examples.png: the loss of a compiled step, and accuracies in bfloat16.

python docs/pictures/examples.py, some twenty seconds; needs the extra ``bench``.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

EXAMPLES = Path(__file__).parents[2] / "examples"


def main_of(name: str) -> Any:
    """Run an example; return what its main function returns."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()


def main() -> None:
    """Draw both."""
    losses, accuracies = main_of("compiled_step"), main_of("bfloat16")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    left.plot(losses)
    rate = left.twinx()
    rate.plot([0.5 * (1 - step / 60) for step in range(60)], color="tab:gray", linestyle="--")
    left.set(xlabel="step", ylabel="loss", title="compiled_step.py: one graph, p falls (dashed)")
    rate.set(ylabel="dropout rate p", ylim=(0, 0.55))
    right.barh(list(accuracies), list(accuracies.values()))
    right.set(xlim=(0.5, 1), xlabel="accuracy", title="bfloat16.py: three ways")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
