"""Draw docs/pictures/grokking.png: addition modulo 31 with and without OrthoGrad and StableMax.

python docs/pictures/grokking.py, some thirty seconds; needs the extra ``bench``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.optim import OrthoGrad, stablemax_cross_entropy

mpl.use("Agg")
import matplotlib.pyplot as plt

P, STEPS = 31, 900
CASES = (
    ("softmax", F.cross_entropy, False, "#4f6d7a"),
    ("softmax, OrthoGrad", F.cross_entropy, True, "#b3446c"),
    ("StableMax", stablemax_cross_entropy, False, "#c0842b"),
)


def main() -> None:
    """Train the three on 60 % of all sums and draw accuracy on the others."""
    torch.set_num_threads(1)  # the same sums everywhere, hence the same picture
    a, b = torch.meshgrid(torch.arange(P), torch.arange(P), indexing="ij")
    y = ((a + b) % P).flatten()
    x = torch.cat([F.one_hot(a.flatten(), P), F.one_hot(b.flatten(), P)], 1).float()
    order = torch.randperm(P * P, generator=torch.Generator().manual_seed(0))
    seen, unseen = order[:576], order[576:]
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for name, loss_of, projected, colour in CASES:
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(2 * P, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, P)
        )
        for parameter in net.parameters():
            parameter.data *= 2  # OrthoGrad keeps the norms it is given
        groups = [{"params": list(net.parameters()), "orthogonalize": projected}]
        options = {"eps": 1e-25, "weight_decay": 0.0}
        optimizer = OrthoGrad(groups, torch.optim.AdamW, lr=1e-3, base_options=options)
        steps, accuracies, fitted = [], [], []
        for t in range(STEPS):
            optimizer.zero_grad()
            z = net(x[seen])
            loss_of(z, y[seen]).backward()
            optimizer.step()
            if t % 20 == 19:
                with torch.no_grad():
                    right = net(x[unseen]).argmax(1) == y[unseen]
                steps.append(t + 1)
                accuracies.append(right.float().mean().item())
                fitted.append((z.argmax(1) == y[seen]).float().mean().item())
        axis.plot(steps, accuracies, color=colour, label=name)
        axis.plot(steps, fitted, color=colour, linewidth=0.8, linestyle=":")
    axis.set(title="addition mod 31: unseen sums (dotted: seen)", xlabel="step", ylabel="accuracy")
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
