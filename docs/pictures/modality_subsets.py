"""Draw modality_subsets.png: accuracy when modalities are missing, with and without prediction.

``python docs/pictures/modality_subsets.py`` takes about 25 s on one core and gives the same picture
every time.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers.dropout import ModalityMAE, SumFusion, evaluate_modality_subsets

SEEDS, CLASSES, DIM, STEPS = 2, 4, 16, 500
MODELS = {"ModalityMAE": "#0072B2", "network fed zeros, trained with zeros": "#E69F00"}
MODELS["network fed zeros"] = "#D55E00"


def views(generator: torch.Generator, means: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return three noisy views [count, 3, DIM] of classes, far from zero, and the classes."""
    y = torch.randint(CLASSES, (count,), generator=generator)
    noise = 2 * torch.randn(count, 3, DIM, generator=generator)
    return (means[:, y].transpose(0, 1) + noise + 1).relu(), y


def accuracies(seed: int, offset: float) -> list[dict[tuple[int, ...], float]]:
    """Train the three models and return their accuracy for each subset of the views.

    ``offset`` is subtracted from the views, so that zero becomes one of their usual values.
    """
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(3, CLASSES, DIM, generator=generator)
    (x, y), (x_test, y_test) = (views(generator, means, count) for count in (600, 2000))
    x, x_test = x - offset, x_test - offset
    torch.manual_seed(seed)
    mae, head = ModalityMAE(3, DIM, depth=1, num_memory_tokens=2), SumFusion(3, DIM, CLASSES)
    plain, dropped = (
        nn.Sequential(nn.Flatten(), nn.Linear(3 * DIM, 64), nn.ReLU(), nn.Linear(64, CLASSES))
        for _ in range(2)
    )
    models = nn.ModuleList([mae, head, plain, dropped])
    optimizer = torch.optim.Adam(models.parameters(), lr=2e-3)
    for step in range(STEPS):
        rows = torch.randint(600, (128,), generator=generator)
        tokens, loss, missing = mae(x[rows], seed=step)
        for logits in (head(tokens), plain(x[rows]), dropped(x[rows] * ~missing[..., None])):
            loss = loss + F.cross_entropy(logits, y[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    models.eval()
    return [
        evaluate_modality_subsets(model, x_test, y_test)
        for model in (
            lambda x, present: head(mae(x, present)[0]),
            lambda x, present: dropped(x * present[..., None]),
            lambda x, present: plain(x * present[..., None]),
        )
    ]


def main() -> None:
    """Train and draw."""
    torch.set_num_threads(1)
    figure = Figure(figsize=(12.8, 3.8), layout="constrained")
    titles = {0.0: "features at least 0, around 1.3", 1.3: "the same features, centred"}
    for axes, (offset, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        runs = [accuracies(seed, offset) for seed in range(SEEDS)]
        for number, (name, colour) in enumerate(MODELS.items()):
            found = {s: sum(run[number][s] for run in runs) / SEEDS for s in runs[0][0]}
            mean = sum(found.values()) / len(found)
            places = [place + 0.27 * (number - 1) for place in range(len(found))]
            axes.bar(places, found.values(), 0.25, color=colour, label=f"{name}: {mean:.2f}")
            print(title, name, round(mean, 3))
        axes.axhline(1 / CLASSES, color="0.6", linewidth=1, linestyle="--")
        labels = ["+".join("ABC"[view] for view in subset) for subset in runs[0][0]]
        axes.set_xticks(range(len(labels)), labels)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.set(ylim=(0, 1.3), xlabel="views present", title=title, ylabel="accuracy")
        axes.legend(frameon=False, fontsize=8, title="mean of the seven subsets")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
