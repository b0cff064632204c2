"""Draw latent_factors.png: blocks of a latent that hold one factor each, and a game of modalities.

``python docs/pictures/latent_factors.py`` takes about 30 s on one core and gives the same picture
every time.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers.information import MCR, XFactorsLoss

SAMPLES, VALUES = 800, 4


def blocks(nce_weight: float) -> tuple[Tensor, Tensor]:
    """Train an autoencoder of two mixed factors; return the latents of both blocks and labels."""
    torch.manual_seed(1)
    labels = torch.randint(VALUES, (SAMPLES, 2))
    hot = torch.cat([F.one_hot(column, VALUES) for column in labels.T], 1).float()
    x = hot @ torch.randn(2 * VALUES, 24) + 0.1 * torch.randn(SAMPLES, 24)
    encoder = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 16))
    decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 24))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-2)
    loss = XFactorsLoss(block_dims=[2, 2], nce_weights=nce_weight)
    for _ in range(300):
        rows = torch.randint(SAMPLES, (128,))
        mu_s, logvar_s, mu_t, logvar_t = encoder(x[rows]).split(4, 1)
        z_s, z_t = (
            mu + (log_variance / 2).exp() * torch.randn_like(mu)
            for mu, log_variance in ((mu_s, logvar_s), (mu_t, logvar_t))
        )
        recon = F.mse_loss(decoder(torch.cat([z_s, z_t], 1)), x[rows])
        total = loss(mu_s, logvar_s, mu_t, logvar_t, z_t, labels[rows], recon=recon).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    with torch.no_grad():
        return encoder(x)[:, 8:12], labels


def influences(weight: float) -> Tensor:
    """Return the influence of a clear and a noisy modality at every step, ``[steps, 2]``."""
    torch.manual_seed(0)
    centers = torch.randn(2, VALUES, 20)
    encoders = nn.ModuleList([nn.Sequential(nn.Linear(20, 16), nn.ReLU()) for _ in range(2)])
    head = nn.Linear(32, VALUES)
    game = MCR(lambda latents: head(torch.cat(list(latents), 1)), weight=weight, num_samples=4)
    optimizer = torch.optim.Adam([*encoders.parameters(), *head.parameters()], lr=1e-3)
    curve = []
    for _ in range(200):
        labels = torch.randint(VALUES, (128,))
        x = [c[labels] + s * torch.randn(128, 20) for c, s in zip(centers, (1.0, 2.0), strict=True)]
        latents = [encoder(part) for encoder, part in zip(encoders, x, strict=True)]
        logits = head(torch.cat(latents, 1))
        output = game(latents, logits, labels)
        optimizer.zero_grad()
        (F.cross_entropy(logits, labels) + output.total).backward()
        optimizer.step()
        curve.append(output.influence)
    return torch.stack(curve)


def main() -> None:
    """Train and draw."""
    torch.set_num_threads(1)
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    grid = figure.subplots(2, 3, width_ratios=(1, 1, 1.3))
    for row, (name, weight) in enumerate((("without contrast", 0.0), ("with contrast", 0.1))):
        latents, labels = blocks(weight)
        for k, axes in enumerate(grid[row, :2]):
            axes.scatter(*latents[:, :2].T, c=labels[:, k], cmap="tab10", s=5)
            axes.set(title=f"{name}: $T_1$ by factor {k + 1}", xticks=[], yticks=[])
    for axes in grid[:, 2]:
        axes.remove()
    axes = figure.add_subplot(grid[0, 2].get_gridspec()[:, 2])
    for weight, style in ((0.0, "--"), (3.0, "-")):
        curve = influences(weight)
        for m, (name, colour) in enumerate((("clear", "#0072B2"), ("noisy", "#D55E00"))):
            smooth = curve[:, m].unfold(0, 10, 1).mean(1)
            axes.plot(smooth, style, color=colour, label=f"{name}, weight {weight:g}")
    axes.set(xlabel="step", title="influence of two modalities, nats")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
