"""Draw docs/pictures/grokking.png: addition modulo 31 with OrthoGrad and with StableMax.

python docs/pictures/grokking.py, under a minute; needs the extra ``bench``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers.optim import OrthoGrad, stablemax_cross_entropy

mpl.use("Agg")
import matplotlib.pyplot as plt

P, STEPS, EVERY = 31, 3000, 25
CASES = (
    ("softmax", F.cross_entropy, False, "#4f6d7a"),
    ("softmax, OrthoGrad", F.cross_entropy, True, "#b3446c"),
    ("StableMax", partial(stablemax_cross_entropy, dtype=None), False, "#c0842b"),
)


def main() -> None:
    """Train the three on 80 % of all sums; draw accuracy on the others, and lost sums."""
    torch.set_num_threads(1)  # the same sums everywhere, hence the same picture
    a, b = torch.meshgrid(torch.arange(P), torch.arange(P), indexing="ij")
    y = ((a + b) % P).flatten()
    x = torch.cat([F.one_hot(a.flatten(), P), F.one_hot(b.flatten(), P)], 1).float()
    seen, unseen = torch.randperm(P * P, generator=torch.Generator().manual_seed(0)).split(768)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharex=True)
    for name, loss_of, projected, colour in CASES:
        rows = train((x[seen], y[seen]), (x[unseen], y[unseen]), loss_of, projected)
        steps, fitted, accuracies, lost = zip(*rows, strict=True)
        print(f"{name}: unseen {accuracies[-1]:.1%}, without loss {lost[-1]:.1%}")
        left.plot(steps, accuracies, color=colour, label=name)
        left.plot(steps, fitted, color=colour, linewidth=0.8, linestyle=":")
        right.plot(steps, lost, color=colour)
    left.set(title="unseen sums mod 31 (dotted: seen)", xlabel="step", ylabel="accuracy")
    left.legend(frameon=False)
    right.set(title="training sums whose loss is exactly 0", xlabel="step")
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


def train(
    seen: tuple[Tensor, Tensor],
    unseen: tuple[Tensor, Tensor],
    loss_of: Callable[..., Tensor],
    projected: bool,
) -> list[tuple[int, float, float, float]]:
    """Return rows of step, accuracy on seen and unseen sums, share of seen sums without loss."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(2 * P, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, P)
    )
    groups = [{"params": list(net.parameters()), "orthogonalize": projected}]
    options = {"eps": 1e-25, "betas": (0.9, 0.98), "weight_decay": 0.0}
    optimizer = OrthoGrad(groups, torch.optim.AdamW, lr=1e-2, base_options=options)
    rows = []
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        z = net(seen[0])
        loss_of(z, seen[1]).backward()
        optimizer.step()
        if step % EVERY == 0:
            with torch.no_grad():
                accuracy = (net(unseen[0]).argmax(1) == unseen[1]).float().mean().item()
                fitted = (z.argmax(1) == seen[1]).float().mean().item()
                losses = loss_of(z, seen[1], reduction="none")
                lost = (losses == 0).float().mean().item()
            rows.append((step, fitted, accuracy, lost))
    return rows


if __name__ == "__main__":
    main()
