"""Draw docs/pictures/muon_spectra.png: spectra under Newton-Schulz, spectral norms, collapse.

python docs/pictures/muon_spectra.py, some twenty seconds; needs the extra ``bench``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers.optim import (
    Muon,
    OrthoGrad,
    newton_schulz,
    spectral_stats,
    stablemax_cross_entropy,
)

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#4f6d7a", "#b3446c", "#c0842b")


def main() -> None:
    """Draw the three panels."""
    torch.set_num_threads(1)  # the same sums everywhere, hence the same picture
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    draw_spectra(axes[0])
    draw_norms(axes[1])
    draw_collapse(axes[2])
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


def draw_spectra(axis: plt.Axes) -> None:
    """Show singular values of a gradient before and after one to five steps."""
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(64, 64, generator=generator) * torch.logspace(0, -3, 64)
    axis.plot(torch.linalg.svdvals(G / G.norm()), color="black", label="gradient")
    for steps, colour in zip((1, 3, 5), COLOURS, strict=True):
        sigma = torch.linalg.svdvals(newton_schulz(G, steps=steps, dtype=None))
        axis.plot(sigma, color=colour, label=f"after {steps}")
    axis.set(title="singular values, largest first", yscale="log", ylim=(1e-4, 2), xlabel="index")
    axis.legend(frameon=False)


def draw_norms(axis: plt.Axes) -> None:
    """Show the spectral norm of a hidden layer in training, and the bound of Muon's decay."""
    digits = load_digits()
    X, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    lr, decay, width = 0.02, 2.0, 64

    def run(make: Callable[[nn.Parameter, list[nn.Parameter]], list[torch.optim.Optimizer]]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(64, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 10),
        )
        hidden: nn.Parameter = net[2].weight
        optimizers = make(hidden, [p for p in net.parameters() if p is not hidden])
        norms = []
        for _ in range(400):
            loss = F.cross_entropy(net(X), y)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            norms.append(spectral_stats(hidden)["sigma_max"].item())
        return norms

    def adamw(hidden, others):
        return [torch.optim.AdamW([hidden, *others], lr=lr, weight_decay=0.0)]

    def muon(weight_decay: float):
        return lambda hidden, others: [
            Muon(
                [{"params": [hidden]}, {"params": others, "use_muon": False, "lr": 0.003}],
                lr=lr,
                weight_decay=weight_decay,
            )
        ]

    runs = (("AdamW", adamw), ("Muon", muon(0.0)), ("Muon, decay 2", muon(decay)))
    for (name, make), colour in zip(runs, COLOURS, strict=True):
        axis.plot(run(make), color=colour, label=name)
    axis.axhline(1.2024 / decay, color="black", linewidth=0.8, linestyle="--")
    axis.set(title="spectral norm of a hidden layer", xlabel="step", yscale="log")
    axis.legend(frameon=False)


def draw_collapse(axis: plt.Axes) -> None:
    """Show the share of training samples whose loss is exactly zero in float32."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(32, 40, generator=generator)
    y = torch.randint(4, (32,), generator=generator)
    cases = (
        ("softmax", F.cross_entropy, False),
        ("softmax, OrthoGrad", F.cross_entropy, True),
        ("StableMax", stablemax_cross_entropy, False),
    )
    for (name, loss_of, projected), colour in zip(cases, COLOURS, strict=True):
        W = nn.Parameter(0.1 * torch.randn(4, 40, generator=torch.Generator().manual_seed(1)))
        optimizer = OrthoGrad([{"params": [W], "orthogonalize": projected}], lr=0.1)
        shares = []
        for _ in range(1500):
            loss: Tensor = loss_of(X @ W.T, y, reduction="none")
            shares.append((loss == 0).float().mean().item())
            optimizer.zero_grad()
            loss.mean().backward()
            W.grad /= W.grad.norm().clamp(min=1e-30)  # steps of one length, as under Adam
            optimizer.step()
        axis.plot(shares, color=colour, label=name)
    axis.set(title="samples with loss exactly 0 (float32)", xlabel="step")
    axis.legend(frameon=False)


if __name__ == "__main__":
    main()
