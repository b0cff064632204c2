"""DAREx: random pruning of what fine-tuning changed, rescaled, and importance as a baseline."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_fraction,
    check_module,
    check_one_of,
    check_shape,
    known_range,
)
from regularizers._shared.randomness import draw_seed
from regularizers.ops.dropout import dropout_samples
from regularizers.ops.philox import philox_words
from regularizers.optim.delta import StateDelta
from regularizers.optim.lowrank import matches

Scale = float | Tensor


def drop_delta(
    delta: Tensor,
    p: float,
    *,
    q: Scale | None = None,
    structured: bool = False,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Drop entries of a tensor at random and divide the others by q.

    .. math:: \delta'_e = \frac{m_e}{q} \delta_e, \qquad P(m_e = 0) = p

    Mean :math:`(1 - p)\delta / q`, variance :math:`\delta^2 p (1 - p) / q^2`: q = 1 - p (DARE) is
    unbiased, a larger q gives up the mean for less variance. The mask is made inside the pass and
    never stored; a seed gives one mask for every q.

    Args:
        delta: ``[*]``, a floating-point tensor; differentiable.
        p: probability that an entry is dropped, in [0, 1).
        q: what the others are divided by, above 0; a number, or a tensor that broadcasts to ``[*]``
            (``[m, 1]``: one for each row), differentiable. 1 - p when omitted.
        structured: one draw for each index of the last dimension (an input feature) instead of each
            entry, for tensors of two or more dimensions.
        seed: int or int64 tensor with no dimensions; drawn from the default generator when omitted.
        generator: generator to draw the seed from.

    Returns:
        ``[*]``; ``delta`` itself for p = 0 and q = 1.

    Raises:
        TypeError: ``delta`` is not a floating-point tensor.
        ValueError: ``p`` or ``q`` is out of its range.

    Warns:
        UserWarning: q is below 1 - p: more variance than DARE, and a bias.

    Example:
        >>> drop_delta(torch.arange(4.0), 0.5, seed=42)
        tensor([0., 0., 0., 0.])
        >>> drop_delta(torch.arange(4.0), 0.5, q=1.0, seed=3)
        tensor([0., 0., 2., 3.])

    Source:
        DARE: L. Yu et al., 2023, arXiv 2311.03099; DAREx, ICLR 2025, arXiv 2410.09344, as in the
        authors' code. Which dimension ``structured`` drops is the library's reading.
    """
    check_floating("delta", delta)
    check_fraction("p", p)
    _check_scale(q, p)
    bits = draw_seed(seed, generator, delta)
    if p == 0:
        return delta if q is None or (not isinstance(q, Tensor) and q == 1) else delta / q
    if structured and delta.dim() > 1:
        dropped = delta * dropout_samples(delta.new_ones(delta.shape[-1]), p, 1, seed=bits)[0]
    else:
        dropped = dropout_samples(delta, p, 1, seed=bits)[0]
    return dropped if q is None else dropped * ((1 - p) / q)


def _check_scale(q: Scale | None, p: float, name: str = "q") -> None:
    if q is None:
        return
    if isinstance(q, Tensor):
        check_floating(name, q)
        known = known_range(q.detach())
        least = 1.0 if known is None else known[0]
    else:
        least = float(q)
    if not least > 0:
        raise ValueError(f"{name} must be above 0, got {least}")
    if least < (1 - p) * (1 - 1e-6):
        warnings.warn(
            f"{name} = {least:g} is below 1 - p = {1 - p:g}: the result is biased and varies more "
            "than at 1 - p",
            stacklevel=4,
        )


