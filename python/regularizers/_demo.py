"""The demo: a network on real images, its head regularized in four ways.

The verdict is put together from the measured figures; no claim is written down here.
"""

from __future__ import annotations

import importlib.util
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers.dropout import MultiSampleDropoutCrossEntropy

if TYPE_CHECKING:
    from rich.table import Table

Array = NDArray[np.float64]


def run(output: Path, setting: Setting | None = None) -> int:
    """Train, compare, save curves to ``output``, run the quick bench; return the exit status."""
    missing = [n for n in ("matplotlib", "rich", "sklearn") if importlib.util.find_spec(n) is None]
    if missing:
        print(
            f"demo: {', '.join(missing)} missing: pip install 'regularizers[bench]'",
            file=sys.stderr,
        )
        return 1
    from rich.console import Console
    from rich.progress import Progress

    from regularizers import _bench

    output.mkdir(parents=True, exist_ok=True)
    setting, console = setting or Setting(), Console(highlight=False)
    console.print(_INTRODUCTION.format(s=setting, held_out=1797 - setting.train_images))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # batches this small gain little from more; busy cores would hurt
    train(replace(setting, seeds=1, epochs=1))  # first calls allocate
    with Progress(console=console) as progress:
        bar = progress.add_task("training", total=setting.seeds * setting.epochs)
        curves = train(setting, on_epoch=lambda: progress.advance(bar))
    torch.set_num_threads(threads)
    figures = {way: summarise(found, setting.target) for way, found in curves.items()}
    console.print(_table(figures), *verdict(figures), sep="\n\n")
    save_curves(curves, setting.target, path := output / "learning-curves.png")
    console.print(f"\nLearning curves in {path}\n", soft_wrap=True)
    return _bench.run("dropout", device="cpu", quick=True, output=output)


@dataclass(frozen=True)
class Setting:
    """What is trained, and how; all ways share everything here."""

    seeds: int = 6
    epochs: int = 25
    train_images: int = 400  # of 1797: few enough that the network overfits
    batch: int = 50
    hidden: int = 512
    p: float = 0.5
    num_samples: int = 8
    lr: float = 1e-3
    target: float = 0.05  # of the training loss, looked at after every epoch


class Network(nn.Module):
    """An MLP that every way starts from and trains, with what their losses need."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        hidden, p, num_samples = setting.hidden, setting.p, setting.num_samples
        first, second = nn.Linear(64, hidden), nn.Linear(hidden, hidden)
        self.body = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        self.head = MultiSampleDropoutCrossEntropy(hidden, 10, p, num_samples)
        self.dropouts = nn.ModuleList(nn.Dropout(p) for _ in range(num_samples))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits without dropout."""
        return self.head.logits(self.body(x))


def _by_hand(net: Network, x: Tensor, y: Tensor) -> Tensor:
    features = net.body(x)
    losses = [F.cross_entropy(net.head.logits(drop(features)), y) for drop in net.dropouts]
    return torch.stack(losses).mean()


NONE, ONE, FUSED, HAND = "no dropout", "dropout", "multi-sample fused", "multi-sample by hand"
LOSSES: dict[str, Callable[[Network, Tensor, Tensor], Tensor]] = {
    NONE: lambda net, x, y: F.cross_entropy(net(x), y),
    ONE: lambda net, x, y: F.cross_entropy(net.head.logits(net.dropouts[0](net.body(x))), y),
    FUSED: lambda net, x, y: net.head(net.body(x), y),
    HAND: _by_hand,
}

_INTRODUCTION = """\
scikit-learn's digits: {s.train_images} images to train on and {held_out} held out, drawn anew for \
each of {s.seeds} seeds. MLP 64-{s.hidden}-{s.hidden}-10, Adam with lr {s.lr:g}, batches of \
{s.batch}, {s.epochs} epochs; dropout before the last layer, p = {s.p:g}; multi-sample: \
{s.num_samples} samples. By hand: {s.num_samples} times nn.Dropout, head and cross-entropy. \
Target: training loss (without dropout) of {s.target:g} after an epoch. Times: training alone, \
on one thread.
"""


