"""Draw normal_prototypes.png: where INP-Former sees defects of digits.

``python docs/pictures/normal_prototypes.py`` takes about 15 s on one core and gives the same
picture every time. An image is a sheet of 2 x 2 of scikit-learn's digits; the frozen encoder is two
layers of random convolutions. Half of the digits train, the others are damaged.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from regularizers.representation import INPFormer

DIM, SIDE, STEPS, SHOWN = 16, 16, 200, 6


def sheets(count: int, rows: slice, generator: torch.Generator) -> Tensor:
    """Return images ``[count, 1, 16, 16]`` of four digits each."""
    digits = torch.tensor(load_digits().images).float()[rows] / 16
    chosen = digits[torch.randint(len(digits), (count, 2, 2), generator=generator)]
    return chosen.permute(0, 1, 3, 2, 4).reshape(count, 1, SIDE, SIDE)


def damage(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Stamp a small chequered square on every image; return which pixels it covers as well."""
    images, where = images.clone(), torch.zeros_like(images, dtype=torch.bool)
    stamp = (torch.arange(4)[:, None] + torch.arange(4)) % 2
    for image, covered in zip(images, where, strict=True):
        row, column = torch.randint(1, SIDE - 5, (2,), generator=generator).tolist()
        image[0, row : row + 4, column : column + 4] = stamp.float()
        covered[0, row : row + 4, column : column + 4] = True
    return images, where


def encoder() -> list[nn.Sequential]:
    """Return the frozen layers."""
    torch.manual_seed(0)
    convolutions = [
        nn.Conv2d(channels, DIM, 3, padding=1, padding_mode="replicate") for channels in (1, DIM)
    ]
    for convolution, size in zip(convolutions, (0.4, 0.25), strict=True):
        nn.init.normal_(convolution.weight, std=size)
        nn.init.normal_(convolution.bias, std=0.5)
    return [nn.Sequential(convolution, nn.Tanh()) for convolution in convolutions]


@torch.no_grad()
def tokens(layers: list[nn.Sequential], images: Tensor) -> list[Tensor]:
    """Return the features of both layers as tokens, ``[B, 256, DIM]``."""
    found, x = [], images
    for layer in layers:
        x = layer(x)
        found.append(x.flatten(2).mT)
    return found


def area(score: Tensor, where: Tensor) -> float:
    """Return how often a damaged pixel scores above one that is not."""
    ranks = score.flatten().argsort().argsort().double() + 1
    bad = where.flatten()
    count, others = bad.sum(), (~bad).sum()
    return ((ranks[bad].sum() - count * (count + 1) / 2) / (count * others)).item()


def main() -> None:
    """Train on sheets without defects; draw damaged ones, their maps and prototypes."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    layers = encoder()
    torch.manual_seed(1)
    model = INPFormer(DIM, num_heads=4, decoder_depth=2, groups=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        x = tokens(layers, sheets(8, slice(0, 900), generator))
        optimizer.zero_grad()
        loss = model.loss(model(x))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        if step % 50 == 0:
            print(step, loss.item())
    images, where = damage(sheets(60, slice(900, None), generator), generator)
    with torch.no_grad():
        output = model(tokens(layers, images))
        score = model.score(output, size=SIDE)
        tokens_of, prototypes = torch.stack(tokens(layers, images)).mean(0), output.prototypes
        similar = (
            nn.functional.normalize(tokens_of, dim=-1)
            @ nn.functional.normalize(prototypes, dim=-1).mT
        )
    found = area(score, where)
    print("area under the curve of pixels", found)
    figure = Figure(figsize=(12.8, 6.4), layout="constrained")
    axes = figure.subplots(3, SHOWN)
    for column in range(SHOWN):
        nearest = similar[column].argmax(-1).view(SIDE, SIDE)
        axes[0, column].imshow(images[column, 0], cmap="gray_r")
        axes[1, column].imshow(score[column, 0], cmap="magma", vmin=0, vmax=score.max())
        axes[2, column].imshow(nearest, cmap="Set2", vmin=0, vmax=7, interpolation="nearest")
        box = where[column, 0].nonzero()
        low, high = box.amin(0) - 0.5, box.amax(0) + 0.5
        for axis in axes[:2, column]:
            axis.plot(
                [low[1], high[1], high[1], low[1], low[1]],
                [low[0], low[0], high[0], high[0], low[0]],
                color="#56B4E9",
                linewidth=1.5,
            )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    names = ("damaged sheets", f"anomaly map (AUROC {found:.2f})", "nearest prototype")
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(name)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
