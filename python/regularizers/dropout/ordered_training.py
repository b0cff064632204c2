"""Training with ordered low-rank layers: factorise a model, sample ranks, shrink it, merge it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from regularizers._shared.checks import check_at_least, check_not_negative
from regularizers._shared.modules import replace_modules
from regularizers.dropout.ordered import (
    OrderedLowRankConv2d,
    OrderedLowRankLayer,
    OrderedLowRankLinear,
)

Ranks = Mapping[str, int | None]


def decompose(model: nn.Module, *, skip_first: int = 0, skip_last: bool = False) -> nn.Module:
    r"""Factorise the linear layers and convolutions of a model, in place.

    .. math:: W = A S B^\top = U V^\top, \qquad U = A S^{1/2}, \quad V = B S^{1/2}

    The model computes what it computed. Make the optimizer afterwards. Some layers stay as they
    are, because factors could not take their place: subclasses of ``nn.Linear`` and ``nn.Conv2d``
    (their ``forward`` may differ), grouped convolutions, padding other than with zeros,
    weights that are tied or parametrized, and ``nn.MultiheadAttention`` as a whole: it packs three
    projections in one matrix and reads the weight of the fourth without calling the layer. Give
    attention whose projections are ``nn.Linear``. Hooks on a replaced layer are lost.

    Args:
        model: any module; it may be replaced itself, so use what is returned.
        skip_first: leave the first so many linear layers and convolutions, in the order of
            registration, as they are.
        skip_last: leave the last one as it is.

    Returns:
        The model.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``skip_first`` is below 0.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> decompose(model, skip_last=True)[0]
        OrderedLowRankLinear(in_features=8, out_features=16, bias=True, rank=8, active_rank=8)

    Source:
        As :class:`OrderedLowRankLinear`; the layers that stay as they are are our choice.
    """
    check_at_least("skip_first", skip_first, 0)
    found: list[nn.Module] = []

    def collect(name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            found.append(module)
        return module if isinstance(module, nn.MultiheadAttention) else None

    def factorise(name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.MultiheadAttention):
            return module  # and do not look inside
        if module not in chosen or not _factorisable(module, uses):
            return None
        if isinstance(module, nn.Linear):
            return OrderedLowRankLinear.from_linear(module)
        return OrderedLowRankConv2d.from_conv2d(module) if isinstance(module, nn.Conv2d) else None

    replace_modules(model, collect)
    chosen = set(found[skip_first : len(found) - skip_last])
    uses = Counter(
        parameter
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return replace_modules(model, factorise)


def _factorisable(layer: nn.Module, uses: Counter[nn.Parameter]) -> bool:
    weight = layer._parameters.get("weight")
    if weight is None or uses[weight] > 1:
        return False
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros"
    return type(layer) is nn.Linear


def ordered_layers(model: nn.Module) -> dict[str, OrderedLowRankLayer]:
    """Return the ordered low-rank layers of a model by qualified name.

    Raises:
        ValueError: there is none.

    Example:
        >>> list(ordered_layers(decompose(nn.Sequential(nn.Linear(8, 16), nn.ReLU()))))
        ['0']
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, OrderedLowRankLayer)
    }
    if not layers:
        raise ValueError("model must have ordered low-rank layers: call decompose first")
    return layers


def group_lasso_penalty(model: nn.Module, *, hierarchical: bool = True) -> Tensor:
    r"""Return the group lasso of all ordered layers.

    .. math:: \sum_{\text{layers}} \sum_b \|V_{:, b:}\|_F + \|U_{:, b:}\|_F

    It pulls the tail of the components to zero; the sampling only puts them in order.

    Args:
        model: a model with ordered layers.
        hierarchical: norms of suffixes; otherwise of single components.

    Returns:
        The sum, with no dimensions; float32 at least.

    Raises:
        ValueError: the model has no ordered layer.

    Example:
        >>> model = decompose(nn.Linear(2, 2, bias=False))
        >>> loss = 5e-3 * group_lasso_penalty(model)

    Source:
        As :class:`OrderedLowRankLinear`. The authors' code gets NaN gradients from a zero factor;
        here they are 0.
    """
    layers = ordered_layers(model).values()
    return torch.stack(
        [layer.group_lasso(hierarchical=hierarchical).sum() for layer in layers]
    ).sum()


def shrink_model(
    model: nn.Module, threshold: float = 1e-5, *, prune: bool = False
) -> dict[str, int]:
    """Shrink every ordered layer to the components whose importance reaches a threshold.

    Call it at the end of an epoch. Batch norms behind a layer that shrank have seen other inputs:
    let a pass over training data in ``train()`` renew their statistics before evaluation.

    Args:
        model: a model with ordered layers.
        threshold: least importance of a component that stays, at least 0.
        prune: cut the parameters as well, rather than stop using their tails; then make a new
            optimizer.

    Returns:
        The ranks that are left, by qualified name.

    Raises:
        ValueError: the model has no ordered layer, ``threshold`` is below 0, a factor is not
            finite, or the call is inside :func:`sampled_ranks`.

    Example:
        >>> model = decompose(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
        >>> shrink_model(model, 0.0)
        {'0': 8, '2': 4}

    Source:
        As :class:`OrderedLowRankLinear`.
    """
    layers = ordered_layers(model)
    return {name: layer.shrink_(threshold, prune=prune) for name, layer in layers.items()}