def darex(
    finetuned: Mapping[str, Tensor],
    pretrained: Mapping[str, Tensor],
    *,
    p: float = 0.99,
    q: Literal["dare"] | Scale | Mapping[str, Scale] = "dare",
    keep: str | Sequence[str] = ("classifier", "lm_head"),
    structured: bool = False,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    r"""Prune what fine-tuning changed: drop a part p of each delta, divide the rest by q, add back.

    .. math:: \theta = \theta_{\text{pre}} + \frac{m}{q} \odot
        (\theta_{\text{fine}} - \theta_{\text{pre}})

    At high p DARE's q = 1 - p can be worse than dropping everything: its variance grows with the
    squares of the deltas. :func:`search_q`, :func:`learn_q`, :func:`analytic_layer_q` and
    :func:`mse_q` are ways to a better q.

    Args:
        finetuned: a state dict.
        pretrained: the state dict it started from, with the same keys and shapes; embeddings may
            have other numbers of rows, see :class:`StateDelta`.
        p: probability that an entry of a delta is dropped, in [0, 1).
        q: ``"dare"`` for 1 - p; a number or tensor with no dimensions for all; or a mapping from
            names of modules (or of tensors) to one each. A bias takes its module's q; tensors that
            are not named take the mean of the mapping's values.
        keep: modules that stay as fine-tuned, see :class:`StateDelta`.
        structured: drop input features rather than entries, as :func:`drop_delta`.
        seed: int or int64 tensor with no dimensions. Every tensor has a mask of its own, the same
            for every q. Drawn from the default generator when omitted.
        generator: generator to draw the seed from.

    Returns:
        A state dict in the types and order of ``finetuned``; differentiable in q.

    Raises:
        ValueError: keys or shapes differ, ``p`` or a q is out of its range, or ``q`` names what is
            not there.

    Example:
        >>> before, after = {"fc.weight": torch.zeros(2, 3)}, {"fc.weight": torch.ones(2, 3)}
        >>> darex(after, before, p=0.5, q=0.8, seed=2)["fc.weight"]
        tensor([[1.2500, 1.2500, 0.0000],
                [1.2500, 1.2500, 1.2500]])

    Source:
        DAREx, ICLR 2025, arXiv 2410.09344, as in the authors' code; p = 0.99 as in most of its
        experiments (0.9 to 0.999).
    """
    check_fraction("p", p)
    difference = StateDelta(finetuned, pretrained, keep=keep)
    deltas = difference.deltas
    scales = _scales(q, deltas)
    for key, scale in scales.items():
        _check_scale(scale, p, "q" if isinstance(q, (float, int, Tensor)) else f"q[{key!r}]")
    if not deltas:
        return difference.restore()
    seeds = _seeds(draw_seed(seed, generator, next(iter(deltas.values()))), len(deltas))
    done: dict[Any, Tensor] = {}  # tied tensors stand under several keys and are pruned alike
    dropped = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # given above, once for each q
        for (key, delta), bits in zip(deltas.items(), seeds.unbind(), strict=True):
            tensor = finetuned[key]
            memory = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
            if memory not in done or tensor.numel() == 0:
                done[memory] = drop_delta(
                    delta, p, q=scales.get(key), structured=structured, seed=bits.to(delta.device)
                )
            dropped[key] = done[memory]
    return difference.restore(dropped)


def _scales(q: str | Scale | Mapping[str, Scale], deltas: Mapping[str, Tensor]) -> dict[str, Scale]:
    """Return the q of each tensor, nothing where it is 1 - p."""
    if isinstance(q, str):
        check_one_of("q", q, ("dare",))
        return {}
    if not isinstance(q, Mapping):
        return dict.fromkeys(deltas, q)
    if not q:
        raise ValueError("q must name at least one module, got an empty mapping")
    scales: dict[str, Scale] = {}
    named = set()
    for key in deltas:
        module = key.rpartition(".")[0]
        for name in (key, module, f"{module}.weight"):
            if name in q:
                scales[key] = q[name]
                named.add(name)
                break
    unknown = sorted(set(q) - named)
    if unknown:
        raise ValueError(f"q must name modules that have deltas, got {', '.join(unknown[:5])}")
    mean = sum(q.values()) / len(q)
    return {key: scales.get(key, mean) for key in deltas}


def _seeds(seed: Tensor, count: int) -> Tensor:
    """Return seeds ``[count]`` made from one, so that no two tensors share a mask."""
    high, low = philox_words(seed, 2 * count).reshape(count, 2).unbind(-1)
    return (high << 32) | low


def importance_mask(
    delta: Tensor,
    *,
    method: Literal["magnitude", "wanda"] = "magnitude",
    p: float,
    activations: Tensor | None = None,
) -> Tensor:
    r"""Return which entries of a delta are the most important: the baselines of random dropping.

    .. math:: |\delta_{ij}| \text{ over the whole tensor, or, Wanda, }
        |\delta_{ij}|\,\|x_j\|_2 \text{ within each row i}

    Args:
        delta: ``[*]``; ``[m, n]`` for ``"wanda"``.
        method: ``"magnitude"`` or ``"wanda"``.
        p: part that is dropped, in [0, 1); the number kept is rounded.
        activations: norms of the inputs ``[n]`` for ``"wanda"``, from
            :meth:`ActivationMean.norms`.

    Returns:
        bool ``[*]``, True for what is kept; of equal entries the first.

    Raises:
        TypeError: ``delta`` is not a floating-point tensor.
        ValueError: an option is out of its range, or ``activations`` does not fit.

    Example:
        >>> importance_mask(torch.tensor([0.1, -0.5, 0.3, 0.2]), p=0.5)
        tensor([False,  True,  True, False])

    Source:
        Baselines of DAREx, arXiv 2410.09344; Wanda: M. Sun et al., 2023, arXiv 2306.11695.
    """
    check_floating("delta", delta)
    check_one_of("method", method, ("magnitude", "wanda"))
    check_fraction("p", p)
    if (activations is None) == (method == "wanda"):
        raise ValueError("activations must be given for the method 'wanda', and only for it")
    size = delta.detach().abs()
    if activations is not None:
        check_shape("delta", delta, (None, None), "[m, n]")
        check_shape("activations", activations, (delta.shape[1],), "[n]")
        size = size * activations.to(size)
    rows = size.flatten()[None] if method == "magnitude" else size
    kept = round((1 - p) * rows.shape[-1])
    order = rows.argsort(stable=True, dim=-1, descending=True)[..., :kept]
    mask = torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, order, True)
    return mask.reshape(delta.shape)


