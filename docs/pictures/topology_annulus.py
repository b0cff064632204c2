"""Draw topology_annulus.png: masks fitted to flipped labels, and tokens in the Poincare ball.

``python docs/pictures/topology_annulus.py`` takes about 20 s on one core and gives the same picture
every time.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor
from torch.nn import functional as F

from regularizers.representation import (
    betti_numbers,
    hyperbolic_info_nce,
    persistence_diagram_distance,
    poincare_expmap0,
    topology_surrogate_loss,
)

SIZE, IMAGES, TOKENS = 32, 5, 24


def annulus() -> Tensor:
    """Return a ring, ``[1, 1, SIZE, SIZE]``."""
    place = torch.arange(SIZE) - (SIZE - 1) / 2
    radius = (place[:, None] ** 2 + place**2).sqrt()
    return ((radius > 6) & (radius < 12)).float()[None, None]


def fit(labels: Tensor, alpha: float, beta: float) -> Tensor:
    """Fit one free logit a pixel to labels; return probabilities."""
    logits = torch.zeros_like(labels, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(300):
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        loss = loss + topology_surrogate_loss(logits.sigmoid(), labels, alpha=alpha, beta=beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach().sigmoid()


def embed() -> tuple[Tensor, Tensor, Tensor]:
    """Return points of the ball before and after training, and the images of the tokens."""
    v = (0.25 * torch.randn(IMAGES * TOKENS, 2)).requires_grad_()
    ids = torch.arange(IMAGES).repeat_interleave(TOKENS)
    before = poincare_expmap0(v.detach())
    optimizer = torch.optim.Adam([v], lr=0.02)
    for _ in range(150):
        loss = hyperbolic_info_nce(poincare_expmap0(v), ids, temperature=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, poincare_expmap0(v.detach()), ids


def main() -> None:
    """Fit, embed and draw."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    truth = annulus()
    labels = torch.where(torch.rand(truth.shape) < 0.04, 1 - truth, truth)
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    axes = figure.subplots(1, 5)
    masks = {
        "labels": labels,
        "pixel loss": fit(labels, 0.0, 0.0),
        "with the surrogate": fit(labels, 1e-3, 1.0),
    }
    for place, (name, mask) in zip(axes, masks.items(), strict=False):
        b0, b1 = betti_numbers(mask[0, 0])
        wrong = int(((mask > 0.5) != (truth > 0.5)).sum())
        distance = persistence_diagram_distance(mask, truth)
        place.imshow(mask[0, 0], cmap="Blues", vmin=0, vmax=1)
        place.set(xticks=[], yticks=[], title=name)
        place.set_xlabel(
            f"b0 = {b0}, b1 = {b1}, {wrong} wrong pixels\ndiagram distance {distance:.2f}"
        )
    before, after, ids = embed()
    for place, z, name in zip(axes[3:], (before, after), ("before", "after"), strict=True):
        place.add_patch(Circle((0, 0), 1, fill=False, color="0.5"))
        place.scatter(*z.T, c=ids, cmap="tab10", s=8)
        place.set(
            xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal", xticks=[], yticks=[], title=name
        )
        place.set_xlabel("tokens of 5 images in the ball")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
