"""Draw attention_entropy.png: attention over bags of digits, with and without the entropy term.

``python docs/pictures/attention_entropy.py`` takes about 30 s on one core and gives the same
picture every time. A bag holds 40 of scikit-learn's digits; it is positive if 10 of them are nines
(negative bags have none, so that a single nine would tell).
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor

from regularizers.representation import GatedAttentionMIL, aem_loss, attention_neg_entropy

WEIGHTS = (0.0, 0.1, 0.5)
COLOURS = ("#D55E00", "#E69F00", "#0072B2")
SEEDS, STEPS, EVERY, SIZE, NINES = 4, 200, 10, 40, 10


def digits() -> tuple[Tensor, Tensor]:
    """Return images ``[n, 64]`` in [0, 1] and their digits."""
    data = load_digits()
    return torch.tensor(data.data).float() / 16, torch.tensor(data.target)


def bags(count: int, generator: torch.Generator, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return bags ``[count, SIZE, 64]`` of noisy images, their labels and where the nines are."""
    images, target = (tensor[rows] for tensor in digits())
    nines, others = images[target == 9], images[target != 9]
    label = torch.arange(count) % 2
    x = others[torch.randint(len(others), (count, SIZE), generator=generator)]
    where = torch.arange(SIZE).lt(NINES) & (label == 1)[:, None]
    x[where] = nines[torch.randint(len(nines), (int(where.sum()),), generator=generator)]
    return x + 0.5 * torch.randn(x.shape, generator=generator), label, where


def train(weight: float, seed: int) -> tuple[GatedAttentionMIL, list[float], float]:
    """Return a trained model, the entropy of its attention every few steps, and its accuracy."""
    generator = torch.Generator().manual_seed(seed)
    x, label, _ = bags(40, generator, slice(0, 900))
    test, test_label, _ = bags(300, generator, slice(900, None))
    torch.manual_seed(seed)
    model = GatedAttentionMIL(64, 32, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    entropies = []
    for step in range(STEPS):
        logits, attention = model(x)
        if step % EVERY == 0:
            entropies.append(-attention_neg_entropy(attention).item())
        optimizer.zero_grad()
        aem_loss(logits, attention, label, weight=weight).backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (model(test)[0].argmax(1) == test_label).double().mean().item()
    return model, entropies, accuracy


def main() -> None:
    """Train, draw a bag with its attention, the entropies and the accuracies."""
    torch.set_num_threads(1)
    figure = Figure(figsize=(12.8, 4.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 3.4])
    runs = {weight: [train(weight, seed) for seed in range(SEEDS)] for weight in WEIGHTS}
    x, _, where = bags(2, torch.Generator().manual_seed(9), slice(900, None))
    shown = 20
    pictures = top.subplots(1, shown)
    for place, axis in enumerate(pictures):
        axis.imshow(x[1, place].view(8, 8), cmap="gray_r", vmin=-0.5, vmax=1.5)
        axis.set(xticks=[], yticks=[])
        for side in axis.spines.values():
            side.set(color="#009E73" if where[1, place] else "0.8", linewidth=2.5)
    top.suptitle(
        f"the first {shown} of the {SIZE} digits of a positive bag; green: nines", fontsize=10
    )
    bars, curves, scores = bottom.subplots(1, 3, width_ratios=[2, 1, 1])
    for number, (weight, colour) in enumerate(zip(WEIGHTS, COLOURS, strict=True)):
        with torch.no_grad():
            attention = runs[weight][0][0](x)[1][1, 0].softmax(-1)
        place = torch.arange(SIZE) + 0.28 * (number - 1)
        bars.bar(place, attention, width=0.28, color=colour, label=f"weight {weight:g}")
        entropies = torch.tensor([run[1] for run in runs[weight]])
        curves.plot(range(0, STEPS, EVERY), entropies.mean(0), color=colour, linewidth=2)
        accuracies = torch.tensor([run[2] for run in runs[weight]])
        scores.bar(number, accuracies.mean(), color=colour)
        scores.plot([number] * SEEDS, accuracies, "k.", markersize=5)
        print(weight, entropies[:, -1].mean().item(), accuracies.mean().item())
    bars.axvspan(-0.5, NINES - 0.5, color="#009E73", alpha=0.12)
    bars.axhline(1 / SIZE, color="0.4", linewidth=0.8, linestyle=":")
    bars.set(title="attention in this bag (dotted: even)", xlabel="instance", xlim=(-0.6, SIZE))
    bars.legend(frameon=False, fontsize=8)
    curves.axhline(torch.tensor(SIZE).log(), color="0.4", linewidth=0.8, linestyle=":")
    curves.set(title="entropy of attention (dotted: log 40)", xlabel="step", ylabel="nats", ylim=0)
    scores.set(title=f"accuracy on test bags, {SEEDS} seeds", ylim=(0.5, 1), xlabel="weight")
    scores.set_xticks(range(len(WEIGHTS)), [f"{weight:g}" for weight in WEIGHTS])
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
