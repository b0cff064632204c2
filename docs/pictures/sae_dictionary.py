"""Draw sae_dictionary.png: dictionaries of digit patches, and what the variational form does.

``python docs/pictures/sae_dictionary.py`` takes some 20 s on one core and gives the same picture
every time. The patches are 4 x 4 windows of scikit-learn's digits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor

from regularizers.representation import TopKSAE, VariationalTopKSAE

SIDE, LATENTS, K, STEPS, BATCH = 4, 96, 4, 800, 256
VARIANTS: dict[str, Callable[[float], TopKSAE]] = {
    "divergence, no noise": lambda kl: VariationalTopKSAE(
        SIDE**2, LATENTS, K, variance="none", kl_weight=kl, kl_warmup_steps=STEPS // 10
    ),
    "divergence and noise": lambda kl: VariationalTopKSAE(
        SIDE**2, LATENTS, K, kl_weight=kl, kl_warmup_steps=STEPS // 10
    ),
}
WEIGHTS = [0.0, 0.03, 0.1, 0.3, 1.0]
COLOURS = {"divergence, no noise": "#0072B2", "divergence and noise": "#D55E00"}


def patches() -> Tensor:
    """Return all patches that are not blank, without their mean, ``[N, 16]``."""
    images = torch.tensor(load_digits().images).float() / 16
    found = images.unfold(1, SIDE, 1).unfold(2, SIDE, 1).reshape(-1, SIDE**2)
    found = found - found.mean(1, keepdim=True)
    found = found[found.norm(dim=1) > 0.5]
    return found / found.std()


def train(sae: TopKSAE, x: Tensor) -> tuple[TopKSAE, float, float]:
    """Return the trained autoencoder, the share of latents alive, and the unexplained variance."""
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(sae.parameters(), lr=5e-3)
    sae.attach(optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        sae.loss(x[torch.randint(len(x), (BATCH,))]).total.backward()
        optimizer.step()
    with torch.no_grad():
        output = sae.eval()(x)
    alive = (output.features != 0).any(0).double().mean().item()
    return sae, alive, ((x - output.recon).square().mean() / x.square().mean()).item()


def main() -> None:
    """Draw the picture."""
    torch.set_num_threads(1)
    x = patches()
    torch.manual_seed(0)
    plain, alive, unexplained = train(TopKSAE(SIDE**2, LATENTS, K), x)
    print(f"plain: alive {alive:.2f}, unexplained {unexplained:.3f}")
    figure = Figure(figsize=(12.5, 4.0), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.25, 1, 1])
    _draw_dictionary(left, plain)
    middle.axhline(alive, color="0.4", ls="--", label="TopKSAE")
    right.axhline(unexplained, color="0.4", ls="--")
    for name, build in VARIANTS.items():
        curves = []
        for weight in WEIGHTS:
            torch.manual_seed(0)
            curves.append(train(build(weight), x)[1:])
            print(name, weight, [round(value, 3) for value in curves[-1]])
        places = range(len(WEIGHTS))
        middle.plot(places, [c[0] for c in curves], "o-", color=COLOURS[name], label=name)
        right.plot(places, [c[1] for c in curves], "o-", color=COLOURS[name])
    for axis, title in ((middle, "latents that ever fire"), (right, "unexplained variance")):
        axis.set(title=title, xlabel="weight of the divergence", ylim=(0, 1.05))
        axis.set_xticks(range(len(WEIGHTS)), [f"{weight:g}" for weight in WEIGHTS])
    middle.legend(loc="lower left")
    path = Path(__file__).with_suffix(".png")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw_dictionary(axis, sae: TopKSAE) -> None:
    rows, columns = 8, 12
    atoms = sae.decoder.detach().view(rows, columns, SIDE, SIDE)
    sheet = torch.full((rows * (SIDE + 1) + 1, columns * (SIDE + 1) + 1), torch.nan)
    for i in range(rows):
        for j in range(columns):
            y, x = i * (SIDE + 1) + 1, j * (SIDE + 1) + 1
            sheet[y : y + SIDE, x : x + SIDE] = atoms[i, j] / atoms[i, j].abs().max()
    axis.imshow(sheet, cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set(title=f"the {LATENTS} directions of a TopKSAE", xticks=[], yticks=[])
    axis.set_frame_on(False)


if __name__ == "__main__":
    main()
