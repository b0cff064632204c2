"""Draw docs/pictures/optim_recipes.png: what gradient dropout keeps, and laws with asymptotes.

python docs/pictures/optim_recipes.py, some twenty seconds; needs the extra ``bench``.
"""

from __future__ import annotations

import functools
from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers.optim import ensemble_nll, keep_probability
from regularizers.scaling import fit_power_law

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"weight decay 0.1": "#c0842b", "weight decay 3": "#4f6d7a"}
MEMBERS, SHOWN = 8, 6


def main() -> None:
    """Draw the three panels."""
    torch.set_num_threads(1)  # the same sums everywhere, hence the same picture
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    draw_probability(axes[0])
    draw_data(axes[1])
    draw_members(axes[2])
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


def draw_probability(axis: plt.Axes) -> None:
    """Show the keep probability over both gradients."""
    grid = torch.linspace(-1, 1, 201)
    reg, task = torch.meshgrid(grid, grid, indexing="xy")
    probability = keep_probability(task, reg)
    shown = axis.contourf(reg, task, probability, levels=20, cmap="cividis", vmin=0, vmax=1)
    plt.colorbar(shown, ax=axis)
    axis.set(title="keep probability", xlabel="regularizer's gradient", ylabel="task gradient")


def draw_data(axis: plt.Axes) -> None:
    """Show the loss of a classifier of digits over its data, and the law fitted to it."""
    sizes = torch.tensor([100, 150, 225, 340, 500, 750])
    x = torch.logspace(1.9, 3.6, 100)
    for decay in (0.1, 3.0):
        name = f"weight decay {decay:g}"
        losses = torch.tensor(
            [
                torch.stack([member_loss(logits(int(size), decay, k)) for k in range(3)]).mean()
                for size in sizes
            ]
        )
        law = fit_power_law(sizes, losses)
        print(name, law)
        axis.plot(sizes, losses, "o", color=COLOURS[name])
        label = f"{name}: {law.E:.2f} + {law.A:.3g} $D^{{-{law.alpha:.2f}}}$"
        axis.plot(x, law.predict(x), color=COLOURS[name], label=label)
        axis.axhline(law.E, color=COLOURS[name], linewidth=0.8, linestyle="--")
    axis.set(title="loss over data", xlabel="images D", ylabel="test loss", xscale="log")
    axis.legend(frameon=False, fontsize=8)


def draw_members(axis: plt.Axes) -> None:
    """Show the loss of ensembles over their members, averaged over orders, and its law."""
    count = torch.arange(1, SHOWN + 1)
    for decay in (0.1, 3.0):
        name = f"weight decay {decay:g}"
        pool = torch.stack([logits(150, decay, k) for k in range(MEMBERS)])
        orders = [torch.randperm(MEMBERS) for _ in range(40)]
        losses = torch.stack(
            [torch.stack([member_loss(pool[order[:k]]) for order in orders]).mean() for k in count]
        )
        law = fit_power_law(count, losses, alpha=1.0)
        print(name, law)
        axis.plot(count, losses - law.E, "o", color=COLOURS[name])
        label = f"{name}: limit {law.E:.3f}"
        axis.plot(count, law.predict(count) - law.E, color=COLOURS[name], label=label)
    axis.set(title="loss above the limit of many members", xlabel="members K")
    axis.set(xscale="log", yscale="log", xticks=count.tolist(), xticklabels=count.tolist())
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8)


def member_loss(scores: Tensor) -> Tensor:
    """Return the test loss of one model's logits, or of an ensemble's."""
    return ensemble_nll(scores if scores.dim() == 3 else scores[None], digits()[1][1000:])


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Return images and labels, a fifth of the labels wrong."""
    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor(labels)
    wrong = torch.rand(len(y), generator=generator) < 0.2
    other = torch.randint(10, (len(y),), generator=generator)
    order = torch.randperm(len(y), generator=generator)
    return torch.tensor(images, dtype=torch.float32)[order] / 16, y.where(~wrong, other)[order]


def logits(size: int, decay: float, member: int) -> Tensor:
    """Return the test logits of a member: its own start and its own order of the data."""
    torch.manual_seed(1000 * member + size)
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=decay)
    for _ in range(500):
        batch = torch.randint(size, (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        return model(x[1000:])


if __name__ == "__main__":
    main()
