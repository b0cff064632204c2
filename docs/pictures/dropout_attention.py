"""Draw docs/pictures/dropout_attention.png: who sees which key, and what sampling does to results.

python docs/pictures/dropout_attention.py, some ten seconds; needs the extra ``bench``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor
from torch.nn import functional as F

from regularizers.dropout import jitter_permutation, subsampled_attention

mpl.use("Agg")
import matplotlib.pyplot as plt

TOKENS, KEYS, DRAWS = 64, 16, 400
COLOURS = ("#b3446c", "#2b6a99", "#d98c2b", "#4c8c4a")


def main() -> None:
    """Draw both rows of the picture."""
    torch.set_num_threads(1)
    figure, axes = plt.subplots(2, 4, figsize=(13, 6.6))
    draw_visible(axes[0])
    draw_grid(axes[1, 0])
    draw_distances(axes[1, 1])
    draw_consistency(axes[1, 2], axes[1, 3])
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100, metadata={"Software": None})


def visible(**options: object) -> Tensor:
    """Ask the function itself: with one-hot values the result names the keys that were seen."""
    one_hot = torch.eye(TOKENS)[None, None]
    flat = torch.zeros(1, 1, TOKENS, 1)
    return subsampled_attention(flat, flat, one_hot, seed=1, **options)[0, 0] > 0  # type: ignore[arg-type]


def draw_visible(axes: list[plt.Axes]) -> None:
    """Show the keys (columns) that each query (row) sees."""
    cases = {
        "unbiased": {"num_keys": KEYS},
        "unbiased, causal": {"num_keys": KEYS, "is_causal": True},
        "local, sigma = 8": {"window": KEYS, "mode": "local"},
        "local, causal": {"window": KEYS, "mode": "local", "is_causal": True},
    }
    for axis, (name, options) in zip(axes, cases.items(), strict=True):
        seen = visible(**options)
        axis.imshow(seen, cmap="Purples", vmin=0, vmax=1.2, interpolation="nearest")
        axis.set_title(f"{name}\n{seen.sum(1).double().mean():.1f} of {TOKENS} keys", fontsize=10)
        axis.set(xlabel="key", ylabel="query", xticks=[], yticks=[])


def draw_grid(axis: plt.Axes) -> None:
    """Show the windows of tokens that make up an image."""
    side = 16
    order = jitter_permutation(1, side**2, 1.0, window=16, grid=(side, side), seed=2)[0]
    windows = torch.empty_like(order)
    windows[order] = torch.arange(side**2) // 16
    shades = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    axis.imshow(shades[windows].view(side, side), cmap="tab20", interpolation="nearest")
    axis.set_title("windows of a 16 x 16 grid\nlocal, w = 16, sigma = 1", fontsize=10)
    axis.set(xticks=[], yticks=[])


def draw_distances(axis: plt.Axes) -> None:
    """Show how often two tokens share a window, over their distance."""
    tokens, window = 256, 32
    numbers = (torch.arange(tokens) // window).expand(DRAWS, -1)
    for colour, sigma in zip(COLOURS, (0.0, 8.0, 32.0, 1e6), strict=True):
        order = jitter_permutation(DRAWS, tokens, sigma, window=window, seed=1)
        windows = torch.empty_like(order).scatter(1, order, numbers)
        distances = range(1, 129)
        shares = [(windows[:, :-d] == windows[:, d:]).double().mean() for d in distances]
        label = "sigma = inf" if sigma > tokens else f"sigma = {sigma:g}"
        axis.plot(distances, shares, color=colour, label=label)
    axis.set_title("chance to share a window\nN = 256, w = 32", fontsize=10)
    axis.set_xlabel("distance of two tokens")
    axis.legend(fontsize=8, frameon=False)


def draw_consistency(bias_axis: plt.Axes, error_axis: plt.Axes) -> None:
    """Show how results close in on dense attention, for one Gaussian problem."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, TOKENS, 16, generator=generator)
    dense = F.scaled_dot_product_attention(q, k, v)
    many = [tensor.expand(DRAWS, -1, -1, -1) for tensor in (q, k, v)]
    counts = (4, 8, 16, 32, 48, 64)
    biases, errors = [], []
    for n in counts:
        found = subsampled_attention(*many, num_keys=n, seed=0)
        biases.append((found.mean(0) - dense[0]).norm() / dense.norm())
        errors.append((found - dense).square().mean(0).sum().sqrt() / dense.norm())
        print(f"| {n} | {biases[-1]:.2f} | {errors[-1]:.2f} |")
    for axis, values, name in (
        (bias_axis, biases, "bias of the mean result"),
        (error_axis, errors, "deviation of one result"),
    ):
        axis.plot(counts, values, color=COLOURS[0], marker="o", markersize=4)
        axis.set_title(f"{name}\nrelative to dense attention, N = 64", fontsize=10)
        axis.set_xlabel("keys drawn")
        axis.set_ylim(0)


if __name__ == "__main__":
    main()
