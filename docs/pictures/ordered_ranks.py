"""Draw docs/pictures/ordered_ranks.png: errors by rank, ranks over epochs, which tokens stay.

python docs/pictures/ordered_ranks.py, some thirty seconds; needs the extra ``bench``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers.dropout import (
    IndependentRankSampler,
    PrefixDistribution,
    decompose,
    lod_loss,
    ordered_layers,
    sampled_ranks,
    shrink_model,
)

mpl.use("Agg")
import matplotlib.pyplot as plt

TRAINING = 1200


def main() -> None:
    """Draw the three panels and print the figures of the second."""
    torch.set_num_threads(1)  # the same sums everywhere, hence the same picture
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    draw_errors(axes[0], images - images.mean(0))
    draw_ranks(axes[1], images, torch.tensor(digits.target)[order])
    draw_tokens(axes[2])
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


def batches(count: int, size: int = 64) -> Iterator[Tensor]:
    """Yield the indices of random batches, forever."""
    while True:
        yield from torch.randperm(count).split(size)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared distance of rows."""
    return (output - target).square().sum(1).mean()


def draw_errors(axis: plt.Axes, x: Tensor) -> None:
    """Rebuild digits by a linear map, cut to every rank."""
    ranks = range(1, 33)
    for name, sampled in (("dense, then singular values", False), ("ordered low rank", True)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
        if sampled:
            model = decompose(model)
            sampler = IndependentRankSampler(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4000)
        for batch in itertools.islice(batches(len(x)), 4000):
            optimizer.zero_grad()
            if sampled:
                inputs = x[batch]
                loss = lod_loss(
                    model, inputs, inputs, squared_error, sampler, lasso_weight=0, distill=False
                )
            else:
                loss = squared_error(model(x[batch]), x[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
        if not sampled:
            model = decompose(model)
        errors = []
        for rank in ranks:
            with torch.no_grad(), sampled_ranks(model, {"0": rank}):
                errors.append(squared_error(model(x), x).item())
        axis.plot(ranks, errors, label=name)
    values = torch.linalg.svdvals(x).square() / len(x)
    floor = [values[rank:].sum().item() for rank in ranks]
    axis.plot(ranks, floor, "k--", linewidth=1, label="principal components")
    axis.set_xlabel("rank")
    axis.set_title("rebuilding digits: squared error", fontsize=10)
    axis.set_ylim(0)
    axis.legend(fontsize=8)


def draw_ranks(axis: plt.Axes, x: Tensor, y: Tensor) -> None:
    """Train a classifier of digits under growing lasso; show the ranks that are left."""
    x, held_out, y, target = x[:TRAINING], x[TRAINING:], y[:TRAINING], y[TRAINING:]
    for lasso_weight, colour in ((1e-4, "C0"), (1e-3, "C1"), (3e-3, "C2")):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )
        decompose(model, skip_last=True)
        sampler = IndependentRankSampler(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        left = []
        for _ in range(60):
            for batch in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                loss = lod_loss(
                    model, x[batch], y[batch], F.cross_entropy, sampler, lasso_weight=lasso_weight
                )
                loss.backward()
                optimizer.step()
            left.append(shrink_model(model, 0.05)["2"])
        with torch.no_grad():
            accuracy = (model(held_out).argmax(1) == target).double().mean().item()
        final = [layer.active_rank for layer in ordered_layers(model).values()]
        print(f"lasso {lasso_weight:g}: ranks {final}, accuracy {accuracy:.3f}")
        label = f"$\\lambda$ = {lasso_weight:g}, accuracy {accuracy:.1%}"
        axis.plot(range(1, 61), left, colour, label=label)
    axis.set_ylim(0, 128)
    axis.set_xlabel("epoch")
    axis.set_title("rank of a 128 x 128 layer (digits)", fontsize=10)
    axis.legend(fontsize=8)


def draw_tokens(axis: plt.Axes) -> None:
    """Show how often each of 256 tokens is kept, with the paper's sizes."""
    places = range(1, 257)
    for num_pad, name in ((0, "no padding: nested dropout"), (224, "224 padding tokens")):
        law = PrefixDistribution.padded_uniform(256, num_pad, 32)
        axis.plot(places, law.keep_probability(), label=name)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("token")
    axis.set_title("probability that a token is kept", fontsize=10)
    axis.legend(fontsize=8)


if __name__ == "__main__":
    main()
