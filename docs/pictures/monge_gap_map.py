"""Draw docs/pictures/monge_gap_map.png: maps learnt with and without the Monge gap.

A network learns to spread a Gaussian over a square, by a Sinkhorn divergence alone and with the
Monge gap beside it. Both start from a rotation by 120 degrees. ``python
docs/pictures/monge_gap_map.py`` takes about 15 s on one core and gives the same picture every time.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from regularizers.transport import MongeGap, SinkhornDivergence, SqEuclidean, sinkhorn_cost

BATCH, STEPS = 256, 600


def main() -> None:
    """Train both maps, draw them."""
    torch.set_num_threads(1)
    x, y = sample(400, torch.Generator().manual_seed(5))
    maps = [("divergence alone", train(0.0)), ("with the Monge gap", train(1.0))]
    optimal = sinkhorn_cost(x, y, epsilon=0.02, convention="sharp", max_iter=5000).item()
    figure, axes = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")
    colours = plt.get_cmap("hsv")(torch.atan2(x[:, 1], x[:, 0]).add(math.pi).div(2 * math.pi))
    axes[0].scatter(*y.mT, s=6, color="0.7")
    axes[0].scatter(*x.mT, s=6, color=colours)
    axes[0].set_title(f"data; an optimal map moves by {math.sqrt(optimal):.2f} (rms)", fontsize=10)
    for axis, (name, transport) in zip(axes[1:], maps, strict=True):
        with torch.no_grad():
            image = transport(x)
        moved = SqEuclidean().paired(x, image).mean().sqrt().item()
        axis.scatter(*y.mT, s=6, color="0.8")
        axis.quiver(
            *x[:150].mT, *(image - x)[:150].mT, color=colours[:150], angles="xy",
            scale_units="xy", scale=1, width=0.002, alpha=0.6,
        )  # fmt: skip
        axis.scatter(*image.mT, s=6, color=colours)
        axis.set_title(f"{name}: moves by {moved:.2f}", fontsize=10)
    for axis in axes:
        axis.set(xlim=(-4.2, 4.2), ylim=(-4.2, 4.2), aspect="equal", xticks=[], yticks=[])
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


def sample(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return points of the Gaussian and of the square."""
    x = torch.randn(n, 2, generator=generator)
    return x, 6 * torch.rand(n, 2, generator=generator) - 3


class Map(nn.Module):
    """A rotation, plus a network that starts near 0."""

    def __init__(self) -> None:
        super().__init__()
        sine, cosine = math.sin(2 * math.pi / 3), math.cos(2 * math.pi / 3)
        self.linear = nn.Linear(2, 2)
        self.linear.weight.data = torch.tensor([[cosine, -sine], [sine, cosine]])
        self.network = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the images of points."""
        return self.linear(x) + self.network(x)


def train(strength: float) -> nn.Module:
    """Return a network that fits the target, with the gap weighted by ``strength``."""
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(0)
    transport = Map()
    fit, gap = SinkhornDivergence(epsilon=0.2), MongeGap(epsilon=0.1)
    optimizer = torch.optim.Adam(transport.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        x, y = sample(BATCH, generator)
        image = transport(x)
        loss = fit(image, y)
        if strength:
            loss = loss + strength * gap(x, image)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return transport


if __name__ == "__main__":
    main()