def merge(model: nn.Module) -> nn.Module:
    """Multiply out the ordered layers whose factors have more numbers than a dense weight.

    Args:
        model: any module; it may be replaced itself, so use what is returned.

    Returns:
        The model, changed in place.

    Raises:
        ValueError: the call is inside :func:`sampled_ranks`.

    Example:
        >>> merge(decompose(nn.Sequential(nn.Linear(8, 8))))  # full rank: 128 numbers for 64
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
        )

    Source:
        As :class:`OrderedLowRankLinear`.
    """
    for module in model.modules():
        if isinstance(module, OrderedLowRankLayer):
            module.check_no_sampler("merge")

    def dense(name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, OrderedLowRankLayer) and not module.is_beneficial():
            if isinstance(module, OrderedLowRankLinear):
                return module.to_linear()
            if isinstance(module, OrderedLowRankConv2d):
                return module.to_conv2d()
        return None

    return replace_modules(model, dense)


class RankSampler(ABC):
    """An endless iterator over ranks: a dict from layer name to rank, or None for full rank.

    Every process of a distributed run must draw the same ranks: give all the same generator state.

    Args:
        model: a model with ordered layers; their active ranks are looked up at every draw.
        generator: CPU generator to draw from; the default generator when omitted.

    Raises:
        ValueError: the model has no ordered layer, or the generator is not on the CPU.

    Example:
        >>> class Halves(RankSampler):
        ...     def draw(self, widths):
        ...         return {name: width // 2 for name, width in widths.items()}
        >>> next(Halves(decompose(nn.Sequential(nn.Linear(8, 8)))))
        {'0': 4}
    """

    def __init__(self, model: nn.Module, *, generator: torch.Generator | None = None) -> None:
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"generator must be on the CPU, got {generator.device}")
        self._layers = ordered_layers(model)
        self.generator = generator

    def __iter__(self) -> Iterator[dict[str, int | None]]:
        return self

    def __next__(self) -> dict[str, int | None]:
        return self.draw({name: layer.active_rank for name, layer in self._layers.items()})

    @abstractmethod
    def draw(self, widths: dict[str, int]) -> dict[str, int | None]:
        """Return ranks for layers of the given active ranks."""

    def _integer(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))


class SingleLayerRankSampler(RankSampler):
    """One layer at a lower rank in each step, the others at full rank; the paper's sampler.

    All pairs of a layer and a rank are shuffled and used up before they are shuffled again. So a
    layer comes up in proportion to its rank. A layer that shrinks begins a new round.

    Args:
        model: a model with ordered layers.
        generator: CPU generator to draw from; the default generator when omitted.

    Raises:
        ValueError: the model has no ordered layer, or the generator is not on the CPU.

    Example:
        >>> model = decompose(nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 3)))
        >>> sampler = SingleLayerRankSampler(model)
        >>> steps = [next(sampler) for _ in range(5)]
        >>> sorted((step["0"] or 0, step["1"] or 0) for step in steps)
        [(0, 1), (0, 2), (0, 3), (1, 0), (2, 0)]

    Source:
        As :class:`OrderedLowRankLinear`.
    """

    def __init__(self, model: nn.Module, *, generator: torch.Generator | None = None) -> None:
        super().__init__(model, generator=generator)
        self._widths: dict[str, int] = {}
        self._round: list[tuple[str, int]] = []

    def draw(self, widths: dict[str, int]) -> dict[str, int | None]:
        """Return the next pair of the round."""
        if not self._round or widths != self._widths:
            pairs = [(name, b) for name, width in widths.items() for b in range(1, width + 1)]
            order = torch.randperm(len(pairs), generator=self.generator)
            self._round = [pairs[i] for i in order.tolist()]
            self._widths = widths
        ranks: dict[str, int | None] = dict.fromkeys(widths)
        if self._round:  # empty only when every layer has rank 0
            name, rank = self._round.pop()
            ranks[name] = rank
        return ranks


class IndependentRankSampler(RankSampler):
    """Every layer at a rank of its own, uniform on 1, ..., its active rank.

    Args:
        model: a model with ordered layers.
        generator: CPU generator to draw from; the default generator when omitted.

    Raises:
        ValueError: the model has no ordered layer, or the generator is not on the CPU.

    Example:
        >>> ranks = next(IndependentRankSampler(decompose(nn.Sequential(nn.Linear(8, 8)))))
        >>> 1 <= ranks["0"] <= 8
        True

    Source:
        As :class:`OrderedLowRankLinear`.
    """

    def draw(self, widths: dict[str, int]) -> dict[str, int | None]:
        """Return a rank for every layer."""
        return {name: self._integer(width) + 1 if width else None for name, width in widths.items()}


