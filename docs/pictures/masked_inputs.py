"""Draw docs/pictures/masked_inputs.png: masked inputs on little text, a learned noise mask.

python docs/pictures/masked_inputs.py, some thirty seconds; needs the extra ``bench``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers.dropout import BetaNoisePolicy, masked_input_loss, noise_mask_step

mpl.use("Agg")
import matplotlib.pyplot as plt

SYMBOLS, CONTEXT = 12, 8


def main() -> None:
    """Draw both panels and print their figures."""
    torch.set_num_threads(1)  # the same sums everywhere, hence the same picture
    figure = plt.figure(figsize=(12, 4))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    draw_losses(left.subplots())
    draw_masks(right.subplots(4, 6))
    left.subplots_adjust(bottom=0.13)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


class CausalMLP(nn.Module):
    """Predicts the next symbol from the last eight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS + 1, 16)
        self.mlp = nn.Sequential(nn.Linear(CONTEXT * 16, 128), nn.ReLU(), nn.Linear(128, SYMBOLS))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``[B, T, SYMBOLS]``."""
        past = F.pad(self.embedding(tokens), (0, 0, CONTEXT - 1, 0))
        return self.mlp(past.unfold(1, CONTEXT, 1).flatten(2))


def draw_losses(axis: plt.Axes) -> None:
    """Train on 1500 symbols of an order-2 Markov source, with and without masked inputs."""
    torch.manual_seed(0)
    law = torch.distributions.Dirichlet(torch.full((SYMBOLS,), 0.3)).sample((SYMBOLS, SYMBOLS))
    steps = law.cumsum(-1)
    symbols = [0, 1]
    for u in torch.rand(4500).tolist():
        symbols.append(min(int((steps[symbols[-2], symbols[-1]] < u).sum()), SYMBOLS - 1))
    tokens, held_out = torch.tensor(symbols[:1501]), torch.tensor(symbols[1501:])
    inputs, targets = tokens[:-1].view(30, 50), tokens[1:].view(30, 50)
    for weight, name in ((0.0, "next token alone"), (0.4, "masked inputs, c = 0.4")):
        torch.manual_seed(1)
        model = CausalMLP()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for step in range(600):
            rows = torch.randint(30, (8,))
            optimizer.zero_grad()
            masked_input_loss(model, inputs[rows], targets[rows], SYMBOLS, weight=weight, prefix=0)[
                0
            ].backward()
            optimizer.step()
            if step % 10 == 9:
                with torch.no_grad():
                    logits = model(held_out[None, :-1])[0]
                losses.append(F.cross_entropy(logits, held_out[1:]).item())
        print(f"{name}: best {min(losses):.2f}, last {losses[-1]:.2f}")
        axis.plot(range(10, 601, 10), losses, label=name)
    axis.axhline(torch.tensor(SYMBOLS).log(), color="black", linewidth=0.8, linestyle=":")
    axis.text(600, 2.52, "uniform guess", ha="right", va="bottom", fontsize=8)
    axis.set_xlabel("step")
    axis.set_title("cross-entropy on held-out text", fontsize=10)
    axis.legend(fontsize=8)


def draw_masks(axes: list[list[plt.Axes]]) -> None:
    """Train a classifier of digits under a learned noise mask; show what the policy learned."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    x, y = F.interpolate(x, (32, 32), mode="bilinear"), torch.tensor(digits.target)
    torch.manual_seed(0)
    policy = BetaNoisePolicy(1, mask_size=4)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(
        [{"params": classifier.parameters(), "lr": 1e-3}, {"params": policy.parameters()}], lr=1e-3
    )
    means, checkpoints = [], (100, 300, 600)
    for step in range(1, checkpoints[-1] + 1):
        rows = torch.randint(1500, (128,))
        optimizer.zero_grad()
        classifier_loss, policy_loss, _ = noise_mask_step(classifier, policy, x[rows], y[rows])
        (classifier_loss + policy_loss).backward()
        optimizer.step()
        if step in checkpoints:
            with torch.no_grad():
                means.append(policy(x[:6]).mean)
            print(f"mean mask after {step} steps: {means[-1].mean().item():.2f}")
    lines = {"image": x[:6]}
    for step, mean in zip(checkpoints, means, strict=True):
        lines[f"mean mask,\n{step} steps"] = mean
    for line, (name, pictures) in zip(axes, lines.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture[0], cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)


if __name__ == "__main__":
    main()
