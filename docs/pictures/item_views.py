"""Draw item_views.png: information between features, masks that follow it, and rare items found.

``python docs/pictures/item_views.py`` takes about 30 s on one core and gives the same picture every
time.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_wine
from sklearn.preprocessing import KBinsDiscretizer
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers.representation import (
    ItemAugmenter,
    batch_contrastive_loss,
    batch_softmax_loss,
    correlated_feature_mask,
    feature_mutual_information,
)

CLICKS = (50, 150, 500, 1500)
COLOURS = {0.0: "#D55E00", 0.3: "#0072B2"}
SEEDS = 3


def wine_information() -> tuple[Tensor, list[str]]:
    """Return the information between 13 properties of 178 wines, in four bins each."""
    wine = load_wine()
    bins = KBinsDiscretizer(4, encode="ordinal", quantile_method="averaged_inverted_cdf")
    values = torch.from_numpy(bins.fit_transform(wine.data)).long()
    return feature_mutual_information(values, [4] * 13), [
        name.replace("_", " ").split("/")[0] for name in wine.feature_names
    ]


def precision(clicks: int, alpha: float, seed: int) -> float:
    """Return how many of the 5 nearest items of a rare one belong to its group."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    group = torch.arange(200) % 20
    decided = torch.randint(10, (20, 6), generator=generator)
    noise = torch.randint(10, (200, 6), generator=generator)
    wrong = torch.rand(200, 6, generator=generator) < 0.2
    values = torch.where(wrong, noise, decided[group]) + 10 * torch.arange(6)
    popularity = torch.arange(1, 201).float() ** -1.0
    popularity = popularity[torch.randperm(200, generator=generator)]
    items = popularity.multinomial(clicks, replacement=True, generator=generator)
    rare = popularity.argsort()[:100]
    users, table = nn.Embedding(20, 16), nn.Embedding(60, 8)
    tower = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 16))
    augmenter = ItemAugmenter(6, 8, mask="rfm")
    modules = nn.ModuleList([users, table, tower, augmenter])
    optimizer = torch.optim.Adam(modules.parameters(), lr=1e-2)
    for _ in range(200):
        batch = items[torch.randint(clicks, (64,), generator=generator)]
        query = F.normalize(users(group[batch]), dim=1)
        item = F.normalize(tower(table(values[batch])), dim=1)
        loss = batch_softmax_loss(query, item, temperature=0.1)
        if alpha:
            uniform = torch.randperm(200, generator=generator)[:64]
            first, second = augmenter(table(values[uniform]), generator=generator)
            loss = loss + alpha * batch_contrastive_loss(tower(first), tower(second))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        z = F.normalize(tower(table(values)), dim=1)
        near = (z[rare] @ z.T).scatter(1, rare[:, None], -2).topk(5).indices
        return (group[near] == group[rare][:, None]).float().mean().item()


def main() -> None:
    """Compute the three and draw."""
    torch.set_num_threads(1)
    figure = Figure(figsize=(13.6, 4.4), layout="constrained")
    table, masks, curve = figure.subplots(1, 3, width_ratios=[1.25, 1, 0.9])
    information, names = wine_information()
    image = table.imshow(information.clone().fill_diagonal_(torch.nan), cmap="Blues")
    table.set_xticks(range(13), names, rotation=90, fontsize=7)
    table.set_yticks(range(13), names, fontsize=7)
    table.set_title("information between features (nats)", fontsize=10)
    figure.colorbar(image, ax=table, shrink=0.8)
    drawn = correlated_feature_mask(
        information, num_masked=4, size=16, generator=torch.Generator().manual_seed(0)
    )
    masks.imshow(drawn.T, cmap="Greys", vmax=1.4, aspect="auto")
    masks.set_yticks(range(13), names, fontsize=7)
    masks.set(xlabel="batch", title="hidden in the first view (5 of 13)")
    for alpha, colour in COLOURS.items():
        found = torch.tensor(
            [[precision(clicks, alpha, seed) for seed in range(SEEDS)] for clicks in CLICKS]
        )
        curve.plot(CLICKS, found.mean(1), color=colour, marker="o", label=f"alpha = {alpha:g}")
        curve.fill_between(
            CLICKS, found.amin(1), found.amax(1), color=colour, alpha=0.15, linewidth=0
        )
    curve.set(xscale="log", xlabel="clicks in the log", title="rare items: group precision@5")
    curve.set_xticks(CLICKS, [str(clicks) for clicks in CLICKS])
    curve.minorticks_off()
    curve.legend(frameon=False)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