class FixedFractionRankSampler(RankSampler):
    """Every layer at the same fraction of its active rank, rounded up.

    Args:
        model: a model with ordered layers.
        fraction: in (0, 1].

    Raises:
        ValueError: the model has no ordered layer, or ``fraction`` is out of range.

    Example:
        >>> next(FixedFractionRankSampler(decompose(nn.Sequential(nn.Linear(10, 8)))))
        {'0': 2}

    Source:
        As :class:`OrderedLowRankLinear`.
    """

    def __init__(self, model: nn.Module, fraction: float = 0.25) -> None:
        super().__init__(model)
        if not 0.0 < fraction <= 1.0:
            raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
        self.fraction = fraction

    def draw(self, widths: dict[str, int]) -> dict[str, int | None]:
        """Return ceil(fraction * rank) of every layer."""
        # Rounded first: 0.1 * 30 is a little above 3 in floating point.
        return {name: math.ceil(round(self.fraction * width, 9)) for name, width in widths.items()}


@contextmanager
def sampled_ranks(model: nn.Module, sampler: Iterator[Ranks] | Ranks) -> Iterator[Ranks]:
    """Let the ordered layers of a model run at drawn ranks inside a ``with`` block.

    A compiled model compiles anew for every rank, and gives up after some, unless
    ``torch._dynamo.config.allow_unspec_int_on_nn_module`` is set: then one graph serves all.

    Args:
        model: the model whose layers the names refer to.
        sampler: a sampler, which is asked once, or ranks by qualified name.

    Yields:
        The ranks that hold; None means the active rank.

    Raises:
        ValueError: a name is no ordered layer of the model, or a rank is out of range; then no
            rank is set.

    Example:
        >>> model = decompose(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
        >>> with sampled_ranks(model, SingleLayerRankSampler(model)) as ranks:
        ...     output = model(torch.randn(2, 8))
        >>> with sampled_ranks(model, {"0": 3}):
        ...     print(model[0].sampled_rank)
        3

    Source:
        As :class:`OrderedLowRankLinear`.
    """
    layers = ordered_layers(model)
    ranks = sampler if isinstance(sampler, Mapping) else next(sampler)
    for name, rank in ranks.items():
        if name not in layers:
            raise ValueError(f"sampler must name ordered layers of the model, got {name!r}")
        most = layers[name].active_rank
        if rank is not None and not 0 <= rank <= most:
            raise ValueError(f"sampler must give {name!r} a rank from 0 to {most}, got {rank}")
    before = {name: layers[name].sampled_rank for name in ranks}
    try:
        for name, rank in ranks.items():
            layers[name].sampled_rank = rank
        yield ranks
    finally:
        for name, rank in before.items():
            layers[name].sampled_rank = rank


def lod_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    criterion: Callable[[Tensor, Tensor], Tensor],
    sampler: Iterator[Ranks],
    *,
    lasso_weight: float = 5e-3,
    full_pass: bool = True,
    distill: bool | Callable[[Tensor], Tensor] = True,
) -> Tensor:
    r"""Return the loss of low-rank ordered decomposition on one batch.

    .. math:: \ell(f(x), y) + \ell(f_b(x),\, \mathrm{softmax}(f(x))) +
        \lambda \sum_{\text{layers}} \sum_b \|V_{:, b:}\|_F + \|U_{:, b:}\|_F

    with :math:`f_b` the model at ranks from the sampler. The target of the second term is a
    constant. The sampling puts components in order, the lasso empties the tail:
    :func:`shrink_model` then cuts it off.

    Args:
        model: a model with ordered layers, from ``x`` to logits ``[B, classes, ...]``.
        x: a batch.
        y: its targets.
        criterion: a loss that takes probabilities as targets as well, such as
            ``torch.nn.CrossEntropyLoss()``.
        sampler: of ranks, asked once.
        lasso_weight: :math:`\lambda`, at least 0; tuned for each task.
        full_pass: include the first term. Without it the second has the target y.
        distill: teach the second term by the full model: by its softmax over dimension 1, or by a
            callable of the full output (``lambda output: output`` for a regression). False: by y.

    Returns:
        The loss, with no dimensions.

    Raises:
        ValueError: the model has no ordered layer, or ``lasso_weight`` is below 0.

    Example:
        >>> model = decompose(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
        >>> sampler = SingleLayerRankSampler(model)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> x, y = torch.randn(32, 8), torch.randint(4, (32,))
        >>> lod_loss(model, x, y, nn.CrossEntropyLoss(), sampler).backward()
        >>> optimizer.step()

    Source:
        As :class:`OrderedLowRankLinear`: the loss and defaults of the authors' code. The paper's
        objective is the mean over sampled ranks of the loss against y, plus the lasso:
        ``full_pass=False``.
    """
    check_not_negative("lasso_weight", lasso_weight)
    target, loss = y, None
    if full_pass:
        output = model(x)
        loss = criterion(output, y)
        if distill:
            teach = distill if callable(distill) else _softmax
            target = teach(output.detach())
    with sampled_ranks(model, sampler):
        partial = criterion(model(x), target)
    loss = partial if loss is None else loss + partial
    if lasso_weight == 0:
        return loss
    return loss + lasso_weight * group_lasso_penalty(model)


def _softmax(output: Tensor) -> Tensor:
    return output.softmax(1)
