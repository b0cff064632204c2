"""Draw manifold_entropy.png: a GAN on a ring of Gaussians, with and without entropy terms.

``python docs/pictures/manifold_entropy.py`` takes about 30 s on one core and gives the same picture
every time.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from regularizers.information import ManifoldEntropy

STEPS, BATCH, MODES, DIM, SEEDS = 1500, 128, 8, 8, 2


def centers() -> Tensor:
    """Return the modes, on a circle of radius 2."""
    angle = 2 * math.pi * torch.arange(MODES) / MODES
    return 2 * torch.stack([angle.cos(), angle.sin()], dim=1)


def mlp(inner: int, outer: int) -> nn.Sequential:
    """Return a net with two hidden layers."""
    return nn.Sequential(
        nn.Linear(inner, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outer)
    )


def train(weight: float, seed: int) -> Tensor:
    """Return samples of the trained generator; weight 0 trains with the critic alone."""
    torch.manual_seed(seed)
    generator, critic = mlp(4, 2), mlp(2, DIM).append(nn.Tanh())
    terms = ManifoldEntropy(DIM, bank_size=512, weight=weight, warmup_epochs=300, form="mean_log")
    for_generator, for_critic = (
        torch.optim.Adam(module.parameters(), lr=2e-4, betas=(0.5, 0.9), fused=True)
        for module in (generator, critic)
    )
    for step in range(STEPS):
        real = centers()[torch.randint(MODES, (BATCH,))] + 0.05 * torch.randn(BATCH, 2)
        fake = generator(torch.randn(BATCH, 4))
        found = terms.discriminator_terms(critic, real, fake, step)
        for_critic.zero_grad()
        (found.loss if weight else found.critic).backward()
        for_critic.step()
        if step % 2 == 0:
            heard = terms.generator_terms(critic, fake, step)
            for_generator.zero_grad()
            (heard.loss if weight else heard.critic).backward()
            for_generator.step()
    with torch.no_grad():
        samples: Tensor = generator(torch.randn(1000, 4))
    return samples


def main() -> None:
    """Train four times and draw."""
    torch.set_num_threads(1)
    figure = Figure(figsize=(11.6, 3.2), layout="constrained")
    axes = iter(figure.subplots(1, 2 * SEEDS))
    for name, weight in (("critic alone", 0.0), ("with entropy terms", 0.1)):
        for seed in range(SEEDS):
            samples, ax = train(weight, seed), next(axes)
            reached = (torch.cdist(centers(), samples).amin(1) < 0.4).sum()
            ax.scatter(*samples.T, s=3, alpha=0.5, color="#0072B2")
            ax.scatter(*centers().T, s=160, facecolor="none", edgecolor="#D55E00", linewidth=1.5)
            ax.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
            ax.set_title(f"{name}, seed {seed}:\n{reached} of {MODES} modes", fontsize=10)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
