"""Mask tuning: binary masks on frozen weights, trained by straight-through."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from regularizers._shared.checks import (
    check_floating,
    check_module,
    check_one_of,
)
from regularizers.dropout import straight_through
from regularizers.ops._operator import accumulate_dtype

Init = float | tuple[float, float]


def binarize_ste(m: Tensor, threshold: float) -> Tensor:
    r"""Return the step of scores, with the gradient of the identity.

    .. math:: b = 1[m > \tau], \qquad \partial b / \partial m := 1

    Args:
        m: scores ``[*]``.
        threshold: :math:`\tau`; a score equal to it gives 0.

    Returns:
        ``[*]`` of 0 and 1, dtype of ``m``.

    Raises:
        TypeError: ``m`` is no floating-point tensor.

    Example:
        >>> m = torch.tensor([0.004, 0.005, 0.006], requires_grad=True)
        >>> binarize_ste(m, 0.005).detach(), torch.autograd.grad(binarize_ste(m, 0.005).sum(), m)[0]
        (tensor([0., 0., 1.]), tensor([1., 1., 1.]))

    Source:
        "Regularized Mask Tuning", 2023, arXiv 2307.15049; authors' code.
    """
    check_floating("m", m)
    return straight_through(m, (m > threshold).to(m.dtype))


class BinaryMask(nn.Module):
    r"""A parametrization that keeps or zeroes each entry of a weight.

    .. math:: \tilde W = 1[m > \tau] \circ W, \qquad
        \frac{\partial L}{\partial m} = \frac{\partial L}{\partial \tilde W} \circ W

    so an entry that is 0 never moves its score. :func:`attach_masks` registers it with
    ``torch.nn.utils.parametrize``. Scores of half-precision weights are float32: steps of 1e-4
    would be lost in them.

    Args:
        weight: the weight to mask; gives shape, dtype and device.
        init: score of every entry, or (low, high) to draw them uniformly.
        threshold: :math:`\tau`, below ``init`` (below high).
        generator: generator to draw uniform scores from.

    Shape:
        A weight of the shape of ``weight`` to the same, dtype of the weight.

    Raises:
        TypeError: ``weight`` is no floating-point tensor.
        ValueError: all scores would begin at or below the threshold, or the range is empty.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> mask = BinaryMask(layer.weight)
        >>> mask.mask.tolist()
        [[1.0, 1.0]]

    Source:
        "Regularized Mask Tuning", 2023, arXiv 2307.15049; authors' code.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        init: Init = 1e-2,
        threshold: float = 5e-3,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_floating("weight", weight)
        low, high = _score_range(init, threshold)
        self.threshold = threshold
        score = torch.full_like(
            weight, high, dtype=accumulate_dtype(weight.dtype), requires_grad=False
        )
        if low < high:
            score.uniform_(low, high, generator=generator)
        self.score = nn.Parameter(score)

    @property
    def mask(self) -> Tensor:
        """The mask of 0 and 1, with its straight-through gradient."""
        return binarize_ste(self.score, self.threshold)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked weight."""
        return self.mask.to(weight.dtype) * weight

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return f"{tuple(self.score.shape)}, threshold={self.threshold:g}"


def _score_range(init: Init, threshold: float) -> tuple[float, float]:
    low, high = init if isinstance(init, tuple) else (init, init)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"init must be finite, a number or (low, high), got {init}")
    if not threshold < high:
        raise ValueError(
            f"threshold must be below init = {init}, or everything is masked; got {threshold}"
        )
    return low, high


def attach_masks(
    model: nn.Module,
    *,
    target: Iterable[str] | Callable[[str, nn.Parameter], bool] | None = ("attn",),
    init: Init = 1e-2,
    threshold: float = 5e-3,
    freeze: bool = True,
    generator: torch.Generator | None = None,
) -> dict[str, BinaryMask]:
    r"""Put a trainable binary mask on weights of a model, in place, and freeze the rest.

    At first every mask is 1 and the model computes what it did. Train the scores alone, without
    weight decay (it would pull them under the threshold):
    ``torch.optim.Adam([mask.score for mask in masks.values()], lr=8e-5)``, the paper with a cosine
    schedule over 30 epochs of batches of 32 and :class:`~regularizers.optim.GradientDropout`.

    Args:
        model: any module.
        target: which parameters: names or parts of names (a string that is a whole name stands for
            that parameter only, as :func:`select_parameters` gives them), a function of name and
            parameter, or None for all. Only tensors of two or more dimensions are masked. The paper
            masks attention; ``("mlp",)`` and None are its variants.
        init: score of every entry, or (low, high) to draw them uniformly; the released code
            also knows (0, 1e-2), which masks half at first.
        threshold: :math:`\tau`.
        freeze: set ``requires_grad`` of every other parameter of the model to False. What is
            masked is frozen always.
        generator: generator to draw uniform scores from.

    Returns:
        The masks, by the parameters' former names. A parameter that stands in several places has
        one mask in all of them.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: nothing fits ``target``, a parameter has a mask or another parametrization
            already, or ``threshold`` is not below ``init``.

    Example:
        >>> model = torch.nn.MultiheadAttention(8, 2)
        >>> masks = attach_masks(model, target=("in_proj", "out_proj"))
        >>> list(masks)
        ['in_proj_weight', 'out_proj.weight']
        >>> masked_fraction(model)
        tensor(0.)

    Source:
        "Regularized Mask Tuning", 2023, arXiv 2307.15049; authors' code.
    """
    check_module("model", model)
    _score_range(init, threshold)
    if any(parametrize.is_parametrized(module) for module in model.modules()):
        raise ValueError("model must have no parametrizations yet, got one that has")
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    fits = _matcher(target, names)
    places = [
        (name, module, attribute, parameter)
        for name, module, attribute, parameter in _weights(model)
        if fits(name, parameter)
    ]
    if not places:
        raise ValueError(f"target must fit a parameter of two or more dimensions, got {target!r}")
    masks: dict[str, BinaryMask] = {}
    made: dict[nn.Parameter, BinaryMask] = {}
    if freeze:
        model.requires_grad_(False)
    for name, module, attribute, parameter in places:
        if parameter not in made:
            made[parameter] = masks[name] = BinaryMask(
                parameter, init=init, threshold=threshold, generator=generator
            )
            parameter.requires_grad_(False)
        # It begins as the identity up to the mask, and its own check would cost a copy.
        parametrize.register_parametrization(module, attribute, made[parameter], unsafe=True)
    return masks


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    for prefix, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.dim() >= 2 and parameter.is_floating_point():
                name = f"{prefix}.{attribute}" if prefix else attribute
                yield name, module, attribute, parameter


def _matcher(
    target: Iterable[str] | Callable[[str, nn.Parameter], bool] | None, names: set[str]
) -> Callable[[str, nn.Parameter], bool]:
    if target is None:
        return lambda name, parameter: True
    if callable(target):
        return target
    words = [target] if isinstance(target, str) else list(target)
    whole, parts = set(words) & names, [word for word in words if word not in names]
    return lambda name, parameter: name in whole or any(part in name for part in parts)


def _masks(model: nn.Module) -> list[BinaryMask]:
    check_module("model", model)
    masks = [module for module in model.modules() if isinstance(module, BinaryMask)]
    if not masks:
        raise ValueError("model must have masks; call attach_masks first")
    return masks


def masked_fraction(model: nn.Module) -> Tensor:
    """Return the share of masked entries among those that could be; the paper reports 2.6 %.

    Args:
        model: a model with masks.

    Returns:
        A tensor with no dimensions, in [0, 1].

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no masks.

    Example:
        >>> layer = torch.nn.Linear(4, 2)
        >>> mask = attach_masks(layer, target=None)["weight"]
        >>> _ = mask.score.data[0].zero_()
        >>> masked_fraction(layer)
        tensor(0.5000)

    Source:
        "Regularized Mask Tuning", 2023, arXiv 2307.15049.
    """
    masks = _masks(model)
    with torch.no_grad():
        masked = torch.stack([(mask.score <= mask.threshold).sum() for mask in masks]).sum()
    return masked / sum(mask.score.numel() for mask in masks)


def mask_norm(model: nn.Module) -> Tensor:
    r"""Return the norms of the scores, which the authors' code may add to the task loss.

    .. math:: \sum_l \lVert m_l \rVert_2

    Off by default there; its weight is 1e-6 by default and 1e-4 in the released configuration.

    Args:
        model: a model with masks.

    Returns:
        A tensor with no dimensions.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no masks.

    Example:
        >>> layer = torch.nn.Linear(4, 4)
        >>> masks = attach_masks(layer, target=None)
        >>> round(mask_norm(layer).item(), 6)
        0.04

    Source:
        "Regularized Mask Tuning", 2023, arXiv 2307.15049; authors' code.
    """
    return torch.stack([mask.score.norm() for mask in _masks(model)]).sum()


def fold_masks(model: nn.Module) -> nn.Module:
    """Write the masked weights into the model, in place, and take the masks off; return the model.

    Parameters and keys of the state dict have their former names afterwards; they stay frozen.

    Args:
        model: a model with masks.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no masks.

    Example:
        >>> layer = torch.nn.Linear(4, 2)
        >>> masks = attach_masks(layer, target=None)
        >>> sorted(fold_masks(layer).state_dict())
        ['bias', 'weight']

    Source:
        "Regularized Mask Tuning", 2023, arXiv 2307.15049.
    """
    _masks(model)
    folded: dict[Tensor, nn.Parameter] = {}
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        chains: Any = module.parametrizations
        for attribute, chain in list(chains.items()):
            if not any(isinstance(link, BinaryMask) for link in chain):
                continue
            original = chain.original
            parametrize.remove_parametrizations(module, attribute)
            parameter = getattr(module, attribute)
            parameter.requires_grad_(False)
            # A weight in several places was one parameter and is one again.
            setattr(module, attribute, folded.setdefault(original, parameter))
    return model


def select_parameters(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    loader: Iterable[Any],
    *,
    top: float = 0.05,
    by: str = "grad",
) -> list[str]:
    r"""Name the weights that a task would change most: where masks pay.

    .. math:: s_W = \mathrm{mean}_{ij} \Bigl| \sum_{batches} \partial L / \partial W_{ij} \Bigr|
        \quad\text{or}\quad \mathrm{mean}_{ij} \Bigl| W_{ij} \sum_{batches}
        \partial L / \partial W_{ij} \Bigr|

    The second is the gradient that the scores of a mask get. Nothing of the model is changed but
    what its forward pass changes itself: evaluate it (``model.eval()``) if that matters.

    Args:
        model: any module; frozen parameters count too.
        loss_fn: called with the model and a batch; returns a tensor with one element.
        loader: batches of the task.
        top: share of the weights to name, in (0, 1]; at least one is named.
        by: ``"grad"``, the first score, or ``"mask"``, the second.

    Returns:
        Names of parameters of two or more dimensions, the highest score first, as ``target`` of
        :func:`attach_masks`.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``top`` or ``by`` is out of range, the loader is empty, the model has no
            weights, or the loss does not depend on them.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        >>> loss_fn = lambda model, x: model(x).square().mean()
        >>> len(select_parameters(model, loss_fn, [torch.randn(8, 4)], top=0.5))
        1

    Source:
        "Regularized Mask Tuning", 2023, arXiv 2307.15049: that gradients of the task pick the
        layers; score and share are reconstructed.
    """
    check_module("model", model)
    if not 0.0 < top <= 1.0:
        raise ValueError(f"top must lie in (0, 1], got {top}")
    check_one_of("by", by, ("grad", "mask"))
    weights: dict[nn.Parameter, str] = {}
    for name, _, _, parameter in _weights(model):
        weights.setdefault(parameter, name)
    if not weights:
        raise ValueError("model must have a weight of two or more dimensions, got none")
    params = list(weights)
    required = [parameter.requires_grad for parameter in params]
    sums = [torch.zeros_like(p, dtype=accumulate_dtype(p.dtype)) for p in params]
    batches = 0
    try:
        for parameter in params:
            parameter.requires_grad_(True)
        for batch in loader:
            batches += 1
            with torch.enable_grad():
                loss = loss_fn(model, batch)
            if not loss.requires_grad:
                raise ValueError("loss_fn must depend on the model's weights, got a constant")
            for total, grad in zip(
                sums, torch.autograd.grad(loss, params, allow_unused=True), strict=True
            ):
                if grad is not None:
                    total.add_(grad)
    finally:
        for parameter, flag in zip(params, required, strict=True):
            parameter.requires_grad_(flag)
    if batches == 0:
        raise ValueError("loader must give at least one batch, got none")
    with torch.no_grad():
        scores = [
            (total * parameter if by == "mask" else total).abs().mean().item()
            for total, parameter in zip(sums, params, strict=True)
        ]
    order = sorted(range(len(params)), key=lambda i: -scores[i])
    return [weights[params[i]] for i in order[: max(1, math.ceil(top * len(params)))]]
