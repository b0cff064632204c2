"""Draw docs/pictures/potential_flow.png: walks through the codes of handwritten digits.

An autoencoder with four latent features, then three potentials on its codes, trained with the wave
equation, the decoder and a classifier of pairs. ``python docs/pictures/potential_flow.py`` takes
about 15 s on one core and gives the same picture every time.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers.transport import PotentialFlow, traversal_classification_loss

FEATURES, POTENTIALS, STEPS = 4, 3, 12


def main() -> None:
    """Train, walk, draw."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    digits = load_digits()
    pictures = torch.tensor(digits.data / 16, dtype=torch.float32)
    encoder, decoder = autoencoder(pictures)
    with torch.no_grad():
        codes = encoder(pictures)
    flow, lengths = train_flow(codes, decoder)
    _, collapsed = train_flow(codes, None)
    start = torch.stack([codes[digits.target == label][4] for label in (0, 3, 4)])
    with torch.no_grad():
        walks = decoder(torch.stack([flow.traverse(start, k) for k in range(POTENTIALS)]))
    draw(walks, lengths, collapsed)


def autoencoder(pictures: Tensor) -> tuple[nn.Module, nn.Module]:
    """Return encoder and decoder, trained on all pictures; codes have unit variance."""
    encoder = nn.Sequential(
        nn.Linear(64, 96), nn.GELU(), nn.Linear(96, FEATURES), nn.BatchNorm1d(FEATURES)
    )
    decoder = nn.Sequential(
        nn.Linear(FEATURES, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 64)
    )
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
    for _ in range(1500):
        batch = pictures[torch.randint(len(pictures), (128,))]
        optimizer.zero_grad()
        (decoder(encoder(batch)) - batch).square().mean().backward()
        optimizer.step()
    return encoder.eval(), decoder.requires_grad_(False)


def train_flow(codes: Tensor, decoder: nn.Module | None) -> tuple[PotentialFlow, list[float]]:
    """Return potentials and the length of their steps over training.

    Without a decoder they have the equation alone to obey.
    """
    flow = PotentialFlow(FEATURES, POTENTIALS, STEPS)
    classifier = nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, POTENTIALS))
    optimizer = torch.optim.Adam([*flow.parameters(), *classifier.parameters()], lr=5e-3)
    lengths = []
    for step in range(390):
        k = step % POTENTIALS
        batch = codes[torch.randint(len(codes), (32,))]
        output = flow(batch, k, decoder=decoder, jvp_weight=0.0 if decoder is None else 1.0)
        loss = output.total
        if decoder is not None:
            pair = torch.cat((decoder(output.z1), decoder(output.z2)), 1)
            loss = loss + traversal_classification_loss(classifier(pair), k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lengths.append(output.velocity.sqrt().item())
    return flow, lengths


def draw(walks: Tensor, lengths: list[float], collapsed: list[float]) -> None:
    """Draw a strip of pictures for each potential and digit, and the lengths of the steps."""
    figure = plt.figure(figsize=(11, 2.8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[2.3, 1])
    axes = left.subplots(POTENTIALS, 1)
    for k, axis in enumerate(axes):
        framed = F.pad(1 - walks[k].reshape(*walks.shape[1:3], 8, 8), (1, 0, 1, 1), value=0.75)
        strips = [torch.cat(list(framed[:, digit]), 1) for digit in range(walks.shape[2])]
        gap = torch.ones(len(strips[0]), 6)
        axis.imshow(
            torch.cat([piece for strip in strips for piece in (strip, gap)][:-1], 1),
            cmap="gray",
            vmin=0,
            vmax=1,
        )
        axis.set_axis_off()
        axis.set_title(f"potential {k + 1}", fontsize=9, loc="left")
    axis = right.subplots()
    for label, values in (("whole loss", lengths), ("equation alone", collapsed)):
        # The potentials take turns: one point a round.
        rounds = torch.tensor(values).reshape(-1, POTENTIALS).mean(1)
        axis.semilogy(torch.arange(len(rounds)) * POTENTIALS, rounds, label=label)
    axis.set(xlabel="training step", ylabel="length of a step")
    axis.set_title("latent space", fontsize=9, loc="left")
    axis.legend(frameon=False)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
