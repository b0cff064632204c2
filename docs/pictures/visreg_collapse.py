"""Draw visreg_collapse.png: what keeps embeddings from collapsing, from a nearly collapsed start.

``python docs/pictures/visreg_collapse.py`` takes about 10 s on one core and gives the same picture
every time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from regularizers.transport import SIGReg, VISReg, jepa_loss

CLASSES, FEATURES, BATCH, STEPS = 8, 16, 256, 800
COLOURS = {"invariance only": "#D55E00", "SIGReg": "#E69F00", "VISReg": "#0072B2"}


def views(generator: torch.Generator, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Return two noisy views [2, BATCH, FEATURES] of samples near class centres, and classes."""
    label = torch.randint(CLASSES, (BATCH,), generator=generator)
    sample = centers[label] + 0.5 * torch.randn(BATCH, FEATURES, generator=generator)
    return sample + 0.3 * torch.randn(2, BATCH, FEATURES, generator=generator), label


def train(
    regularizer: Callable[[Tensor], Tensor], lamb: float
) -> tuple[list[float], Tensor, Tensor]:
    """Return the standard deviation at every step, and embeddings of the end with classes."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    centers = 2 * torch.randn(CLASSES, FEATURES, generator=generator)
    encoder = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 2))
    with torch.no_grad():
        encoder[2].weight.mul_(1e-6)  # nearly collapsed
        encoder[2].bias.zero_()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.01)
    spread = []
    for _ in range(STEPS):
        x, _ = views(generator, centers)
        z = encoder(x)
        spread.append(z.detach().std(1).mean().item())
        loss, _ = jepa_loss(z, regularizer, lamb=lamb)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
    x, label = views(generator, centers)
    return spread, encoder(x[0]).detach(), label


def main() -> None:
    """Train three times and draw."""
    torch.set_num_threads(1)
    runs = {
        "invariance only": train(lambda z: z.new_zeros(()), lamb=0.0),
        "SIGReg": train(SIGReg(num_slices=64), lamb=0.9),
        "VISReg": train(VISReg(num_slices=64), lamb=0.9),
    }
    figure = Figure(figsize=(12.8, 3.6), layout="constrained")
    curve, *clouds = figure.subplots(1, 4)
    for name, (spread, _, _) in runs.items():
        curve.plot(range(1, STEPS + 1), spread, color=COLOURS[name], label=name, linewidth=2)
    curve.set(xscale="log", yscale="log", xlabel="step", title="mean standard deviation")
    curve.axhline(1, color="0.6", linewidth=1, linestyle="--")
    curve.legend(frameon=False, fontsize=8)
    for axes, (name, (_, z, label)) in zip(clouds, runs.items(), strict=True):
        axes.scatter(*z.T, c=label, cmap="tab10", s=8)
        axes.set(xlim=(-3.5, 3.5), ylim=(-3.5, 3.5), aspect="equal", title=f"{name}, embeddings")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
