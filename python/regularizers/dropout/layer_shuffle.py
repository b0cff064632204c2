"""Stochastic layer-wise shuffle: a sequence layer sometimes sees its tokens in random order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regularizers._shared.checks import (
    check_at_least,
    check_one_of,
    check_probability,
    check_shape,
    check_tensor,
)
from regularizers._shared.randomness import draw_seed
from regularizers._shared.scheduled import ScheduledModule, known_zero, scheduled
from regularizers.dropout.schedules import DepthSchedule
from regularizers.ops.philox import PHILOX_WORDS, WORDS_PER_CALL

_LOW = 0xFFFFFFFF


def shuffled_call(
    layer: Callable[..., Any],
    x: Tensor,
    residual: Tensor | None = None,
    *,
    p: float | Tensor,
    training: bool = True,
    per_sample: bool = False,
    protect: Sequence[int] = (),
    layer_index: int = 0,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    **kwargs: Any,
) -> Any:
    r"""Call a sequence layer on randomly permuted tokens, with probability p, and put them back.

    .. math:: y_{\pi(j)} = \mathrm{layer}(x_{\pi})_j \ \text{ with probability } p, \qquad
        y = \mathrm{layer}(x) \ \text{ else}

    One permutation :math:`\pi` of all L tokens for the whole batch, the class token among them, and
    nothing is rescaled. The order comes back by a scatter.

    The coin and the permutation are made on the CPU, from the words of (seed, stream
    ``layer_index``): token j is sorted by word j, the coin is word L. Only the L places travel to
    the device, and nothing waits for it; a plain call costs nothing. Inside ``torch.compile`` the
    coin picks between :math:`\pi` and the identity instead, so that one graph serves both, and the
    tokens are gathered either way.

    Args:
        layer: called as ``layer(x, **kwargs)``, or ``layer(x, residual, **kwargs)`` where there is
            a residual. Returns a tensor ``[B, L, *]`` or a tuple of such tensors and Nones.
        x: tokens ``[B, L, D]``.
        residual: a separate residual stream ``[B, L, *]``, permuted as ``x`` is; or None.
        p: probability of shuffling, in [0, 1]; a number or a tensor with no dimensions. A tensor
            on the CPU never waits for a GPU.
        training: whether anything is shuffled.
        per_sample: a permutation for every sample; token j of sample i is sorted by word i L + j of
            step 1.
        protect: places of tokens that stay where they are, in [-L, L).
        layer_index: number of the layer: layers that share a seed draw independently.
        seed: int or int64 tensor with no dimensions; drawn from the CPU's default generator when
            omitted. A tensor on a GPU is not read: it works as inside ``torch.compile``.
        generator: generator of the CPU to draw the seed from; not inside ``torch.compile`` or
            activation checkpointing.
        **kwargs: further arguments of ``layer``, passed on as they are.

    Returns:
        What ``layer`` returns, in the order of ``x``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``x`` does not have three dimensions, ``residual`` or a result does not have the
            tokens of ``x``, ``p`` is outside [0, 1], or ``protect`` is out of range.

    Example:
        >>> running_sum = lambda x: x.cumsum(1)
        >>> x = torch.arange(1.0, 6).reshape(1, 5, 1)
        >>> shuffled_call(running_sum, x, p=1.0, seed=0).flatten()
        tensor([ 1., 10.,  8.,  5., 15.])

    Source:
        "Stochastic Layer-Wise Shuffle", 2024, arXiv 2408.17081; ``shuffle_forward`` of the authors'
        code. ``per_sample`` and ``protect`` are extensions.
    """
    check_tensor("x", x)
    check_shape("x", x, (None, None, None), "[batch, tokens, features]")
    batch, tokens, _ = x.shape
    if residual is not None:
        check_tensor("residual", residual)
        if residual.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"residual must have the tokens of x {list(x.shape)}, got {list(residual.shape)}"
            )
    check_at_least("layer_index", layer_index, 0)
    for fixed in protect:
        if not -tokens <= fixed < tokens:
            raise ValueError(f"protect must hold places in [-{tokens}, {tokens}), got {fixed}")
    inputs = (x,) if residual is None else (x, residual)
    if not training or known_zero(p):
        return layer(*inputs, **kwargs)
    home = seed if isinstance(seed, Tensor) else torch.empty((), device="cpu")
    bits = draw_seed(seed, generator, home)
    on_home = p.to(home.device, non_blocking=True) if isinstance(p, Tensor) else p
    rate = scheduled("p", on_home, home, check_probability)
    shuffles = _words(bits, tokens, 1, layer_index, step=0) < rate * 2.0**32
    if home.device.type == "cpu" and not torch.compiler.is_compiling():
        check_probability("p", rate.item())
        if not shuffles.item():
            return layer(*inputs, **kwargs)
    order = _permutation(bits, batch if per_sample else 1, tokens, protect, layer_index)
    order = torch.where(shuffles, order, torch.arange(tokens, device=order.device))
    place = order.to(x.device, non_blocking=True)
    permuted = (_take(tensor, place) for tensor in inputs)
    return _restore(layer(*permuted, **kwargs), place, x)


def _words(seed: Tensor, first: int, count: int, stream: int, *, step: int) -> Tensor:
    """Return the words of ``count`` elements from ``first`` on."""
    call = first // WORDS_PER_CALL
    calls = -(-(first + count) // WORDS_PER_CALL) - call
    # The automatic kernel, whatever backend is forced: the words are the same.
    words: Tensor = PHILOX_WORDS.kernel(None)(seed, call, calls, stream, step).long() & _LOW
    return words[first - call * WORDS_PER_CALL :][:count]


def _permutation(
    seed: Tensor, samples: int, tokens: int, protect: Sequence[int], stream: int
) -> Tensor:
    """Return the token at every place, ``[samples, tokens]``: free tokens sorted by their words."""
    step = 1 if samples > 1 else 0
    words = _words(seed, 0, samples * tokens, stream, step=step).reshape(samples, tokens)
    fixed = {place % tokens for place in protect}
    if not fixed:
        return words.argsort(dim=1, stable=True)
    free = torch.tensor([j for j in range(tokens) if j not in fixed], device=seed.device)
    order = torch.arange(tokens, device=seed.device).repeat(samples, 1)
    order[:, free] = free[words[:, free].argsort(dim=1, stable=True)]
    return order


def _rows(place: Tensor, like: Tensor) -> Tensor:
    """Return the places among all tokens of the batch, one after the other."""
    batch, tokens = like.shape[:2]
    first = torch.arange(0, batch * tokens, tokens, device=place.device)
    return (first[:, None] + place).flatten()


def _take(x: Tensor, place: Tensor) -> Tensor:
    if place.shape[0] == 1:
        return x.index_select(1, place[0])
    return x.flatten(0, 1).index_select(0, _rows(place, x)).reshape(x.shape)


def _restore(result: Any, place: Tensor, x: Tensor) -> Any:
    if isinstance(result, tuple):
        return tuple(_restore(each, place, x) for each in result)
    if result is None:
        return None
    if not isinstance(result, Tensor) or result.shape[:2] != x.shape[:2]:
        shape = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"layer must return the tokens of x {list(x.shape)}, got {shape}")
    if place.shape[0] == 1:
        return torch.empty_like(result).index_copy(1, place[0], result)
    flat = result.flatten(0, 1)
    return torch.empty_like(flat).index_copy(0, _rows(place, x), flat).reshape(result.shape)


class StochasticLayerShuffle(ScheduledModule):
    r"""Wrap a sequence layer so that in training it sees its tokens shuffled with probability p.

    .. math:: y_{\pi(j)} = \mathrm{layer}(x_{\pi})_j \ \text{ with probability } p, \qquad
        y = \mathrm{layer}(x) \ \text{ else}

    as :func:`shuffled_call` has it. In ``eval()`` it is the layer. ``module.p = 0.3`` changes the
    probability, which stays on the CPU wherever the module goes.

    Args:
        layer: the layer; called as ``layer(x, **kwargs)`` or ``layer(x, residual, **kwargs)``.
        p: probability of shuffling, in [0, 1].
        per_sample: a permutation for every sample.
        protect: places of tokens that stay where they are.

    Shape:
        ``[B, L, D]`` to what the layer gives.

    Raises:
        TypeError: ``layer`` is not a module.
        ValueError: ``p`` is outside [0, 1].

    Example:
        >>> layer = StochasticLayerShuffle(nn.Linear(4, 4), p=0.5)
        >>> layer(torch.randn(2, 7, 4)).shape
        torch.Size([2, 7, 4])

    Source:
        As :func:`shuffled_call`.
    """

    p: Tensor

    def __init__(
        self,
        layer: nn.Module,
        p: float,
        *,
        per_sample: bool = False,
        protect: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if not isinstance(layer, nn.Module):
            raise TypeError(f"layer must be a torch.nn.Module, got {type(layer).__name__}")
        self.layer = layer
        self.per_sample = per_sample
        self.protect = tuple(protect)
        self.schedule("p", p, check_probability)

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> StochasticLayerShuffle:
        p = self.p
        super()._apply(fn, recurse)
        self._buffers["p"] = p
        return self

    def forward(self, x: Tensor, residual: Tensor | None = None, **kwargs: Any) -> Any:
        """Return what the layer returns, in the order of ``x``."""
        return shuffled_call(
            self.layer,
            x,
            residual,
            p=self.p,
            training=self.training,
            per_sample=self.per_sample,
            protect=self.protect,
            **kwargs,
        )

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return f"p={self.p.item():g}, per_sample={self.per_sample}, protect={self.protect}"


def apply_layer_shuffle(
    layers: nn.ModuleList, max_p: float = 0.5, *, schedule: str = "linear"
) -> nn.ModuleList:
    r"""Wrap the layers of a stack in :class:`StochasticLayerShuffle`, in place.

    .. math:: p_l = max\_p \cdot \frac{l}{L - 1}, \qquad l = 0, \dots, L - 1

    The first layer is never shuffled; a single layer has p = 0. Keys of the state dict gain
    ``.layer``: load a checkpoint first.

    Args:
        layers: the layers, from the first to the last.
        max_p: probability of the last layer, in [0, 1]. The authors take 0.5 for 300 epochs of
            supervised training of their base model, together with drop path 0.5, and 0.1 elsewhere.
        schedule: curve over depth: ``"linear"``, ``"cosine"`` or ``"constant"``.

    Returns:
        ``layers``.

    Raises:
        TypeError: ``layers`` is not a ``torch.nn.ModuleList``.
        ValueError: ``max_p`` is outside [0, 1] or ``schedule`` is unknown.

    Example:
        >>> layers = apply_layer_shuffle(nn.ModuleList(nn.Linear(4, 4) for _ in range(3)))
        >>> [layer.p.item() for layer in layers]
        [0.0, 0.25, 0.5]

    Source:
        arXiv 2408.17081; the authors' code has ``linspace(0, max_p, L)``.
    """
    if not isinstance(layers, nn.ModuleList):
        raise TypeError(f"layers must be a torch.nn.ModuleList, got {type(layers).__name__}")
    check_probability("max_p", max_p)
    check_one_of("schedule", schedule, ("linear", "cosine", "constant"))
    share = DepthSchedule(schedule, from_zero=True)  # type: ignore[arg-type]
    for index, layer in enumerate(layers):
        layers[index] = StochasticLayerShuffle(layer, max_p * share(index, len(layers)))
    return layers
