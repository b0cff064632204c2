"""Draw conr_features.png: features and errors of a long-tailed regression, with and without ConR.

``python docs/pictures/conr_features.py`` takes about 10 s on one core and gives the same picture
every time.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from torch import Tensor, nn

from regularizers.representation import ConRLoss

SEEDS, STEPS, BATCH = 6, 300, 64
BETAS = {"L1 loss": 0.0, "L1 loss + ConR": 1.0}
COLOURS = {"L1 loss": "#D55E00", "L1 loss + ConR": "#0072B2"}
EDGES = torch.linspace(0, 10, 11)


def samples(
    project: Tensor, low: float, high: float, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return noisy inputs [count, 20] on a curve, and the targets that say where on it."""
    y = low + (high - low) * torch.rand(count, generator=generator)
    clean = torch.stack([(y / 2).sin(), (y / 2).cos()], 1) @ project
    return clean + 0.3 * torch.randn(clean.shape, generator=generator), y


def train(beta: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, errors and targets of a test set whose targets are uniform."""
    generator = torch.Generator().manual_seed(seed)
    project = torch.randn(2, 20, generator=generator)
    common = samples(project, 0, 5, 500, generator)
    rare = samples(project, 8, 10, 15, generator)
    x, y = (torch.cat(parts) for parts in zip(common, rare, strict=True))
    test_x, test_y = samples(project, 0, 10, 1500, generator)
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
    head = nn.Linear(32, 1)
    conr = ConRLoss(window=1.0, temperature=0.2, push=0.2)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=2e-3)
    for _ in range(STEPS):
        batch = torch.randint(len(x), (BATCH,), generator=generator)
        features = body(x[batch])
        predicted = head(features).squeeze(1)
        loss = nn.functional.l1_loss(predicted, y[batch])
        if beta:
            loss = loss + beta * conr(features, y[batch], predicted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        features = body(test_x)
        return features, (head(features).squeeze(1) - test_y).abs(), test_y


def main() -> None:
    """Train with and without, and draw features of one seed and errors of all."""
    torch.set_num_threads(1)
    figure = Figure(figsize=(12.8, 3.8), layout="constrained")
    *clouds, errors = figure.subplots(1, 3)
    middles = (EDGES[1:] + EDGES[:-1]) / 2
    for axes, (name, beta) in zip(clouds, BETAS.items(), strict=True):
        runs = [train(beta, seed) for seed in range(SEEDS)]
        features, _, y = runs[0]
        seen = PCA(2).fit_transform(nn.functional.normalize(features, dim=1).numpy())
        points = axes.scatter(*seen.T, c=y, cmap="viridis", s=6)
        axes.set(title=f"{name}: directions of test features", xticks=[], yticks=[])
        binned = torch.stack(
            [
                torch.stack([e[torch.bucketize(t, EDGES) == k + 1].mean() for k in range(10)])
                for _, e, t in runs
            ]
        )
        errors.plot(middles, binned.mean(0), color=COLOURS[name], label=name, linewidth=2)
        errors.fill_between(
            middles, binned.amin(0), binned.amax(0), color=COLOURS[name], alpha=0.15, linewidth=0
        )
    figure.colorbar(points, ax=clouds[1], label="target")
    errors.axvspan(5, 8, color="0.92", zorder=0)
    errors.text(6.5, 0.05, "no samples", ha="center", color="0.4", fontsize=8)
    errors.text(9, 0.05, "15 samples", ha="center", color="0.4", fontsize=8)
    errors.text(2.5, 0.05, "500 samples", ha="center", color="0.4", fontsize=8)
    errors.set(xlabel="target", title=f"mean absolute error, {SEEDS} seeds", ylim=(0, None))
    errors.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
