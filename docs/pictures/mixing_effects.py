"""Draw what the label weights of CutMix are, how AdaMixUp avoids a class, and what CutMix gives.

Run: python docs/pictures/mixing_effects.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor, nn

from regularizers.mixing import (
    AdaMixUp,
    cutmix,
    manifold_intrusion_rate,
    mixup,
    random_box,
    sample_lambda,
    sample_policy,
)

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"MixUp": "#8c8c8c", "AdaMixUp": "#b3446c", "plain": "#8c8c8c", "CutMix": "#b3446c"}


def main() -> None:
    """Draw the three panels and print the figures of the last two."""
    torch.set_num_threads(1)  # the same sums everywhere, hence the same picture
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    draw_label_weights(axes[0])
    draw_intrusion(axes[1])
    draw_missing_cue(axes[2])
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


def draw_label_weights(axis: plt.Axes) -> None:
    """Show the label weight over the drawn one: boxes are cut off at the edges."""
    generator = torch.Generator().manual_seed(0)
    lam = sample_lambda(4000, 1.0, generator=generator, dtype=torch.float64)
    box = random_box((32, 32), lam, generator=generator)
    weight = 1 - (box[:, :, 1] - box[:, :, 0]).prod(1) / 1024
    axis.scatter(lam, weight, s=2, color="#b3446c", alpha=0.4)
    axis.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
    axis.set(xlabel=r"drawn $\lambda$", ylabel=r"label weight $\lambda'$")
    axis.set_title(f"CutMix, 32 x 32: mean weight {weight.mean():.2f}", fontsize=10)


class PairPolicy(nn.Module):
    """A small network on a pair of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 3))

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Return start and width of the interval."""
        start, width, _ = self.net(torch.cat([x1, x2], 1)).softmax(1).unbind(1)
        return start, width


def draw_intrusion(axis: plt.Axes) -> None:
    """Show where mixes of the outer two of three classes on a line come to lie."""

    def points(count: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(3, (count,))
        return (y / 2 + 0.02 * torch.randn(count))[:, None], y

    for name in ("MixUp", "AdaMixUp"):
        torch.manual_seed(0)
        features = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        model = AdaMixUp(features, nn.Linear(64, 3), nn.Linear(64, 2), PairPolicy())
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for _ in range(600):
            x, y = points(128)
            optimizer.zero_grad()
            if name == "AdaMixUp":
                model(x, y).loss.backward()
            else:
                batch = mixup(x, y, per_sample=True)
                batch.loss(model.classifier(model.features(batch.x))).backward()
            optimizer.step()
        with torch.no_grad():
            x, y = points(6000)
            a, c = x[y == 0][:1500], x[y == 2][:1500]
            lam = sample_policy(*model.policy(a, c)) if name == "AdaMixUp" else torch.rand(1500)
            mixed = lam[:, None] * a + (1 - lam[:, None]) * c
            label = torch.where(lam > 0.5, 0, 2)
            rate = manifold_intrusion_rate(mixed, label, x, y, 0.05)
            line = torch.linspace(-0.1, 1.1, 300)[:, None]
            middle = model.eval()(line).softmax(1)[:, 1]
        print(f"{name}: intrusion {rate:.3f}")
        axis.hist(
            mixed.flatten().tolist(),
            bins=torch.linspace(-0.1, 1.1, 61).tolist(),
            color=COLOURS[name],
            alpha=0.55,
            weights=[10 / 1500] * 1500,
            label=f"{name}: {rate:.0%} of mixes intrude",
        )
        axis.plot(line.flatten(), middle, color=COLOURS[name])
    for place in (0, 0.5, 1):
        axis.axvspan(place - 0.05, place + 0.05, color="black", alpha=0.08)
    axis.set(xlabel="mixes of the outer classes (bars), P(middle class) (lines)", ylim=(0, 1.6))
    axis.legend(fontsize=8, loc="upper center")
    axis.set_title("three classes on a line", fontsize=10)


def draw_missing_cue(axis: plt.Axes) -> None:
    """Show accuracy over the share of images whose stronger cue is missing."""
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    for name, prob in (("plain", 0.0), ("CutMix", 0.5)):
        runs = torch.tensor([accuracies(prob, seed, shares) for seed in range(2)])
        mean = runs.mean(0)
        print(f"{name}: " + ", ".join(f"{value:.3f}" for value in mean))
        axis.plot(shares, mean, "o-", color=COLOURS[name], label=name)
    axis.axhline(0.25, color="black", linewidth=0.8, linestyle="--")
    axis.set(xlabel="share of test images without the stronger cue", ylabel="accuracy")
    axis.set(ylim=(0.2, 1.03))
    axis.legend(fontsize=8, loc="lower left")
    axis.set_title("four classes, two cues each", fontsize=10)


def images(
    count: int, cues: Tensor, generator: torch.Generator, missing: float
) -> tuple[Tensor, Tensor]:
    """Return noise images with two patterns of their class each, at random places."""
    y = torch.randint(4, (count,), generator=generator)
    x = torch.randn(count, 1, 16, 16, generator=generator)
    amplitude = torch.tensor([2.0, 1.5]).repeat(count, 1)
    amplitude[torch.rand(count, generator=generator) < missing, 0] = 0
    corner = torch.randint(12, (count, 2, 2), generator=generator)
    for i in range(count):
        for cue in range(2):
            row, column = corner[i, cue]
            x[i, 0, row : row + 5, column : column + 5] += amplitude[i, cue] * cues[cue, y[i]]
    return x, y


def accuracies(prob: float, seed: int, shares: list[float]) -> list[float]:
    """Train a small network and test it with the stronger cue missing more and more often."""
    generator = torch.Generator().manual_seed(seed)
    cues = torch.randn(2, 4, 5, 5, generator=generator).sign()
    x, y = images(300, cues, generator, missing=0.0)
    tests = [images(500, cues, generator, share) for share in shares]
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(25):
        for rows in torch.randperm(300).split(50):
            batch = cutmix(x[rows], y[rows], prob=prob)
            optimizer.zero_grad()
            batch.loss(model(batch.x)).backward()
            optimizer.step()
    with torch.no_grad():
        return [(model(a).argmax(1) == b).double().mean().item() for a, b in tests]


if __name__ == "__main__":
    main()
