"""Draw docs/pictures/dropout_paths.png: masks on a photograph, rates, and the effect of a schedule.

python docs/pictures/dropout_paths.py, less than a minute; needs the extra ``bench``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers.dropout import (
    DepthSchedule,
    DropoutSchedule,
    RateSchedule,
    ScheduledDropout,
    TimeSchedule,
    drop_block2d,
)

mpl.use("Agg")
import matplotlib.pyplot as plt

STEPS, SYMBOLS, CONTEXT = 600, 12, 8


def main() -> None:
    """Draw both rows of the picture and print the final losses."""
    torch.set_num_threads(1)  # the same sums everywhere, hence the same picture
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.6))
    draw_masks(axes[0])
    draw_rates(axes[1])
    draw_effect(axes[1, 3])
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=90, metadata={"Software": None})


def draw_masks(axes: list[plt.Axes]) -> None:
    """Show which pixels of a photograph are dropped; the factor on the others is left out."""
    photograph = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)[None] / 255
    image = F.interpolate(photograph[:, :, :, :420], size=(112, 112), mode="area")
    cases = {
        "photograph": {"p": 0.0},
        "single pixels, p = 0.2": {"p": 0.2, "block_size": 1},
        "DropBlock, 7 x 7, p = 0.2": {"p": 0.2, "block_size": 7},
        "DropBlock, 21 x 21, exact": {"p": 0.2, "block_size": 21, "gamma": "exact"},
    }
    for axis, (name, options) in zip(axes, cases.items(), strict=True):
        kept = drop_block2d(torch.ones_like(image), seed=5, **options) != 0
        dropped = 1 - kept.float().mean()
        axis.imshow(torch.where(kept, image, 0.0)[0].permute(1, 2, 0))
        axis.set_title(f"{name}\n{dropped:.0%} dropped" if dropped else name, fontsize=10)
        axis.set(xticks=[], yticks=[])


def draw_rates(axes: list[plt.Axes]) -> None:
    """Show rates over depth and over time."""
    layers = range(24)
    path = RateSchedule(0.5, time=TimeSchedule("linear"))
    for progress in (1.0, 0.5, 0.1):
        rates = [path(layer, 24, progress) for layer in layers]
        axes[0].plot(layers, rates, "o-", markersize=3, label=f"drop path, t = {progress:g}")
    shuffle = DepthSchedule(from_zero=True)
    rates = [0.5 * shuffle(layer, 24) for layer in layers]
    axes[0].plot(layers, rates, "k--", label="layer shuffle, any t")
    axes[0].set(xlabel="layer", title="rate over depth, p = 0.5 in the last layer")
    times = torch.linspace(0, 1, 201).tolist()
    for kind in ("constant", "linear", "cosine", "late", "early"):
        schedule = TimeSchedule(kind, start=0.5 if kind in ("late", "early") else 0.0)
        axes[1].plot(times, [schedule(t) for t in times], label=kind)
    axes[1].set(xlabel="progress t", title="share of the rate over training")
    p = torch.linspace(0, 0.6, 100)
    axes[2].plot(p, p, "k:", label="p; single pixels")
    for size in (3, 7, 21):
        inside = 1 - (1 - p / size**2) ** size**2
        axes[2].plot(p, inside, label=f"{size} x {size}, far from the border")
    axes[2].set(xlabel="p", title='dropped by gamma = "simple"')
    for axis in axes[:3]:
        axis.legend(fontsize=7)


def draw_effect(axis: plt.Axes) -> None:
    """Show the validation loss of a model that reads 1500 tokens again and again."""
    curves = {
        "no dropout": DropoutSchedule(0.0),
        "p = 0.5 from half-way": DropoutSchedule(0.5, kind="late"),
        "p = 0.5 throughout": DropoutSchedule(0.5),
    }
    train, held_out = windows()
    for name, schedule in curves.items():
        losses = validation_losses(train, held_out, schedule)
        axis.plot(range(0, STEPS + 1, 20), losses, label=name)
        print(f"{name}: {losses[-1]:.2f}")
    axis.set(xlabel="step", title="validation loss on repeated data", ylim=(1.8, 5))
    axis.legend(fontsize=7)


def windows() -> tuple[Tensor, Tensor]:
    """Return windows of an order-2 source: 1500 to train on, and held-out ones."""
    torch.manual_seed(0)
    concentration = torch.full((SYMBOLS,) * 3, 0.3)
    table = torch.distributions.Dirichlet(concentration).sample().cumsum(-1)
    tokens = [0, 1]
    for u in torch.rand(3500):
        following = torch.searchsorted(table[tokens[-2], tokens[-1]], u).item()
        tokens.append(min(int(following), SYMBOLS - 1))
    found = torch.tensor(tokens).unfold(0, CONTEXT + 1, 1)
    return found[:1500], found[1600:]


def validation_losses(train: Tensor, held_out: Tensor, schedule: DropoutSchedule) -> list[float]:
    """Return the validation loss every 20 steps."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Embedding(SYMBOLS, 16),
        nn.Flatten(),
        nn.Dropout(0.0),
        nn.Linear(16 * CONTEXT, 256),
        nn.ReLU(),
        nn.Dropout(0.0),
        nn.Linear(256, SYMBOLS),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    with ScheduledDropout(model, schedule) as dropout:
        for step in range(STEPS + 1):
            if step % 20 == 0:
                with torch.no_grad():
                    logits = model.eval()(held_out[:, :-1])
                losses.append(F.cross_entropy(logits, held_out[:, -1]).item())
                model.train()
            dropout.step(step / STEPS)
            batch = train[torch.randint(len(train), (64,))]
            optimizer.zero_grad()
            F.cross_entropy(model(batch[:, :-1]), batch[:, -1]).backward()
            optimizer.step()
    return losses


if __name__ == "__main__":
    main()
