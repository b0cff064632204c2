"""Draw information_plane.png: what the layers of small nets know while they train.

``python docs/pictures/information_plane.py`` takes about 20 s on one core and gives the same
picture every time.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers.information import InformationPlane, ebab_information

ESTIMATOR = functools.partial(ebab_information, low=0.0)
DECAYS = {0.0: "#0072B2", 1e-3: "#E69F00", 1e-2: "#D55E00"}


def train(
    widths: list[int], x: Tensor, y: Tensor, *, steps: int, weight_decay: float = 0.0, seed: int = 0
) -> InformationPlane:
    """Train a ReLU net on batches of 256; return what its hidden layers knew."""
    torch.manual_seed(seed)
    net = nn.Sequential()
    for inner, outer in itertools.pairwise(widths):
        net.extend([nn.Linear(inner, outer), nn.ReLU()])
    net.append(nn.Linear(widths[-1], 2))
    taps = [str(2 * layer + 1) for layer in range(len(widths) - 1)]
    plane = InformationPlane(net, taps, estimator=ESTIMATOR, every=20)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=weight_decay)
    for step in range(steps):
        plane.record(x, y, step)
        rows = torch.randint(len(x), (256,))
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    return plane


def main() -> None:
    """Train and draw."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = (torch.arange(4096)[:, None] >> torch.arange(12)) % 2 * 2.0 - 1  # all patterns of 12 signs
    y = ((x @ torch.randn(12, 2, generator=generator)).prod(1) > 0).long()
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = train([12, 10, 5, 3], x, y, steps=800).table()
    for tap, marker, name in zip("135", "o^s", ("first", "second", "third"), strict=True):
        points = [(row.input, row.label, row.step) for row in rows if row.tap == tap]
        known, told, step = zip(*points, strict=True)
        drawn = left.scatter(known, told, c=step, s=16, marker=marker, label=f"{name} hidden layer")
    left.set(xlabel="I(X; T), bits", ylabel="I(T; Y), bits", ylim=(0, 1.05))
    left.set_title("a 12-10-5-3-2 net in the information plane", fontsize=10)
    left.legend(frameon=False, fontsize=8, loc="lower left")
    figure.colorbar(drawn, ax=left, label="step")

    few = torch.randperm(4096, generator=generator)[:400]
    rule = (x[few] @ torch.randn(12, generator=generator) > 0).long()
    for decay, color in DECAYS.items():
        runs = [
            train([12, 10, 5], x[few], rule, steps=600, weight_decay=decay, seed=seed).table()
            for seed in range(3)
        ]
        last = [[row.input for row in rows if row.tap == "3"] for rows in runs]
        curve = torch.tensor(last).mean(0)
        right.plot(range(0, 600, 20), curve, color=color, linewidth=2, label=f"decay {decay:g}")
    right.set(xlabel="step", ylabel="I(X; T), bits")
    right.set_title("last hidden layer of 12-10-5-2 nets, mean of 3", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
