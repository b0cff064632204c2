"""Draw sufficient_predictor.png: a predictor learnt from distances of responses on a circle.

``python docs/pictures/sufficient_predictor.py`` takes about 15 s on one core and gives the same
picture every time.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from regularizers.information import fccov, fccov_kernel, fccov_loss, metric_distances


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs [count, 5], responses on the circle, and their angles."""
    x = torch.randn(count, 5, generator=generator)
    angle = x[:, :2].square().sum(1) / 2
    return x, torch.stack([angle.cos(), angle.sin()], dim=1), angle


def main() -> None:
    """Train and draw."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    x, y, _ = draw(300, generator)
    new, _, truth = draw(500, generator)
    net = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    kernel = fccov_kernel(metric_distances(y, metric="sphere"))
    before, curve = net(new).detach(), []
    for _ in range(300):
        f = net(x)
        curve.append((fccov(f / f.std(0, correction=0), kernel)).item())
        optimizer.zero_grad()
        fccov_loss(f, kernel, lam=0.1).backward()
        optimizer.step()
    after = net(new).detach()

    figure = Figure(figsize=(12.4, 3.3), layout="constrained")
    axes = figure.subplots(1, 4)
    color = truth % (2 * torch.pi)
    axes[0].scatter(*y.T, c=torch.atan2(y[:, 1], y[:, 0]) % (2 * torch.pi), cmap="hsv", s=8)
    axes[0].set(aspect="equal", title="responses on the circle")
    axes[1].plot(curve, color="#0072B2", linewidth=2)
    axes[1].set(xlabel="step", title="FCCov, standardised")
    for ax, f, name in zip(axes[2:], (before, after), ("before", "after"), strict=True):
        ax.scatter(2 * truth, f[:, 0], c=color, cmap="hsv", s=8)
        ax.set(xlabel="$x_1^2 + x_2^2$ of new inputs", title=f"predictor {name} training")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
