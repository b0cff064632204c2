"""Draw docs/pictures/adawac_weights.png: weights of label-dense and label-sparse samples.

A small network segments scikit-learn's digits, noise added. Half of the training images show the
digit, the other half one pixel of it, as the outer slices of a scan do; the weights of both halves
over the epochs.
"""

from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from regularizers.mixing import AdaWAC

mpl.use("Agg")
import matplotlib.pyplot as plt

SAMPLES, EPOCHS, BATCH = 256, 40, 32


def main() -> None:
    """Draw the picture."""
    torch.set_num_threads(1)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, weight_lr in zip(axes, (0.5, 8.0), strict=True):
        for name, color, weights in zip(
            ("dense", "sparse"), ("C0", "C1"), train(weight_lr), strict=True
        ):
            middle = weights.median(1).values
            low, high = weights.quantile(0.1, 1), weights.quantile(0.9, 1)
            axis.plot(middle, color=color, label=f"label-{name} samples")
            axis.fill_between(range(len(middle)), low, high, color=color, alpha=0.25)
        axis.set(title=f"weight_lr = {weight_lr:g}", xlabel="epoch", ylim=(0, 1))
    axes[0].set_ylabel("weight of the supervised loss")
    axes[1].legend()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


def train(weight_lr: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights [epochs, samples] of the dense and of the sparse half."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images[:SAMPLES], dtype=torch.float32)[:, None] / 16
    brightest = F.one_hot(images.flatten(1).argmax(1), 64).view_as(images)
    dense = torch.arange(SAMPLES) % 2 == 0
    images = torch.where(dense[:, None, None, None], images, images * brightest)
    labels = (images[:, 0] > 0.5).long()
    encoder = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU())
    decoder = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 1))
    criterion = AdaWAC(SAMPLES, weight_lr=weight_lr, consistency_weight=8.0)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9)
    history = []
    for _ in range(EPOCHS):
        for index in torch.randperm(SAMPLES).split(BATCH):
            features = [encoder(images[index] + 0.3 * torch.randn(BATCH, 1, 8, 8)) for _ in "ab"]
            losses = [
                F.cross_entropy(decoder(f), labels[index], reduction="none").mean((1, 2))
                for f in features
            ]
            optimizer.zero_grad()
            criterion(*losses, *features, index).backward()
            optimizer.step()
        history.append(criterion.weights(torch.arange(SAMPLES))[0])
    weights = torch.stack(history)
    return weights[:, dense], weights[:, ~dense]


if __name__ == "__main__":
    main()
