"""Draw docs/pictures/nested_dropout.png: laws of the kept length, and accuracy of every prefix.

python docs/pictures/nested_dropout.py, some twenty seconds; needs the extra ``bench``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers.dropout import (
    NestedDropout,
    PrefixDistribution,
    expected_prefix_cross_entropy,
    prefix_accuracy,
    select_prefix,
)

mpl.use("Agg")
import matplotlib.pyplot as plt

WIDTH, NOISE, EPOCHS = 256, 0.4, 40


def main() -> None:
    """Draw both parts of the picture and print the figures of the second."""
    torch.set_num_threads(1)  # the same sums everywhere, hence the same picture
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    draw_laws(left)
    draw_accuracies(right)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


def draw_laws(axis: plt.Axes) -> None:
    """Show how often each of 64 features is kept."""
    laws = {
        "gaussian, std 10": PrefixDistribution.gaussian(64, std=10.0),
        "gaussian, std 40": PrefixDistribution.gaussian(64, std=40.0),
        "geometric, q 0.9": PrefixDistribution.geometric(64, 0.9),
        "uniform": PrefixDistribution.uniform(1, 64),
        "padded by 56, from 8": PrefixDistribution.padded_uniform(64, 56, 8),
    }
    for name, law in laws.items():
        mean = law.mean().item()
        axis.plot(range(1, 65), law.keep_probability(), label=f"{name}: E[k] = {mean:.1f}")
    axis.set(xlabel="feature", ylabel="probability that it is kept", ylim=(0, 1.02))
    axis.legend(fontsize=8)
    axis.set_title("laws of the kept length, 64 features", fontsize=10)


def draw_accuracies(axis: plt.Axes) -> None:
    """Train on digits with wrong labels; show the accuracy of every prefix on clean images."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    x, y = x[order], y[order]
    shift = torch.randint(1, 10, (800,), generator=generator)
    wrong = torch.rand(800, generator=generator) < NOISE
    noisy = torch.where(wrong, (y[:800] + shift) % 10, y[:800])
    for name in ("cross-entropy", "dropout 0.5", "nested dropout", "expected loss"):
        body, head = train(name, x[:800], noisy)
        with torch.no_grad():
            arguments = head.weight, head.bias
            found = prefix_accuracy(body(x[800:1100]), *arguments, y[800:1100])
            accuracy = prefix_accuracy(body(x[1100:]), *arguments, y[1100:]) / len(x[1100:])
        k, _ = select_prefix(found, 300)
        print(f"| {name} | {accuracy[-1]:.3f} | {k} | {accuracy[k - 1]:.3f} |")
        (line,) = axis.plot(range(1, WIDTH + 1), accuracy, label=name)
        axis.plot(k, accuracy[k - 1], "o", color=line.get_color())
    axis.set(xlabel="features kept", ylabel="accuracy on clean test images", xscale="log")
    axis.legend(fontsize=8)
    axis.set_title(f"digits, {NOISE:.0%} of the training labels wrong; dots: chosen k", fontsize=10)


def train(name: str, x: Tensor, y: Tensor) -> tuple[nn.Module, nn.Linear]:
    """Train a small network with one of the four regularizers; return its body and head."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
    head = nn.Linear(WIDTH, 10)
    nested = NestedDropout(WIDTH, std=5.0)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            features = body(x[rows])
            if name == "expected loss":
                law = nested.distribution.probs
                loss = expected_prefix_cross_entropy(features, head.weight, head.bias, y[rows], law)
            else:
                if name == "nested dropout":
                    features = nested(features)
                elif name == "dropout 0.5":
                    features = F.dropout(features, 0.5)
                loss = F.cross_entropy(head(features), y[rows])
            loss.backward()
            optimizer.step()
    return body, head


if __name__ == "__main__":
    main()
