"""Drop path with a schedule: whole branches are left out, a sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from regularizers._shared.checks import check_at_least, check_probability, check_tensor
from regularizers._shared.modules import replace_modules, run_after
from regularizers._shared.randomness import draw_seed
from regularizers._shared.scheduled import ScheduledModule, known_zero, scheduled
from regularizers.dropout.schedules import check_progress
from regularizers.ops.row_gate import row_gate


def drop_path(
    x: Tensor,
    p: float | Tensor,
    *,
    residual: Tensor | None = None,
    training: bool = True,
    scale_by_keep: bool = True,
    branch: int = 0,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Drop the branch ``x`` of a residual network for some samples, in one pass with the addition.

    .. math:: y_i = r_i + \frac{m_i}{1 - p} x_i, \qquad P(m_i = 0) = p
        \text{ independently for every sample}

    With p = 0 or outside of training it is ``x``, or ``residual + x``. ``p`` counts dropped
    samples, as ``drop_prob`` of timm. Unlike timm's function it trains by default, and adds the
    residual itself; at p = 1 the branch vanishes where timm divides by 0.

    Args:
        x: ``[B, *]``, what the branch computed.
        p: probability that a sample's branch is dropped, in [0, 1]; a number or a tensor with no
            dimensions.
        residual: what the branch is added to, ``[B, *]``; None for 0.
        training: whether branches are dropped.
        scale_by_keep: False leaves the factor 1 / (1 - p) out.
        branch: number of the branch: branches that share a seed draw independently.
        seed: int or int64 tensor with no dimensions; drawn from the default generator when omitted.
        generator: generator to draw the seed from; not inside ``torch.compile`` or activation
            checkpointing.

    Returns:
        The shape and dtype of ``x``; ``x`` itself where nothing is to be done.

    Raises:
        TypeError: as :func:`regularizers.ops.row_gate`.
        ValueError: likewise.

    Example:
        >>> x = torch.ones(4, 3)
        >>> drop_path(x, 0.5, seed=42)
        tensor([[2., 2., 2.],
                [0., 0., 0.],
                [0., 0., 0.],
                [0., 0., 0.]])

    Source:
        B. Zoph, V. Vasudevan, J. Shlens, Q. Le, 2017, arXiv 1707.07012; ``drop_path`` of the
        authors' code. The code draws floor(keep + u) where this has a Philox word below p 2^32.
    """
    if not training or known_zero(p):
        check_tensor("x", x)
        return x if residual is None else residual + x
    return row_gate(
        x,
        p,
        residual,
        scale_by_keep=scale_by_keep,
        stream=branch,
        seed=seed,
        generator=generator,
    )


