"""Draw docs/pictures/sparse_plans.png: plans as k grows, and the load of a mixture's experts.

python docs/pictures/sparse_plans.py, some ten seconds; needs the extra ``bench``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers.transport import (
    Entropic,
    SparseOTRouter,
    SparsityConstrained,
    SquaredL2,
    regularized_ot,
)

mpl.use("Agg")
import matplotlib.pyplot as plt

EXPERTS, BATCH, EPOCHS = 8, 128, 4


def main() -> None:
    """Draw both rows of the picture and print the figures of the second."""
    torch.set_num_threads(1)  # the same sums everywhere, hence the same picture
    figure, axes = plt.subplots(2, 5, figsize=(12, 5.4))
    draw_plans(axes[0])
    draw_loads(axes[1])
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


def draw_plans(axes: list[plt.Axes]) -> None:
    """Show plans between two histograms on a line, densest first."""
    places = torch.linspace(0, 1, 48, dtype=torch.float64)

    def bump(centre: float, width: float) -> Tensor:
        return torch.exp(-((places - centre) ** 2) / (2 * width**2))

    a = bump(0.25, 0.1) + 0.6 * bump(0.7, 0.08) + 0.02
    b = bump(0.5, 0.16) + 0.02
    a, b = a / a.sum(), b / b.sum()
    cost = (places[:, None] - places).square()
    strength = 2.0
    cases = {
        "entropic": Entropic(0.02),
        "quadratic": SquaredL2(strength),
        **{f"k = {k}": SparsityConstrained(strength, k) for k in (8, 4, 2)},
    }
    for axis, (name, regularizer) in zip(axes, cases.items(), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = regularized_ot(cost, a, b, regularizer=regularizer, max_iter=2000)
        density = (found.plan > 1e-9).double().mean()
        axis.imshow(found.plan.sqrt(), cmap="magma_r", origin="lower")
        error = found.row_error.item()
        axis.set_title(f"{name}: {density:.0%} nonzero\nrow error {error:.0e}", fontsize=10)
        axis.set(xticks=[], yticks=[])


def draw_loads(axes: list[plt.Axes]) -> None:
    """Show which part of the token-expert pairs each expert gets, on held-out digits."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    routers: dict[str, Callable[[Tensor], Tensor]] = {
        "top 1": lambda affinity: top_softmax(affinity, 1),
        "top 2": lambda affinity: top_softmax(affinity, 2),
        "sparse OT, capacity 1": SparseOTRouter(capacity_factor=1.0, tol=1e-2),
        "sparse OT, capacity 1.5": SparseOTRouter(capacity_factor=1.5, tol=1e-2),
        "sparse OT, capacity 2": SparseOTRouter(capacity_factor=2.0, tol=1e-2),
    }
    for axis, (name, router) in zip(axes, routers.items(), strict=True):
        accuracy, load, pairs = train(router, x[:1280], y[:1280], x[1280:], y[1280:])
        print(f"| {name} | {accuracy:.3f} | {load.max() * EXPERTS:.2f} | {pairs:.2f} |")
        axis.bar(range(EXPERTS), load * EXPERTS, color="#b3446c")
        axis.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axis.set_ylim(0, 4)
        axis.set_xticks([])
        axis.set_title(f"{name}\naccuracy {accuracy:.1%}", fontsize=10)
    axes[0].set_ylabel("load / even load")


def top_softmax(affinity: Tensor, count: int) -> Tensor:
    """Weigh a token's ``count`` best experts by the softmax of all its affinities."""
    values, places = affinity.softmax(1).topk(count, 1)
    return torch.zeros_like(affinity).scatter(1, places, values)


def train(
    router: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, held_out: Tensor, target: Tensor
) -> tuple[float, Tensor, float]:
    """Train a mixture of experts; return accuracy, load of each expert, experts a token."""
    torch.manual_seed(0)
    gate = nn.Linear(64, EXPERTS)
    experts = nn.ModuleList(
        nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)) for _ in range(EXPERTS)
    )
    optimizer = torch.optim.Adam([*gate.parameters(), *experts.parameters()], lr=5e-3)

    def mixture(tokens: Tensor) -> tuple[Tensor, Tensor]:
        weights = router(gate(tokens))
        outputs = torch.stack([expert(tokens) for expert in experts], 1)
        return (weights.unsqueeze(-1) * outputs).sum(1), weights

    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(mixture(x[batch])[0], y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        outputs, weights = mixture(held_out)
    on = (weights > 0).double()
    accuracy = (outputs.argmax(1) == target).double().mean().item()
    return accuracy, on.sum(0) / on.sum(), on.sum(1).mean().item()


if __name__ == "__main__":
    main()