class ActivationMean:
    r"""Collect means and norms of the inputs of a model's linear layers while it runs.

    .. math:: \bar x_j = \frac1T \sum_t x_{tj}, \qquad
        \|x_j\| = \Big(\frac1T \sum_t x_{tj}^2\Big)^{1/2}

    over all T tokens of all calls inside the ``with`` block.

    Args:
        model: any module.
        target: which linear layers, as for :func:`inject_low_rank`; all when omitted.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no linear layer matches.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> with ActivationMean(model) as activations:
        ...     _ = model(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
        >>> activations.means()
        {'0': tensor([2., 2.])}

    Source:
        DAREx, arXiv 2410.09344. The plain mean over all tokens; the running mean of the released
        code is that only for one sequence a call.
    """

    def __init__(self, model: nn.Module, target: str | Sequence[str] | None = None) -> None:
        check_module("model", model)
        self._layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and (target is None or matches(target, name))
        }
        if not self._layers:
            raise ValueError(f"target must match a linear layer, got {target!r}")
        self._sums: dict[str, Tensor] = {}  # [2, n]: of values, of squares
        self._counts: dict[str, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> ActivationMean:
        """Begin to collect."""
        for name, layer in self._layers.items():

            def collect(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                self._add(name, inputs[0])

            self._handles.append(layer.register_forward_pre_hook(collect))
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def _add(self, name: str, x: Tensor) -> None:
        tokens = x.reshape(-1, x.shape[-1])
        wide = tokens.to(torch.float32 if x.device.type == "mps" else torch.float64)
        sums = torch.stack((wide.sum(0), wide.square().sum(0)))
        self._sums[name] = sums + self._sums[name] if name in self._sums else sums
        self._counts[name] = self._counts.get(name, 0) + len(tokens)

    def means(self) -> dict[str, Tensor]:
        """Return the mean input ``[n]`` of each layer that ran."""
        return {name: (s[0] / self._counts[name]).float() for name, s in self._sums.items()}

    def norms(self) -> dict[str, Tensor]:
        """Return the root mean square of each input ``[n]`` of each layer that ran."""
        return {name: (s[1] / self._counts[name]).sqrt().float() for name, s in self._sums.items()}


def output_change(a: Tensor, b: Tensor, *, topk: int | None = 5) -> Tensor:
    r"""Return how much a model's output changed: what q is chosen by where there are no labels.

    The mean squared change of the logits that were the k largest, for a decoder; the mean absolute
    change of everything, for the last hidden states of an encoder.

    Args:
        a: output before, ``[*, C]``.
        b: output after, likewise.
        topk: k, from 1 to C; None for the mean absolute change.

    Returns:
        A tensor with no dimensions.

    Raises:
        TypeError: an output is not a floating-point tensor.
        ValueError: shapes differ or ``topk`` is out of its range.

    Example:
        >>> a = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
        >>> output_change(a, a + torch.tensor([1.0, 0.0, 5.0, 5.0]), topk=2)
        tensor(0.5000)

    Source:
        DAREx, arXiv 2410.09344, as in the authors' code.
    """
    check_floating("a", a)
    check_floating("b", b)
    if a.shape != b.shape:
        raise ValueError(f"b must have the shape of a, {list(a.shape)}, got {list(b.shape)}")
    if topk is None:
        return (a - b).abs().mean()
    check_at_least("topk", topk, 1)
    if topk > a.shape[-1]:
        raise ValueError(f"topk must be at most C = {a.shape[-1]}, got {topk}")
    values, indices = a.topk(topk, dim=-1)
    return (values - b.gather(-1, indices)).square().mean()
