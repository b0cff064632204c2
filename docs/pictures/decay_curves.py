"""Draw docs/pictures/decay_curves.png: what each decay takes from a weight, and what remains.

python docs/pictures/decay_curves.py, some twenty seconds; needs the extra ``bench``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers.ops import decay_amount
from regularizers.optim import AdamHD

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"L2": "#4f6d7a", "L1": "#c0842b", "Huber": "#b3446c"}
TAU, DELTA = 0.1, 0.5


def main() -> None:
    """Draw the three panels."""
    torch.set_num_threads(1)  # the same sums everywhere, hence the same picture
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    draw_steps(axes[0])
    draw_runs(axes[1])
    draw_histograms(axes[2])
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


def draw_steps(axis: plt.Axes) -> None:
    """Show what one step takes away from a weight."""
    x = torch.linspace(-1.5, 1.5, 301)
    tau, delta = torch.tensor(TAU), torch.tensor(DELTA)
    for name, penalty, strength in (("L2", "l2", tau), ("L1", "l1", tau * delta)):
        axis.plot(x, decay_amount(x, strength, penalty, prox=True), color=COLOURS[name], label=name)
    amount = decay_amount(x, tau, "huber", prox=True, delta=delta)
    axis.plot(x, amount, color=COLOURS["Huber"], label="Huber", linewidth=2.5, alpha=0.7)
    axis.set(title="taken by one step (prox)", xlabel="weight")
    axis.legend(frameon=False)


def draw_runs(axis: plt.Axes) -> None:
    """Show weights that only decay: exponential, linear, linear and then exponential."""
    tau, delta = torch.tensor(0.02), torch.tensor(DELTA)
    cases = (("L2", "l2", tau), ("L1", "l1", tau * delta), ("Huber", "huber", tau))
    for name, penalty, strength in cases:
        for start in (0.4, 1.0, 2.0):
            path, x = [], torch.tensor(start)
            for _ in range(200):
                path.append(x.item())
                x = x - decay_amount(x, strength, penalty, prox=True, delta=delta)
            axis.plot(path, color=COLOURS[name])
    axis.axhline(DELTA, color="black", linewidth=0.8, linestyle="--")
    axis.set(title="weights under decay alone", xlabel="step")


def draw_histograms(axis: plt.Axes) -> None:
    """Show the weights of a classifier of digits after training under each decay."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    bins = torch.linspace(0, 0.6, 61)
    for name in COLOURS:
        weights, accuracy = train(name, x, y)
        counts = torch.histc(weights.abs(), 60, 0, 0.6)
        label = f"{name}: accuracy {accuracy:.1%}, largest {weights.abs().max():.2f}"
        print(label)
        axis.stairs(counts + 1, bins, color=COLOURS[name], label=label)
    axis.set_yscale("log")
    axis.set(title="|weights| of a digit classifier", xlabel="|weight|")
    axis.legend(frameon=False, fontsize=8)


def train(name: str, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Train under one decay, all of the same strength for weights of the threshold's size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    # L1 is the limit of a small threshold under a strong decay; L2 that of an infinite one.
    strength, delta = {"L2": (2.0, float("inf")), "L1": (1e4, 1e-5), "Huber": (2.0, 0.05)}[name]
    optimizer = AdamHD(model.parameters(), lr=3e-3, weight_decay=strength, delta=delta)
    for _ in range(40):
        for batch in torch.randperm(1280).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (model(x[1280:]).argmax(1) == y[1280:]).double().mean().item()
        return torch.cat([p.flatten() for p in model.parameters()]), accuracy


if __name__ == "__main__":
    main()
