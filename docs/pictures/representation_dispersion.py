"""Draw representation_dispersion.png: what keeps features apart, and what draws them together.

``python docs/pictures/representation_dispersion.py`` takes half a minute on one core and gives the
same picture every time.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers.generative import flow_matching_loss, meanflow_loss, meanflow_sample
from regularizers.representation import (
    ECAML,
    DispersiveRegularizer,
    GroupWhiteningColoring,
    MSBReg,
    byol_momentum,
    ema_update_,
    group_covariance,
    whitening_loss,
)

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#999999")


def digits() -> tuple[Tensor, Tensor]:
    """Return 1797 images [n, 64] in [0, 1] and their classes."""
    data = load_digits()
    return torch.tensor(data.data).float() / 16, torch.tensor(data.target)


def dispersed(weight: float) -> tuple[Tensor, float]:
    """Return hidden features of a regression of noise from nearly equal inputs, and its error."""
    generator = torch.Generator().manual_seed(0)
    x = 1 + 0.1 * torch.randn(128, 8, generator=generator)
    target = torch.randn(128, 2, generator=generator)
    torch.manual_seed(0)
    layers = [nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2), nn.Tanh(), nn.Linear(2, 32)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(32, 2))
    regularized = DispersiveRegularizer(model, ["3"], weight=weight, temperature=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        y, penalty = regularized(x)
        optimizer.zero_grad()
        (F.mse_loss(y, target) + penalty).backward()
        optimizer.step()
    with torch.no_grad():
        return model[:4](x), F.mse_loss(model(x), target).item()


def spectrum(regularizer: MSBReg, lagged: bool) -> Tensor:
    """Return normalised squared singular values of embeddings after training on views."""
    images, _ = digits()
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    target = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    steps = 300
    for step in range(steps):
        rows = torch.randint(len(images), (128, 1), generator=generator)
        x = images[rows] + 0.2 * torch.randn(128, 4, 64, generator=generator)
        loss = regularizer(model(x), target(x), generator=generator).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema_update_(target, model, byol_momentum(step, steps) if lagged else 0.0)
    with torch.no_grad():
        p = torch.linalg.svdvals(F.normalize(model(images))).square()
    return p / p.sum()


def confused(weight: float) -> tuple[Tensor, Tensor]:
    """Return embeddings [n, 2] of digits that a contrastive loss trained, and their classes."""
    images, labels = digits()

    def contrastive(x: Tensor, y: Tensor) -> Tensor:
        x = F.normalize(x)
        squares = 2 - 2 * x @ x.T
        same = y[:, None] == y
        return squares[same].mean() + (1 - squares[~same]).relu().mean()

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loss = ECAML(contrastive, weight=weight)
    for _ in range(300):
        rows = torch.randint(len(images), (128,), generator=generator)
        optimizer.zero_grad()
        loss(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        z = F.normalize(model(images))
    longitude = torch.atan2(z[:, 1], z[:, 0])
    return torch.stack([longitude, z[:, 2]], 1), labels


def whitened(weight: float) -> Tensor:
    """Return the covariance [16, 16] of what an encoder emits under the penalty."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(16, 16, generator=generator)
    torch.manual_seed(0)
    encoder, decoder = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
    layer = GroupWhiteningColoring(16, groups=4, style_dim=4, mlp_dim=8, alpha_init=0.0)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-2)
    for _ in range(300):
        x = torch.einsum("dc,bchw->bdhw", mixing, torch.randn(8, 16, 4, 4, generator=generator))
        found = layer(encoder(x), torch.zeros(8, 4))
        error = (decoder(found.out) - x).square().mean() / x.square().mean()
        optimizer.zero_grad()
        (error + weight * whitening_loss(found.covariance)).backward()
        optimizer.step()
    with torch.no_grad():
        return group_covariance(encoder(x), groups=1)[0]


def one_step(average: bool) -> Tensor:
    """Return 4000 samples in one step of a model of two narrow modes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def field(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return net(torch.cat([z, r[:, None] if average else t[:, None], t[:, None]], 1))

    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        sign = torch.randint(2, (256, 1), generator=generator) * 2.0 - 1
        data = 2 * sign + 0.2 * torch.randn(256, 1, generator=generator)
        if average:
            loss = meanflow_loss(field, data, generator=generator)
        else:
            loss = flow_matching_loss(lambda x, t: field(x, t, t), data, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return meanflow_sample(field, (4000, 1), generator=generator)[:, 0]


def main() -> None:
    """Train everything and draw."""
    torch.set_num_threads(1)
    figure = Figure(figsize=(13, 7), layout="constrained")
    (near, spread, curve, histogram), (left, right, before, after) = figure.subplots(2, 4)

    for axes, weight in ((near, 0.0), (spread, 0.5)):
        h, error = dispersed(weight)
        axes.scatter(*h.T, color=COLOURS[1], s=10)
        title = "hidden features" if weight == 0 else f"dispersive loss {weight} (168)"
        axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), title=title, xlabel=f"error {error:.2f}")

    runs = {
        "centroid alone": (MSBReg(lambda_brownian=0.0, lambda_singular=0.0), False),
        "with singular values": (MSBReg(lambda_brownian=0.0), False),
        "MSBReg, lagged target": (MSBReg(), True),
    }
    for (name, (regularizer, lagged)), colour in zip(runs.items(), COLOURS, strict=False):
        p = spectrum(regularizer, lagged)
        rank = (-(p * p.clamp_min(1e-30).log()).sum()).exp()
        curve.plot(range(1, 17), p, color=colour, label=f"{name}: rank {rank:.1f}", linewidth=2)
    curve.set(yscale="log", ylim=(1e-9, 2), xlabel="index", title="spectrum of embeddings (134)")
    curve.legend(frameon=False, fontsize=8, loc="lower left")

    bins = torch.linspace(-4, 4, 81).numpy()
    for average, colour in ((False, COLOURS[0]), (True, COLOURS[1])):
        label = "MeanFlow" if average else "flow matching"
        histogram.hist(one_step(average), bins=bins, color=colour, alpha=0.7, label=label)
    histogram.set(ylim=(0, 1250), title="one step; data at -2 and 2 (168)")
    histogram.legend(frameon=False, fontsize=8)

    for axes, weight in ((left, 0.0), (right, 0.1)):
        z, label = confused(weight)
        axes.scatter(*z.T, c=label, cmap="tab10", s=3)
        title = "contrastive loss" if weight == 0 else f"and energy confusion {weight} (145)"
        axes.set(xlim=(-3.2, 3.2), ylim=(-1.05, 1.05), title=title)
        axes.set(xlabel="longitude on the sphere", ylabel="height")
    for axes, weight in ((before, 0.0), (after, 1.0)):
        matrix = whitened(weight)
        image = axes.imshow(matrix, vmin=-2, vmax=2, cmap="RdBu")
        title = "covariance, no penalty" if weight == 0 else "whitening by groups of 4 (94)"
        axes.set(title=title, xticks=[], yticks=[])
    figure.colorbar(image, ax=[before, after], shrink=0.6)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