@dataclass(frozen=True)
class Curves:
    """What one way recorded after every epoch, ``[seeds, epochs]`` each."""

    steps: Array  # up to this epoch
    seconds: Array  # likewise, of training alone
    train_loss: Array  # without dropout
    test_loss: Array
    accuracy: Array  # on the held-out images, in percent


def train(setting: Setting, *, on_epoch: Callable[[], object] = lambda: None) -> dict[str, Curves]:
    """Train every way from the same initialisation on the same batches, once a seed."""
    runs = [_train_seed(setting, seed, on_epoch) for seed in range(setting.seeds)]
    return {way: Curves(*np.stack([run[way] for run in runs], axis=1)) for way in LOSSES}


def networks(setting: Setting, seed: int) -> dict[str, Network]:
    """Return one network a way, all with the same parameters."""
    torch.manual_seed(seed)
    first = Network(setting)
    return {way: deepcopy(first) for way in LOSSES}


# Returns [5, epochs] a way, in the order of Curves.
def _train_seed(setting: Setting, seed: int, on_epoch: Callable[[], object]) -> dict[str, Array]:
    x, y, test_x, test_y = _digits(setting.train_images, seed)
    nets = networks(setting, seed)
    optimizers = {way: torch.optim.Adam(net.parameters(), setting.lr) for way, net in nets.items()}
    seconds = dict.fromkeys(LOSSES, 0.0)
    rows: dict[str, list[tuple[float, ...]]] = {way: [] for way in LOSSES}
    for epoch in range(setting.epochs):
        # The ways take turns, so that a busy moment of the machine does not hit one of them alone.
        for way, loss in LOSSES.items():
            net, optimizer = nets[way], optimizers[way]
            torch.manual_seed(seed * setting.epochs + epoch)  # the same batches for every way
            batches = torch.randperm(len(x)).split(setting.batch)
            start = time.perf_counter()
            for batch in batches:
                optimizer.zero_grad()
                loss(net, x[batch], y[batch]).backward()
                optimizer.step()
            seconds[way] += time.perf_counter() - start
            steps = (epoch + 1) * len(batches)
            rows[way].append((steps, seconds[way], *_evaluate(net, x, y, test_x, test_y)))
        on_epoch()
    return {way: np.array(found).T for way, found in rows.items()}


