"""Draw docs/pictures/perturbed_codes.png: which codes perturbed tokens go to, and how far."""

from pathlib import Path

import matplotlib as mpl
import torch

from regularizers.dropout import perturb_indices

mpl.use("Agg")
import matplotlib.pyplot as plt

CODES, TOKENS = 300, 40


def main() -> None:
    """Draw the picture."""
    torch.set_num_threads(1)
    codebook = torch.randn(CODES, 2, generator=torch.Generator().manual_seed(0))
    options = [
        ("distance, temperature 0.05", {"temperature": 0.05}),
        ("distance, temperature 0.5", {"temperature": 0.5}),
        ("uniform", {"mode": "uniform"}),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
    for axis, (title, option) in zip(axes, options, strict=False):
        _draw_moves(axis, codebook, title, option)
    _draw_displacement(axes[3], codebook)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


def _draw_moves(axis, codebook, title, option) -> None:
    indices = torch.arange(TOKENS)
    moved = perturb_indices(indices, codebook, rate=0.5, seed=1, **option)
    axis.scatter(*codebook.T, s=5, color="0.7")
    for start, end in zip(codebook[indices], codebook[moved], strict=True):
        if not torch.equal(start, end):
            axis.annotate(
                "", end.tolist(), start.tolist(), arrowprops={"arrowstyle": "->", "color": "C0"}
            )
    axis.set(title=title, xticks=[], yticks=[], aspect="equal")


def _draw_displacement(axis, codebook) -> None:
    indices = torch.arange(CODES).repeat(50)

    def displacement(**option) -> float:
        moved = perturb_indices(indices, codebook, rate=1.0, seed=2, **option)
        return (codebook[moved] - codebook[indices]).square().sum(1).mean().item()

    temperatures = torch.logspace(-3, 3, 25)
    values = [displacement(temperature=t) for t in temperatures.tolist()]
    axis.loglog(temperatures, values, label="distance")
    axis.axhline(displacement(mode="uniform"), color="C1", ls="--", label="uniform")
    axis.set(title="mean squared move of a token", xlabel="temperature")
    axis.legend()


if __name__ == "__main__":
    main()