def drop_path_compact(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    p: float | Tensor,
    *,
    residual: Tensor | None = None,
    training: bool = True,
    scale_by_keep: bool = True,
    branch: int = 0,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Drop path that computes the branch for the kept samples only, and saves p of its work.

    .. math:: y_i = r_i + \frac{1}{1 - p} f(x)_i \text{ for kept } i, \qquad
        y_i = r_i \text{ else}

    The same seed keeps the same samples as ``drop_path(function(x), p, ...)``, with the same
    result. Where the function looks at several samples at once, as a batch norm does, it sees
    fewer. If no sample is kept it is not called and its parameters get no gradient.

    The number of kept samples is data to the program: on a GPU the call waits for it, and
    ``torch.compile`` breaks the graph.

    Args:
        function: the branch, from ``[n, *]`` to the same shape.
        x: ``[B, *]``, input of the branch.
        p: as for :func:`drop_path`.
        residual: likewise; very often ``x``.
        training: likewise.
        scale_by_keep: likewise.
        branch: likewise.
        seed: likewise.
        generator: likewise.

    Returns:
        The shape of ``x``.

    Raises:
        TypeError: as :func:`drop_path`.
        ValueError: likewise, or ``function`` changes the shape.

    Example:
        >>> x = torch.ones(8, 3)
        >>> rows = []
        >>> y = drop_path_compact(lambda t: rows.append(len(t)) or 2 * t, x, 0.5, seed=42)
        >>> rows, y[:, 0]
        ([3], tensor([4., 0., 0., 0., 4., 0., 4., 0.]))

    Source:
        As :func:`drop_path`; leaving the work out is this library's.
    """
    check_tensor("x", x)
    if not training or known_zero(p):
        y = function(x)
        return y if residual is None else residual + y
    rate = scheduled("p", p, x, check_probability)
    bits = draw_seed(seed, generator, x)
    ones = x.new_ones(x.shape[0], dtype=torch.float32)
    gates = row_gate(ones, rate, scale_by_keep=False, stream=branch, seed=bits)
    kept = gates.nonzero().flatten()
    if kept.numel() == 0:
        return torch.zeros_like(x) if residual is None else residual.clone()
    rows = function(x.index_select(0, kept))
    if rows.shape != (kept.numel(), *x.shape[1:]):
        raise ValueError(
            f"function must keep the shape {[kept.numel(), *x.shape[1:]]}, got {list(rows.shape)}"
        )
    # The gate reads no dropped row, so nothing need stand there.
    spread = torch.empty_like(x, dtype=rows.dtype).index_copy(0, kept, rows)
    return row_gate(spread, rate, residual, scale_by_keep=scale_by_keep, stream=branch, seed=bits)


class ScheduledDropPath(ScheduledModule):
    r"""Drop path whose rate grows with depth and with training progress.

    .. math:: p_{l,t} = p \cdot \frac{l + 1}{L} \cdot t

    ``set_progress(t)`` (or :func:`set_drop_path_progress` for a whole model) moves the schedule; a
    fresh module is at t = 0, where nothing is dropped. Nothing is dropped in ``eval()`` either.
    With both switches off it is timm's ``DropPath(drop_prob, scale_by_keep)``.

    Args:
        p: rate of the last layer at the end of the training, in [0, 1].
        layer_index: l, counted from 0.
        num_layers: L, the number of layers (cells) in the network.
        scale_by_depth: False leaves the factor (l + 1) / L out.
        scale_by_time: False leaves the factor t out.
        scale_by_keep: as for :func:`drop_path`.

    Shape:
        ``[B, *]`` to the same; ``forward(x, residual)`` adds the residual in the same pass.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument is of the wrong type.

    Example:
        >>> layer = ScheduledDropPath(0.4, layer_index=9, num_layers=20)
        >>> layer.set_progress(0.5)
        >>> layer.current_p
        0.1
        >>> layer(torch.randn(8, 3), residual=torch.randn(8, 3)).shape
        torch.Size([8, 3])

    Source:
        B. Zoph, V. Vasudevan, J. Shlens, Q. Le, 2017, arXiv 1707.07012. The paper states linear
        growth over the training; depth, and both together as the default, follow the authors'
        code (``drop_connect_version`` v3). Their final rates are 0.4 (CIFAR-10), 0.3 (ImageNet,
        large) and 0 (mobile).
    """

    rate: Tensor

    def __init__(
        self,
        p: float,
        layer_index: int,
        num_layers: int,
        *,
        scale_by_depth: bool = True,
        scale_by_time: bool = True,
        scale_by_keep: bool = True,
    ) -> None:
        super().__init__()
        check_probability("p", p)
        check_at_least("num_layers", num_layers, 1)
        check_at_least("layer_index", layer_index, 0)
        if layer_index >= num_layers:
            raise ValueError(
                f"layer_index must be below num_layers = {num_layers}, got {layer_index}"
            )
        self.layer_index = layer_index
        self.num_layers = num_layers
        self.scale_by_depth = scale_by_depth
        self.scale_by_time = scale_by_time
        self.scale_by_keep = scale_by_keep
        self._final_p = float(p)
        self._progress = 0.0
        self.schedule("rate", self.current_p, check_probability)

    @property
    def p(self) -> float:
        """The rate of the last layer at the end of the training; may be assigned."""
        return self._final_p

    @p.setter
    def p(self, value: float) -> None:
        check_probability("p", float(value))
        self._final_p = float(value)
        self.rate = torch.tensor(self.current_p, dtype=torch.float64)

    @property
    def current_p(self) -> float:
        """The rate at the current progress."""
        depth = (self.layer_index + 1) / self.num_layers if self.scale_by_depth else 1.0
        return self._final_p * depth * (self._progress if self.scale_by_time else 1.0)

    def set_progress(self, progress: float) -> None:
        """Move to a share of the training, at least 0; above 1 it counts as 1."""
        self._progress = check_progress("progress", progress)
        self.rate = torch.tensor(self.current_p, dtype=torch.float64)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return ``x`` with some samples dropped, added to ``residual``."""
        return drop_path(
            x,
            self.rate,
            residual=residual,
            training=self.training,
            scale_by_keep=self.scale_by_keep,
        )

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return (
            f"p={self._final_p:g}, layer_index={self.layer_index}, num_layers={self.num_layers}, "
            f"scale_by_depth={self.scale_by_depth}, scale_by_time={self.scale_by_time}"
        )


def apply_scheduled_drop_path(
    model: nn.Module,
    p: float,
    *,
    order: Sequence[str | Sequence[str]] | None = None,
    scale_by_depth: bool = True,
    scale_by_time: bool = True,
) -> nn.Module:
    """Put :class:`ScheduledDropPath` behind the branches of a model, in place.

    Names of parameters and keys of the state dict stay as they are. Identity branches are not to
    be listed: they are never dropped.

    Args:
        model: any module.
        p: rate of the last layer at the end of the training, in [0, 1].
        order: qualified names of the branches from the first layer to the last; an entry may be
            several names, the branches of one layer. Each must return one tensor ``[B, *]``. None:
            every ``DropPath`` (timm) and row-wise ``StochasticDepth`` (torchvision) of the model
            is replaced, and those with one parent count as one layer. timm leaves them out of a
            model built with ``drop_path_rate=0``.
        scale_by_depth: as for :class:`ScheduledDropPath`.
        scale_by_time: likewise.

    Returns:
        ``model``.

    Raises:
        ValueError: ``p`` is out of range, a name is unknown or comes twice, or there is nothing to
            drop.

    Example:
        >>> model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
        >>> model = apply_scheduled_drop_path(model, 0.4, order=["first", "second"])
        >>> set_drop_path_progress(model, step=50, total_steps=100)
        2
        >>> [round(m.current_p, 3) for m in model.modules() if isinstance(m, ScheduledDropPath)]
        [0.1, 0.2]

    Source:
        As :class:`ScheduledDropPath`; walking a model is this library's.
    """
    check_probability("p", p)
    options = {"scale_by_depth": scale_by_depth, "scale_by_time": scale_by_time}
    if order is None:
        return _replace_drop_paths(model, p, options)
    layers = [[entry] if isinstance(entry, str) else list(entry) for entry in order]
    names = [name for layer in layers for name in layer]
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules or not name]
    if unknown or not names:
        raise ValueError(f"order must name modules of the model, got {unknown or 'no name'}")
    if len({id(modules[name]) for name in names}) < len(names):
        raise ValueError("order must name every module once")
    for index, layer in enumerate(layers):
        for name in layer:
            gate = ScheduledDropPath(p, index, len(layers), **options)
            run_after(modules[name], gate, "scheduled_drop_path")
    return model


