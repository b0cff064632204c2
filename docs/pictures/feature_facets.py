"""Draw feature_facets.png: what a unit for two digits responds to, found and drawn.

``python docs/pictures/feature_facets.py`` takes some 20 s on one core and gives the same picture
every time. The network learns scikit-learn's digits, with two of them made one class.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers.representation import (
    Facets,
    Octave,
    UnitActivation,
    find_facets,
    maximize_activation,
)

UNIT, MERGED, NUM_FACETS = 0, 4, 4  # class 0 holds the digits 0 and 4
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]


def train(images: Tensor, target: Tensor) -> nn.Sequential:
    """Return a small convolutional network that knows the nine classes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    for _ in range(400):
        batch = torch.randint(len(images), (64,))
        noisy = images[batch] + 0.1 * torch.randn(64, 1, 8, 8)
        optimizer.zero_grad()
        F.cross_entropy(model(noisy), target[batch]).backward()
        optimizer.step()
    return model.eval()


def draw(model: nn.Module, starts: Tensor) -> Tensor:
    """Return the images that the ascent makes of its starts."""
    # Pixels in [0, 1]: a weight of 100 is one of 0.4 on pixels in [0, 255].
    octaves = [Octave(30, (0.012, 0.004), denoise=(80.0, 400.0))]
    return maximize_activation(UnitActivation(model, "8", UNIT), starts, octaves)


def main() -> None:
    """Draw the picture."""
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.tensor(digits.images).float().unsqueeze(1) / 16
    digit = torch.tensor(digits.target)
    model = train(images, torch.where(digit == MERGED, UNIT, digit))
    with torch.no_grad():
        codes = model[:-1](images)
        top = model[-1](codes)[:, UNIT].topk(300).indices
    facets = find_facets(
        codes[top],
        images[top],
        num_facets=NUM_FACETS,
        generator=torch.Generator().manual_seed(0),
    )
    overall = images[top].mean(0, keepdim=True)
    noise = 0.7 + 0.03 * torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    starts = torch.cat([facets.mean_images, overall, noise.clamp(0, 1)])
    figure = Figure(figsize=(12.5, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.9])
    _draw_map(left.subplots(), facets, digit[top])
    _draw_images(right, starts, draw(model, starts))
    path = Path(__file__).with_suffix(".png")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw_map(axis, facets: Facets, digit: Tensor) -> None:
    for j, colour in enumerate(COLOURS):
        for value, marker in ((UNIT, "o"), (MERGED, "^")):
            points = facets.embedding[(facets.labels == j) & (digit == value)]
            axis.scatter(*points.T, s=14, color=colour, marker=marker)
    for value, marker in ((UNIT, "o"), (MERGED, "^")):
        axis.scatter([], [], color="0.3", marker=marker, label=f"digit {value}")
    axis.set(title="the unit's 300 best images, by facet", xticks=[], yticks=[])
    axis.legend()


def _draw_images(figure, starts: Tensor, ends: Tensor) -> None:
    axes = figure.subplots(2, len(starts))
    names = [f"facet {j + 1}" for j in range(NUM_FACETS)] + ["all", "noise"]
    for column, name in enumerate(names):
        axes[0, column].set_title(name, color=(COLOURS + ["0.2"] * 2)[column])
        for row, stack in enumerate((starts, ends)):
            axes[row, column].imshow(stack[column, 0], cmap="gray", vmin=0, vmax=1)
            axes[row, column].set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("start")
    axes[1, 0].set_ylabel("after ascent")


if __name__ == "__main__":
    main()
