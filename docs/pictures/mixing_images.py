"""Draw CutMix and MixUp on photographs that scikit-learn ships, with the weights of their labels.

Run: python docs/pictures/mixing_images.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

from regularizers.mixing import cutmix, random_box
from regularizers.ops import mix, paste_boxes

mpl.use("Agg")
import matplotlib.pyplot as plt

NAMES = ("temple", "flower")


def main() -> None:
    """Draw the two photographs, boxes that are cut off or not, and blends."""
    images = load_images()
    swap = torch.tensor([1, 0])
    pictures = [(image, name) for image, name in zip(images, NAMES, strict=True)]
    for centre in ((210, 320), (60, 560)):
        pictures.append(pasted(images, swap, 0.75, centre))
    generator = torch.Generator().manual_seed(3)
    for row in range(2):
        batch = cutmix(images, torch.arange(2), per_sample=True, perm=swap, generator=generator)
        pictures.append((batch.x[row], label(row, batch.lam[row].item())))
    floating = images.float()
    for weight in (0.75, 0.5):
        pictures.append((mix(floating, swap, weight)[0].byte(), f"MixUp: {label(0, weight)}"))
    figure, axes = plt.subplots(2, 4, figsize=(12, 4.6))
    for axis, (image, title) in zip(axes.flat, pictures, strict=True):
        axis.imshow(image.permute(1, 2, 0))
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=80, metadata={"Software": None})


def load_images() -> Tensor:
    """Return both photographs as uint8 [2, 3, 427, 640]."""
    images = load_sample_images().images
    return torch.stack([torch.tensor(image).permute(2, 0, 1) for image in images])


def label(row: int, weight: float) -> str:
    """Name both labels with their weights."""
    return f"{weight:.3f} {NAMES[row]} + {1 - weight:.3f} {NAMES[1 - row]}"


def pasted(
    images: Tensor, partners: Tensor, lam: float, centre: tuple[int, int]
) -> tuple[Tensor, str]:
    """Paste a box at a place; the title tells what was drawn and what the label weighs."""
    size = tuple(images.shape[2:])
    box = random_box(size, lam, centre=torch.tensor(centre))
    weight = 1 - (box[:, 1] - box[:, 0]).prod().item() / (size[0] * size[1])
    return paste_boxes(images, partners, box)[0], f"drawn {lam}: {label(0, weight)}"


if __name__ == "__main__":
    main()