def _replace_drop_paths(model: nn.Module, p: float, options: dict[str, bool]) -> nn.Module:
    parents = []
    for name, module in model.named_modules():
        if _drops_paths(module):
            parents.append(name.rpartition(".")[0])
    layers = {parent: index for index, parent in enumerate(dict.fromkeys(parents))}
    if not layers:
        raise ValueError("order must be given: the model has no DropPath or StochasticDepth")

    def gate(name: str, module: nn.Module) -> nn.Module | None:
        if not _drops_paths(module):
            return None
        index = layers[name.rpartition(".")[0]]
        keeps_scale = getattr(module, "scale_by_keep", True)
        new = ScheduledDropPath(p, index, len(layers), scale_by_keep=keeps_scale, **options)
        return new.train(module.training)

    return replace_modules(model, gate)


def _drops_paths(module: nn.Module) -> bool:
    """Tell whether a module is timm's, torchvision's or our own drop path, by its class's name."""
    name = type(module).__name__
    return name in ("DropPath", "ScheduledDropPath") or (
        name == "StochasticDepth" and getattr(module, "mode", None) == "row"
    )


def set_drop_path_progress(model: nn.Module, step: int, total_steps: int) -> int:
    """Move every :class:`ScheduledDropPath` of a model to ``step / total_steps``.

    Call it once an optimizer step, before the forward pass. It writes into tensors, so a compiled
    model needs no second compilation.

    Args:
        model: any module.
        step: number of optimizer steps done, at least 0; beyond ``total_steps`` the schedule
            stands still.
        total_steps: above 0.

    Returns:
        The number of modules found.

    Raises:
        ValueError: ``step`` is below 0 or ``total_steps`` not above 0.

    Example:
        >>> layer = ScheduledDropPath(0.4, layer_index=0, num_layers=1)
        >>> set_drop_path_progress(layer, step=25, total_steps=100), layer.current_p
        (1, 0.1)

    Source:
        As :class:`ScheduledDropPath`.
    """
    if not total_steps > 0:
        raise ValueError(f"total_steps must be above 0, got {total_steps}")
    progress = check_progress("step / total_steps", step / total_steps)
    found = [module for module in model.modules() if isinstance(module, ScheduledDropPath)]
    for module in found:
        module.set_progress(progress)
    return len(found)
