"""Draw docs/pictures/weight_priors.png: generalized Gaussians, BackSlash on weights, code lengths.

python docs/pictures/weight_priors.py, some twenty seconds; needs the extra ``bench``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers.optim import (
    BackSlash,
    GeneralizedGaussian,
    deepshape_,
    entropy_bits,
    estimate_shape,
    exp_golomb_bits,
)

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"plain": "#4f6d7a", "BackSlash": "#b3446c", "DeepShape": "#c0842b"}
STEP = 0.02  # of the quantized weights


def main() -> None:
    """Draw the three panels."""
    torch.set_num_threads(1)  # the same sums everywhere, hence the same picture
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    draw_densities(axes[0])
    draw_runs(axes[1], axes[2])
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


def draw_densities(axis: plt.Axes) -> None:
    """Show the law at unit variance."""
    x = torch.linspace(-4, 4, 801)
    for shape, colour in ((0.5, "#b3446c"), (1.0, "#c0842b"), (2.0, "#4f6d7a"), (8.0, "#6a994e")):
        law = GeneralizedGaussian.from_stddev(0.0, 1.0, shape)
        axis.plot(x, law.log_prob(x).exp(), color=colour, label=f"shape {shape:g}")
    axis.set(title="generalized Gaussians of variance 1", xlabel="weight", yscale="log")
    axis.set_ylim(1e-4, 5)
    axis.legend(frameon=False)


def draw_runs(histograms: plt.Axes, lengths: plt.Axes) -> None:
    """Train a classifier of digits with and without BackSlash; reshape the plain one."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    plain, constrained = train(x, y, 0.0), train(x, y, 2000.0)
    reshaped = train(x, y, 0.0)
    for w in matrices(reshaped):
        deepshape_(w, shape=0.5)
    bars: dict[str, list[float]] = {}
    for name, model in (("plain", plain), ("BackSlash", constrained), ("DeepShape", reshaped)):
        w = torch.cat([m.flatten() for m in matrices(model)])
        q = (w / STEP).round().int()
        with torch.no_grad():
            for m in matrices(model):
                m.copy_((m / STEP).round() * STEP)
            accuracy = (model(x[1280:]).argmax(1) == y[1280:]).double().mean().item()
        bits = [entropy_bits(q).item(), exp_golomb_bits(q).double().mean().item()]
        shape = estimate_shape(w)[0].item()
        print(f"{name}: shape {shape:.2f}, accuracy {accuracy:.1%}, bits {bits}")
        counts = torch.histc(w, 121, -0.6, 0.6)
        histograms.stairs(
            counts + 1,
            torch.linspace(-0.6, 0.6, 122),
            color=COLOURS[name],
            label=f"{name}: shape {shape:.2f}",
        )
        bars[f"{name}\n{accuracy:.1%}"] = bits
    histograms.set(title="weights of a digit classifier", xlabel="weight", yscale="log")
    histograms.legend(frameon=False, fontsize=8)
    at = torch.arange(len(bars)).double()
    for i, (label, colour) in enumerate((("entropy", "#4f6d7a"), ("Exp-Golomb code", "#c0842b"))):
        heights = [bits[i] for bits in bars.values()]
        lengths.bar(at + 0.36 * i - 0.18, heights, 0.34, color=colour, label=label)
    lengths.set_xticks(at.tolist(), list(bars))
    lengths.set(title=f"bits a weight at step {STEP}, and accuracy", ylabel="bits")
    lengths.legend(frameon=False, fontsize=8)


def matrices(model: nn.Sequential) -> list[Tensor]:
    """Return the weights without the biases."""
    return [p.detach() for p in model.parameters() if p.dim() == 2]


def train(x: Tensor, y: Tensor, strength: float) -> nn.Sequential:
    """Train 30 epochs with BackSlash, then 10 without."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    weights = [p for p in model.parameters() if p.dim() == 2]
    decay = BackSlash(weights, strength=strength, shape=1.0)
    for epoch in range(40):
        for batch in torch.randperm(1280).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            if epoch < 30:
                decay.step(3e-3)
    return model


if __name__ == "__main__":
    main()