@torch.no_grad()
def _evaluate(net: Network, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> list[float]:
    logits = net(test_x)
    accuracy = 100 * (logits.argmax(1) == test_y).double().mean().item()
    return [F.cross_entropy(net(x), y).item(), F.cross_entropy(logits, test_y).item(), accuracy]


def _digits(train_images: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = map(torch.tensor, load_digits(return_X_y=True))
    x = x.float() / 16  # grey levels are 0 to 16
    options = {"train_size": train_images, "stratify": y, "random_state": seed}
    train, test = train_test_split(np.arange(len(y)), **options)
    return x[train], y[train], x[test], y[test]


@dataclass(frozen=True)
class Quantity:
    """One column of the table and one point of every comparison; lower is better unless said."""

    name: str
    text: str  # format of a value
    higher_is_better: bool = False
    spread: str = ""  # format of the standard deviation, if shown
    centre: Callable[[Array], np.floating] = np.mean  # over the seeds; the median ignores hiccups
    ratio: bool = False  # whether the quotient of two values means something to a reader

    def show(self, values: Array, *, with_spread: bool = False) -> str:
        """Return the centre as text, or how many seeds lack a value (infinite)."""
        if missed := np.isinf(values).sum():
            return f"not reached in {missed} of {len(values)}"
        spread = self.spread.format(values.std(ddof=1)) if with_spread else ""
        return self.text.format(self.centre(values)) + spread


ACCURACY = Quantity("test accuracy", "{:.1f}%", higher_is_better=True, spread="±{:.1f}")
TEST_LOSS = Quantity("lowest test loss", "{:.3f}", spread="±{:.3f}")
STEPS = Quantity("steps to the target", "{:.0f}", ratio=True)
SECONDS = Quantity("seconds to the target", "{:.2f} s", centre=np.median, ratio=True)
STEP_TIME = Quantity("time of a step", "{:.2f} ms", centre=np.median, ratio=True)
QUANTITIES = (ACCURACY, TEST_LOSS, STEPS, SECONDS, STEP_TIME)
Figures = Mapping[Quantity, Array]  # one value a seed


def summarise(curves: Curves, target: float) -> dict[Quantity, Array]:
    """Reduce curves to one value a seed for each quantity; a target not reached is infinite."""
    reached = curves.train_loss <= target
    missed, first = ~reached.any(axis=1), (np.arange(len(reached)), reached.argmax(axis=1))
    return {
        ACCURACY: curves.accuracy[:, -1],
        TEST_LOSS: curves.test_loss.min(axis=1),
        STEPS: np.where(missed, np.inf, curves.steps[first]),
        SECONDS: np.where(missed, np.inf, curves.seconds[first]),
        STEP_TIME: 1e3 * np.median(np.diff(curves.seconds, prepend=0), axis=1) / curves.steps[:, 0],
    }


def verdict(figures: Mapping[str, Figures]) -> list[str]:
    """Say in words where the fused way differs from each other way in every single seed."""
    seeds = len(figures[FUSED][ACCURACY])
    return [
        *(_compare(other, figures[FUSED], figures[other]) for other in (NONE, ONE, HAND)),
        f"Better and worse mean: in each of the {seeds} seeds, which chance alone would show in "
        f"one of {2 ** (seeds - 1)} comparisons. Anything less counts as noise.",
    ]


def _compare(other: str, ours: Figures, theirs: Figures) -> str:
    groups: dict[str, list[str]] = {"better in": [], "worse in": [], "within the noise in": []}
    for quantity in QUANTITIES:
        a, b = ours[quantity], theirs[quantity]
        text = f"{quantity.name} ({quantity.show(a)} against {quantity.show(b)}"
        if quantity.ratio and np.isfinite([a, b]).all():
            low, high = sorted((quantity.centre(a), quantity.centre(b)))
            text += f", {high / low:.2f} times"
        if (a > b).all() or (a < b).all():
            good = (a > b).all() == quantity.higher_is_better
            groups["better in" if good else "worse in"].append(text + ")")
        else:
            groups["within the noise in"].append(quantity.name)
    clauses = [f"{group} {', '.join(texts)}" for group, texts in groups.items() if texts]
    return f"Against {other}, {FUSED} is {'; '.join(clauses)}."


def _table(figures: Mapping[str, Figures]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.caption = "over the seeds: mean ± standard deviation, for times the median"
    table.add_column("", no_wrap=True)
    for quantity in QUANTITIES:
        heading = textwrap.fill(quantity.name, 11)
        table.add_column(heading, justify="right", no_wrap=bool(quantity.spread))
    for way, found in figures.items():
        cells = [q.show(found[q], with_spread=True) for q in QUANTITIES]
        table.add_row(way, *cells, style="bold cyan" if way == FUSED else "")
    return table


def save_curves(curves: Mapping[str, Curves], target: float, path: Path) -> None:
    """Draw training loss over steps and over seconds, and test accuracy over steps."""
    from matplotlib.figure import Figure

    colours = {NONE: "0.45", ONE: "#E69F00", FUSED: "#0072B2", HAND: "#D55E00"}  # Okabe and Ito
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for way, found in curves.items():
        steps, seconds = found.steps[0], np.median(found.seconds, axis=0)
        ys = found.train_loss, found.train_loss, found.accuracy
        for axes, x, y in zip(panels, (steps, seconds, steps), ys, strict=True):
            mean, spread, colour = y.mean(axis=0), y.std(axis=0), colours[way]
            dashes = "--" if way == HAND else "-"  # it lies on the fused line
            axes.plot(x, mean, color=colour, linestyle=dashes, label=way)
            axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.13, lw=0)
    for axes in panels[:2]:
        axes.set_title("training loss, without dropout", fontsize=10, loc="left")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.axhline(target, color="0.5", linestyle=":", label="target")
    panels[2].set_title("test accuracy in percent", fontsize=10, loc="left")
    # The first epochs would press the rest into a line.
    panels[2].set_ylim(bottom=np.quantile([found.accuracy for found in curves.values()], 0.1))
    for axes, label in zip(panels, ("steps", "seconds of training", "steps"), strict=True):
        axes.set_xlabel(label)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    band = "mean and standard deviation over the seeds"
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False, title=band)
    figure.savefig(path, dpi=160)
