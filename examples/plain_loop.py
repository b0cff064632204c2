"""A PyTorch loop: CutMix on the images, a multi-sample dropout head, AdamHD with a schedule."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers.dropout import MultiSampleDropout
from regularizers.mixing import CutMix
from regularizers.optim import AdamHD


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training and test images ``[N, 1, 8, 8]`` and their labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return images[train], labels[train], images[test], labels[test]


def main() -> float:
    """Train for 15 epochs; return the accuracy on images that were not seen."""
    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits()
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        MultiSampleDropout(nn.Linear(512, 10), p=0.3, num_samples=4),
    )  # fmt: skip
    mixer = CutMix(alpha=1.0, prob=0.5)
    optimizer = AdamHD(model.parameters(), lr=3e-3)
    epochs, batch = 15, 60
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=epochs * len(images) // batch
    )
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(images)).split(batch):
            mixed = mixer(images[rows], labels[rows])
            logits = model(mixed.x)  # [4, batch, 10]: one set of logits a mask
            target = mixed.soft_target(10)
            loss = F.cross_entropy(logits.flatten(0, 1), target.repeat(4, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(test_images)[0].argmax(1) == test_labels).float().mean().item()
    print(f"test accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    assert main() > 0.95
