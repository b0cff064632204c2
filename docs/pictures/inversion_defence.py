"""Draw inversion_defence.png: what predictions reveal, and how well they predict, under MID.

``python docs/pictures/inversion_defence.py`` takes about 30 s on one core and gives the same
picture every time.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from regularizers.information import (
    MIDTreeClassifier,
    VIBHead,
    linear_inversion_attack,
    mid_loss,
)

BETAS = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LAMBDAS = (0.0, 0.03, 0.06, 0.1, 0.2, 0.4, 0.6, 0.8)


def network(beta: float) -> tuple[float, float, float]:
    """Return accuracy, R^2 of the inversion and the bound in nats of a trained bottleneck."""
    generator = torch.Generator().manual_seed(0)
    centers = 1.5 * torch.randn(4, 20, generator=generator)
    label = torch.randint(4, (1600,), generator=generator)
    x = centers[label] + torch.randn(1600, 20, generator=generator)
    torch.manual_seed(0)
    body, head = nn.Sequential(nn.Linear(20, 32), nn.ReLU()), VIBHead(32, 4)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(400):
        logits, mu, std = head(body(x[:800]))
        optimizer.zero_grad()
        mid_loss(logits, label[:800], mu, std, beta=beta).backward()
        optimizer.step()
    with torch.no_grad():
        logits, mu, std = head(body(x[800:]))
        losses = [mid_loss(logits, label[800:], mu, std, beta=b).item() for b in (1.0, 0.0)]
    accuracy = (logits.argmax(1) == label[800:]).double().mean().item()
    r2 = linear_inversion_attack(logits, x[800:], generator=generator).item()
    return accuracy, r2, losses[0] - losses[1]


def tree(lambda_mi: float, release: str) -> tuple[float, float]:
    """Return information and accuracy on new samples of a tree."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 5, generator=generator)
    noise = 0.7 * torch.randn(4000, generator=generator)
    y = (x[:, 0] + x[:, 1] * x[:, 2] + noise > 0).long()
    fitted = MIDTreeClassifier(
        max_depth=6, lambda_mi=lambda_mi, min_samples=10, release=release
    ).fit(x[:2000], y[:2000])
    accuracy = (fitted.predict(x[2000:]) == y[2000:]).double().mean().item()
    return fitted.leaf_information(), accuracy


def main() -> None:
    """Train and draw."""
    torch.set_num_threads(1)
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    accuracy, r2, bound = zip(*(network(beta) for beta in BETAS), strict=True)
    place = range(len(BETAS))
    left.plot(place, accuracy, "o-", color="#0072B2", label="accuracy")
    left.plot(place, r2, "o-", color="#D55E00", label="$R^2$ of a linear inversion")
    left.set(ylim=(0, 1.05), title="bottleneck: accuracy and leak")
    left.legend(frameon=False, fontsize=8, loc="lower left")
    middle.plot(place, bound, "o-", color="#009E73")
    middle.set(yscale="log", title="bottleneck: bound on I(X; code), nats")
    for ax in (left, middle):
        ax.set(xticks=place, xticklabels=[f"{beta:g}" for beta in BETAS], xlabel="beta")
    for release, color in (("proba", "#0072B2"), ("label", "#E69F00")):
        points = [tree(lambda_mi, release) for lambda_mi in LAMBDAS]
        right.plot(*zip(*points, strict=True), "o-", color=color, label=f"release={release!r}")
    right.set(xlabel="I(X; prediction), nats", ylabel="accuracy", title="tree, over lambda")
    right.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
