"""Draw docs/pictures/adversary_mass.png: the mass on one hard attack, and what it buys.

12 bits in 24 numbers, 15 mild linear attacks and one hard one, noise on top: the end-to-end test of
tests/mixing/test_compositional_adversary.py, drawn.
"""

from pathlib import Path

import matplotlib as mpl
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.mixing import CompositionalAdversary, TransformFamily, bit_accuracy, cat_step

mpl.use("Agg")
import matplotlib.pyplot as plt

STEPS, EVERY = 400, 20


class Blind(nn.Module):
    """An encoder that sees nothing."""

    def forward(self, x):
        """Return zeros [B, 4]."""
        return x.new_zeros(len(x), 4)


def main() -> None:
    """Draw the picture."""
    torch.set_num_threads(1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for weight in (None, 0.3, 0.1, 0.02):
        label = "random" if weight is None else f"entropy weight {weight}"
        mass, worst = train(weight)
        left.plot(range(EVERY, STEPS + 1, EVERY), mass, label=label)
        right.plot(range(EVERY, STEPS + 1, EVERY), worst, label=label)
    left.set(title="mass on the hard attack", xlabel="step")
    right.set(title="bit accuracy under the worst attack", xlabel="step")
    right.legend()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


def train(weight: float | None) -> tuple[list[float], list[float]]:
    """Train with one entropy weight, or against random attacks; both curves."""
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.eye(24) + 0.03 * torch.randn(24, 24, generator=generator) for _ in range(15)]
    matrices.append(-torch.linalg.qr(torch.randn(24, 24, generator=generator))[0].T)
    families = [
        TransformFamily(
            str(k),
            lambda x, s, g, m=m: x @ m + 0.4 * torch.randn(x.shape, generator=g),
            (0.0, 0.0),
            random=True,
        )
        for k, m in enumerate(matrices)
    ]
    torch.manual_seed(0)
    embedder = nn.Linear(12, 24)
    extractor = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 12))
    adversary = CompositionalAdversary(families, num_steps=1, encoder=Blind(), hidden=4)
    parameters = [*embedder.parameters(), *extractor.parameters()]
    if weight is not None:
        parameters.append(adversary.head.bias)  # a table of logits is the policy
    optimizer = torch.optim.Adam(parameters, 3e-3)
    mass, worst = [], []
    for step in range(1, STEPS + 1):
        bits = torch.randint(2, (128, 12), generator=generator).float()

        def recover(x, bits=bits):
            return F.binary_cross_entropy_with_logits(extractor(x), bits)

        marked = torch.tanh(embedder(2 * bits - 1))
        optimizer.zero_grad()
        cat_step(
            adversary, marked, recover, entropy_weight=weight or 0.0, generator=generator
        ).loss.backward()
        optimizer.step()
        if step % EVERY == 0:
            with torch.no_grad():
                bits = torch.randint(2, (2000, 12), generator=generator).float()
                marked = torch.tanh(embedder(2 * bits - 1))
                accuracy = [bit_accuracy(extractor(f(marked)), bits).mean() for f in families]
                mass.append(adversary.head.bias.softmax(0)[-1].item())
                worst.append(min(accuracy).item())
    return mass, worst


if __name__ == "__main__":
    main()
