"""Draw information_plane.png: what the layers of a small net know, with and without weight decay.

``python docs/pictures/information_plane.py`` takes about 30 s on one core and gives the same
picture every time.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from regularizers.information import InformationPlane, ebab_information

STEPS, EVERY, TAPS = 1200, 20, ("1", "3", "5")
DECAYS = {0.0: "#0072B2", 1e-3: "#E69F00", 1e-2: "#D55E00"}


def train(weight_decay: float) -> InformationPlane:
    """Train a 12-10-5-3-2 ReLU net on a rule of 12 signs; return what it recorded."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.arange(4096)[:, None] >> torch.arange(12)) % 2 * 2.0 - 1  # all patterns
    y = ((x @ torch.randn(12, 2, generator=generator)).prod(1) > 0).long()
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 5), nn.ReLU()),
        *(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2)),
    )
    estimator = functools.partial(ebab_information, low=0.0)
    plane = InformationPlane(net, TAPS, estimator=estimator, every=EVERY)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=weight_decay)
    for step in range(STEPS):
        plane.record(x, y, step)
        rows = torch.randint(len(x), (256,))
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    return plane


def main() -> None:
    """Train three times and draw."""
    torch.set_num_threads(1)
    figure = Figure(figsize=(11.6, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for decay, color in DECAYS.items():
        rows = train(decay).table()
        last = [row for row in rows if row.tap == TAPS[-1]]
        right.plot([row.step for row in last], [row.input for row in last], color=color,
                   label=f"weight decay {decay:g}")  # fmt: skip
        if decay in (0.0, 1e-2):
            ax = left if decay == 0 else middle
            for tap, marker, name in zip(TAPS, "o^s", ("first", "second", "third"), strict=True):
                points = [(row.input, row.label, row.step) for row in rows if row.tap == tap]
                known, told, step = zip(*points, strict=True)
                drawn = ax.scatter(known, told, c=step, s=14, marker=marker, label=f"{name} hidden")
            ax.set(title=f"weight decay {decay:g}", xlabel="I(X; T), bits", ylabel="I(T; Y), bits")
            ax.set(xlim=(2.5, 12.4), ylim=(0, 1.05))
    left.legend(frameon=False, fontsize=8, loc="lower right")
    figure.colorbar(drawn, ax=[left, middle], label="step")
    right.set(xlabel="step", title="I(X; T) of the third hidden layer, bits")
    right.legend(frameon=False, fontsize=8)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
