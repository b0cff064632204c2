"""Draw docs/pictures/attack_suite.png: the default attacks, each at its strong end."""

from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_sample_images
from torch.nn import functional as F

from regularizers.mixing import default_families

mpl.use("Agg")
import matplotlib.pyplot as plt

# Families whose attack is strong where the number is small.
FALLING = ("brightness", "contrast", "saturation", "resize", "crop", "jpeg")


def main() -> None:
    """Draw the picture."""
    torch.set_num_threads(1)
    photograph = torch.tensor(load_sample_images().images[0]).permute(2, 0, 1)[None] / 255
    image = F.interpolate(photograph, (160, 240), mode="area")
    generator = torch.Generator().manual_seed(4)
    figure, axes = plt.subplots(3, 4, figsize=(12, 6.6), layout="constrained")
    for axis, family in zip(axes.flat, default_families(), strict=True):
        strength = family.strength(torch.tensor([0.0 if family.name in FALLING else 1.0]))
        attacked = family(image, strength, generator=generator)
        axis.imshow(attacked[0].clamp(0, 1).permute(1, 2, 0))
        fixed = family.low == family.high
        axis.set_title(family.name if fixed else f"{family.name}, {strength.item():.2g}")
        axis.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main()
