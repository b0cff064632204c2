"""Draw tabular_jepa.png: feature masks, and collapse with and without regularization tokens.

``python docs/pictures/tabular_jepa.py`` takes about 30 s on one core and gives the same picture
every time. The table is scikit-learn's wine data: 178 rows, 13 columns.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from sklearn.datasets import load_wine
from torch import Tensor, nn

from regularizers.dropout import sample_feature_masks
from regularizers.representation import (
    FeaturePredictor,
    FeatureTokenizer,
    TabularJEPA,
    collapse_metrics,
)

SEEDS, STEPS, EVERY, DIM = 3, 300, 10, 16
COLOURS = {0: "#D55E00", 1: "#0072B2"}


def table() -> Tensor:
    """Return the standardised table."""
    x = torch.tensor(load_wine().data).float()
    return (x - x.mean(0)) / x.std(0)


def train(num_reg_tokens: int, seed: int) -> list[float]:
    """Return the intra-feature variance of the context encoder every few steps."""
    x = table()
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(DIM, 2, 2 * DIM, dropout=0.0, batch_first=True)
    model = TabularJEPA(
        FeatureTokenizer(x.shape[1], [], DIM, num_reg_tokens=num_reg_tokens),
        nn.TransformerEncoder(layer, 2),
        FeaturePredictor(num_reg_tokens + x.shape[1], DIM, depth=1),
        momentum=(0.99, 1.0),
    )
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=3e-3)
    variances = []
    for step in range(STEPS):
        if step % EVERY == 0:
            with torch.no_grad():
                metrics = collapse_metrics(model.encode(x), seed=0)
            variances.append(metrics["intra_feature_variance"].item())
        loss = model(x[torch.randint(len(x), (64,))], seed=step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(step / STEPS)
    return variances


def masks(rows: int, features: int) -> Tensor:
    """Return an image [rows x 5, features + 1]: 0 unseen, 1 context, 2 target, 3 the token."""
    contexts, targets = sample_feature_masks(rows, features, seed=3)
    image = torch.full((rows, 5, features + 1), torch.nan)
    image[:, :4] = 0
    image[:, :4, 0] = 3
    for row in range(rows):
        for number, target in enumerate(targets[:, row]):
            image[row, number, 1 + contexts[0, row]] = 1
            image[row, number, 1 + target] = 2
    return image.flatten(0, 1)[:-1]


def main() -> None:
    """Draw masks, train six times, draw the variances."""
    torch.set_num_threads(1)
    figure = Figure(figsize=(12.8, 4.2), layout="constrained")
    picture, curves = figure.subplots(1, 2)
    image = masks(5, 13)
    colours = ListedColormap(["0.92", "#0072B2", "#E69F00", "#009E73"])
    picture.imshow(image, cmap=colours, aspect="auto", interpolation="nearest")
    names = ("neither", "context", "target", "regularization token")
    for colour, name in zip(colours.colors, names, strict=True):
        picture.plot([], [], "s", color=colour, label=name)
    picture.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 0))
    picture.set_yticks([1.5 + 5 * row for row in range(5)], [f"row {row}" for row in range(5)])
    picture.set_xticks([])
    picture.set_title("one context and four targets a row, 13 columns")
    steps = range(0, STEPS, EVERY)
    for count, colour in COLOURS.items():
        runs = torch.tensor([train(count, seed) for seed in range(SEEDS)])
        for run in runs:
            curves.plot(steps, run, color=colour, linewidth=0.8, alpha=0.5)
        label = f"{count or 'no'} regularization token"
        curves.plot(steps, runs.log().mean(0).exp(), color=colour, linewidth=2.2, label=label)
        print(count, [round(value, 4) for value in runs.log().mean(0).exp()[::5].tolist()])
    curves.set(yscale="log", xlabel="step", title="intra-feature variance (wine, 3 seeds)")
    curves.legend(frameon=False, fontsize=8)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
