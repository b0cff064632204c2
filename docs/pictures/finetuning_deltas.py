"""Draw docs/pictures/finetuning_deltas.png: LoRA and ALLoRA, SoMA's drift, DAREx over q.

python docs/pictures/finetuning_deltas.py, some ten seconds; needs the extra ``bench``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from torch import nn

from regularizers.optim import ALLoRALinear, LowRankLinear, SoMALinear, drop_delta, mse_q

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#4f6d7a", "#c0842b", "#b3446c")
P = 0.99


def main() -> None:
    """Draw the three panels."""
    torch.set_num_threads(1)  # the same sums everywhere, hence the same picture
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    draw_losses(axes[0])
    draw_drift(axes[1])
    draw_errors(axes[2])
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


def draw_losses(axis: plt.Axes) -> None:
    """Show how a rank-1 change of a weight is learned by SGD."""
    makes: dict[str, Callable[[nn.Linear], LowRankLinear]] = {
        "LoRA": lambda base: LowRankLinear(base, 4),
        "ALLoRA, $\\eta = 2$": lambda base: ALLoRALinear(base, 4, eta=2.0),
        "ALLoRA, $\\eta = 4$": lambda base: ALLoRALinear(base, 4, eta=4.0),
    }
    for (name, make), colour in zip(makes.items(), COLOURS, strict=True):
        torch.manual_seed(3)
        base = nn.Linear(16, 12, bias=False)
        change = torch.randn(12, 1) @ torch.randn(1, 16) / 4
        x = torch.randn(256, 16)
        target = x @ (base.weight.detach() + change).T
        torch.manual_seed(4)
        layer = make(base)
        optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.02)
        losses = []
        for _ in range(100):
            optimizer.zero_grad()
            loss = (layer(x) - target).square().sum(1).mean() / 2
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        axis.plot(losses, label=name, color=colour)
    axis.set(title="a rank-1 change, SGD", xlabel="step", ylabel="loss", yscale="log")
    axis.legend(frameon=False, fontsize=9)


def draw_drift(axis: plt.Axes) -> None:
    """Show where in the singular basis of a weight adapting it leads to changes."""
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(32, 32))
    v, _ = torch.linalg.qr(torch.randn(32, 32))
    weight = u @ torch.diag(torch.logspace(0.5, -1.5, 32)) @ v.T
    x = torch.randn(64, 32)
    target = x @ (weight + 0.05 * torch.randn(32, 32)).T
    starts = {"principal": COLOURS[1], "random": COLOURS[0], "minor": COLOURS[2]}
    for components, colour in starts.items():
        base = nn.Linear(32, 32, bias=False)
        base.weight.data = weight.clone()
        layer = SoMALinear(base, rank=4, components=components)
        optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=1e-2)
        for _ in range(200):
            optimizer.zero_grad()
            loss = (layer(x) - target).square().mean()
            loss.backward()
            optimizer.step()
        change = u.T @ (layer.merged_weight() - weight) @ v
        drift = change.square().reshape(8, 4, 8, 4).sum((1, 3)).sqrt().diagonal()
        label = f"{components}, loss {loss.item():.3f}"
        axis.plot(range(1, 9), drift, marker="o", ms=4, label=label, color=colour)
    axis.set(title="change within singular blocks", xlabel="block of 4, largest first")
    axis.set(ylabel="norm of the change")
    axis.legend(frameon=False, fontsize=9)


def draw_errors(axis: plt.Axes) -> None:
    """Show the output error of a pruned layer over q."""
    scales = torch.logspace(-2, 0, 21).tolist()
    for (mean, std), colour in zip([(0.02, 0.01), (0.0, 0.02)], COLOURS[1:], strict=True):
        torch.manual_seed(0)
        delta, x = mean + std * torch.randn(64, 512), torch.rand(64, 512)
        out = x @ delta.T
        errors = []
        for q in scales:
            pruned = (drop_delta(delta, P, q=q, seed=seed) for seed in range(8))
            squares = torch.stack([(x @ d.T - out).square().mean() for d in pruned])
            errors.append(squares.mean().sqrt().item())
        axis.plot(scales, errors, color=colour, label=f"deltas of mean {mean}")
        axis.axhline(out.square().mean().sqrt().item(), color=colour, ls=":", lw=1)
        best = mse_q(out.square().mean(), (x**2 @ (delta**2).T).mean(), p=P).item()
        axis.axvline(best, color=colour, ls="--", lw=1)
    axis.set(title=f"{P:.0%} of the deltas dropped", xlabel="q", ylabel="rms error of the output")
    axis.set(xscale="log", yscale="log")
    axis.legend(frameon=False, fontsize=9)


if __name__ == "__main__":
    main()
