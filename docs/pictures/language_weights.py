"""Draw docs/pictures/language_weights.png: weights of a small language model under three decays.

python docs/pictures/language_weights.py, under a minute; needs the extra ``bench``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers.optim import AdamHD

mpl.use("Agg")
import matplotlib.pyplot as plt

# Strength and threshold. L1 is the limit of a small threshold under a strong decay, L2 that of an
# infinite one; all take the same from a weight of 0.05.
DECAYS = {
    "L2": (2.0, float("inf"), "#4f6d7a"),
    "L1": (1e4, 1e-5, "#c0842b"),
    "Huber": (2.0, 0.05, "#b3446c"),
}
TEXTS = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
STEPS, BATCH, LENGTH, WIDTH = 400, 16, 48, 96


class Reader(nn.Module):
    """A recurrent network that tells the next character."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 32)
        self.memory = nn.GRU(32, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, characters)

    def forward(self, text: Tensor) -> Tensor:
        """Return the loss of ``text``, int64 [batch, length]."""
        seen, _ = self.memory(self.embedding(text[:, :-1]))
        return F.cross_entropy(self.head(seen).flatten(0, 1), text[:, 1:].flatten())


def main() -> None:
    """Train under each decay; draw the weights and what they reach on text held out."""
    torch.set_num_threads(1)  # the same sums everywhere, hence the same picture
    text, characters = descriptions()
    cut = int(0.9 * len(text))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    bins = torch.linspace(0, 1, 51)
    for name, (strength, delta, colour) in DECAYS.items():
        model, curve = train(text[:cut], text[cut:], characters, strength, delta)
        weights = torch.cat([p.detach().flatten() for p in model.memory.parameters()]).abs()
        small = (weights < 1e-3).float().mean()
        print(
            f"{name}: loss {curve[-1][1]:.3f}, largest {weights.max():.2f}, "
            f"below 0.001: {small:.1%}"
        )
        left.stairs(torch.histc(weights, 50, 0, 1) + 1, bins, color=colour, label=name)
        right.plot(*zip(*curve, strict=True), color=colour, label=f"{name}: {curve[-1][1]:.2f}")
    left.set_yscale("log")
    left.set(title="|weights| of the recurrent layer", xlabel="|weight|")
    left.legend(frameon=False)
    right.set(title="loss on text held out, nats a character", xlabel="step")
    right.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


def descriptions() -> tuple[Tensor, int]:
    """Return the texts that come with scikit-learn's data sets, as numbers, and how many differ."""
    text = "\n".join(getattr(datasets, f"load_{name}")().DESCR for name in TEXTS)
    alphabet = sorted(set(text))
    place = {character: i for i, character in enumerate(alphabet)}
    return torch.tensor([place[character] for character in text]), len(alphabet)


def train(
    text: Tensor, held_out: Tensor, characters: int, strength: float, delta: float
) -> tuple[Reader, list[tuple[int, float]]]:
    """Return the trained model, and its loss on the text held out every 25 steps."""
    torch.manual_seed(0)
    model = Reader(characters)
    optimizer = AdamHD(model.parameters(), lr=5e-3, weight_decay=strength, delta=delta)
    rows = held_out[: len(held_out) // LENGTH * LENGTH].view(-1, LENGTH)
    curve = []
    for step in range(1, STEPS + 1):
        begin = torch.randint(len(text) - LENGTH, (BATCH, 1))
        optimizer.zero_grad()
        model(text[begin + torch.arange(LENGTH)]).backward()
        optimizer.step()
        if step % 25 == 0:
            with torch.no_grad():
                curve.append((step, model(rows).item()))
    return model, curve


if __name__ == "__main__":
    main()
