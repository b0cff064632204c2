"""Weight compander: weights as a bounded odd curve of the trained tensor, its shape learned too."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from regularizers._shared.checks import (
    check_floating,
    check_module,
    check_one_of,
    check_positive,
    check_values,
    known_range,
)
from regularizers.ops._operator import accumulate_dtype

Kind = Literal["arctan", "tanh"]
KINDS = ("arctan", "tanh")
MARGIN = 1.01  # how far the bound is kept from the largest weight to be represented


def compand(v: Tensor, a: float | Tensor, b: float | Tensor, *, kind: Kind = "arctan") -> Tensor:
    r"""Compress large entries of a tensor under a bound and, where a / b > 1, enlarge small ones.

    .. math:: w = a \arctan(v / b) \quad\text{or}\quad a \tanh(v / b)

    The slope at 0 is a / b, the bound :math:`a\pi/2` or a. Differentiable in all arguments; half
    types are computed in float32.

    Args:
        v: ``[*]``, a floating-point tensor.
        a: height, above 0; a number or a tensor that broadcasts with ``v``.
        b: width, above 0; as ``a``.
        kind: ``"arctan"`` or ``"tanh"``.

    Returns:
        ``[*]``, in the dtype of ``v``.

    Raises:
        TypeError: ``v`` is not a floating-point tensor.
        ValueError: ``a`` or ``b`` is not above 0, or ``kind`` is unknown. Tensors are looked at on
            a CPU only.

    Example:
        >>> compand(torch.tensor([0.05, 0.2, 10.0]), 0.5, 0.2)
        tensor([0.1225, 0.3927, 0.7754])

    Source:
        Weight Compander, 2023, arXiv 2306.16993. No code was found; the form (bounded, odd,
        saturating, two shape parameters) is the abstract's, the arctangent reconstructed, tanh the
        library's.
    """
    check_floating("v", v)
    check_one_of("kind", kind, KINDS)
    _check_shape_parameters(a, b)
    return _curve(v, a, b, kind)


def compand_inverse(
    w: Tensor, a: float | Tensor, b: float | Tensor, *, kind: Kind = "arctan"
) -> Tensor:
    r"""Return the tensor that :func:`compand` takes to ``w``.

    .. math:: v = b \tan(w / a) \quad\text{or}\quad b\, \mathrm{artanh}(w / a)

    Args:
        w: ``[*]``, a floating-point tensor with entries below the bound in size.
        a: as for :func:`compand`.
        b: as for :func:`compand`.
        kind: as for :func:`compand`.

    Returns:
        ``[*]``, in the dtype of ``w``.

    Raises:
        TypeError: ``w`` is not a floating-point tensor.
        ValueError: an entry is not below the bound, ``a`` or ``b`` is not above 0, or ``kind`` is
            unknown.

    Example:
        >>> compand_inverse(compand(torch.tensor([0.05, -3.0]), 0.5, 0.2), 0.5, 0.2)
        tensor([ 0.0500, -3.0000])

    Source:
        As :func:`compand`.
    """
    check_floating("w", w)
    check_one_of("kind", kind, KINDS)
    _check_shape_parameters(a, b)
    wide = w.to(accumulate_dtype(w.dtype))
    ratio = wide / a
    bound = _bound(kind)
    if w.numel():
        inside = (ratio.detach().abs() < bound).all()
        check_values(inside, lambda: f"w must be below the bound, {bound:.6g} times a, in size")
    inverse: Tensor = b * (torch.tan(ratio) if kind == "arctan" else torch.atanh(ratio))
    return inverse.to(w.dtype)


class WeightCompander(nn.Module):
    r"""The parametrization of a weight by :func:`compand`, with the curve's shape learned.

    .. math:: w = a\,\psi(v / b), \qquad a = e^{\alpha},\ b = e^{\beta}

    For ``torch.nn.utils.parametrize.register_parametrization``; :func:`apply_compander` does it for
    a model. The tensor that is trained is v; the layer starts at the weight it had, since v is that
    weight's inverse, and weight decay acts on v. Removing the parametrization leaves the effective
    weight.

    Args:
        weight: the weight to be represented, ``[out, *]``; it sets the defaults and is not kept.
        a: height; b when omitted, raised where needed so that the bound is 1.01 times the largest
            weight. A number that is given is raised in the same way.
        b: width; when omitted twice the standard deviation of the weight (of each channel), so that
            most entries see a slope near 1.
        learn: whether a and b are trained (as their logarithms, so they stay above 0).
        per: one a and one b for the ``"layer"`` or for each output ``"channel"`` (dimension 0).
        kind: ``"arctan"`` or ``"tanh"``.

    Raises:
        TypeError: ``weight`` is not a floating-point tensor.
        ValueError: ``weight`` is empty or not finite, or an option is out of its range.

    Example:
        >>> from torch.nn.utils import parametrize
        >>> layer = torch.nn.Linear(8, 4)
        >>> before = layer.weight.detach().clone()
        >>> compander = WeightCompander(layer.weight)
        >>> _ = parametrize.register_parametrization(layer, "weight", compander)
        >>> torch.allclose(layer.weight, before, atol=1e-6)
        True
        >>> bool((layer.weight.abs() < compander.bound).all())
        True

    Source:
        As :func:`compand`; the paper's start values are not available, these are the library's.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        a: float | None = None,
        b: float | None = None,
        learn: bool = True,
        per: Literal["layer", "channel"] = "layer",
        kind: Kind = "arctan",
    ) -> None:
        super().__init__()
        check_floating("weight", weight)
        check_one_of("per", per, ("layer", "channel"))
        check_one_of("kind", kind, KINDS)
        for name, value in (("a", a), ("b", b)):
            if value is not None:
                check_positive(name, value)
        if weight.numel() == 0 or (per == "channel" and weight.dim() < 1):
            raise ValueError(f"weight must have entries, got shape {list(weight.shape)}")
        self.kind: Kind = kind
        self.per = per
        w = weight.detach().to(accumulate_dtype(weight.dtype))
        check_values(w.isfinite().all(), lambda: "weight must be finite, got NaN or infinity")
        rows = w.reshape(1, -1) if per == "layer" else w.reshape(w.shape[0], -1)
        shape = [] if per == "layer" else [-1] + [1] * (w.dim() - 1)
        spread = rows.std(1, correction=0) if rows.shape[1] > 1 else rows.abs().amax(1)
        # A constant weight has no spread, a zero one no size either.
        spread = torch.where(spread > 0, spread, rows.abs().amax(1))
        spread = torch.where(spread > 0, spread, 1)
        width = 2 * spread if b is None else torch.full_like(spread, b)
        height = width if a is None else torch.full_like(spread, a)
        height = torch.maximum(height, MARGIN / _bound(kind) * rows.abs().amax(1))
        self.log_a = nn.Parameter(height.log().reshape(shape), requires_grad=learn)
        self.log_b = nn.Parameter(width.log().reshape(shape), requires_grad=learn)

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"kind={self.kind!r}, per={self.per!r}, learn={self.log_a.requires_grad}"

    @property
    def bound(self) -> Tensor:
        """The size that no effective weight exceeds, ``[]`` or one number a channel."""
        return _bound(self.kind) * self.log_a.detach().exp()

    def forward(self, v: Tensor) -> Tensor:
        """Return the effective weight."""
        wide = accumulate_dtype(v.dtype)  # the module may have been moved to a half type
        return _curve(v, self.log_a.to(wide).exp(), self.log_b.to(wide).exp(), self.kind)

    def right_inverse(self, w: Tensor) -> Tensor:
        """Return the tensor to train that stands for ``w``; the bound is raised if ``w`` needs it.

        Raises:
            ValueError: ``w`` is not finite.
        """
        with torch.no_grad():
            check_values(w.isfinite().all(), lambda: "weight must be finite, got NaN or infinity")
            rows = w.reshape(1, -1) if self.per == "layer" else w.reshape(w.shape[0], -1)
            least = MARGIN / _bound(self.kind) * rows.abs().amax(1).to(self.log_a.dtype)
            self.log_a.copy_(torch.maximum(self.log_a, least.log().reshape(self.log_a.shape)))
            wide = accumulate_dtype(w.dtype)
            a, b = self.log_a.to(wide).exp(), self.log_b.to(wide).exp()
            return compand_inverse(w, a, b, kind=self.kind)


def apply_compander(
    model: nn.Module,
    *,
    types: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d),
    skip: Iterable[str] = (),
    a: float | None = None,
    b: float | None = None,
    learn: bool = True,
    per: Literal["layer", "channel"] = "layer",
    kind: Kind = "arctan",
) -> nn.Module:
    """Put a :class:`WeightCompander` on the weight of every layer of some types, in place.

    Biases, norms and layers that have one already are left. Build the optimizer afterwards, with
    :func:`compander_params`: the weights are other parameters now, ``parametrizations.weight``.

    Args:
        model: any module.
        types: the layers to change.
        skip: qualified names of layers to leave, as in ``model.named_modules()``.
        a: as for :class:`WeightCompander`.
        b: as for :class:`WeightCompander`.
        learn: as for :class:`WeightCompander`.
        per: as for :class:`WeightCompander`.
        kind: as for :class:`WeightCompander`.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module, or a weight is not floating-point.
        ValueError: no layer is of the types, ``skip`` names something else, a weight is tied to
            another parameter of the model (companding it would untie them), or an option is out of
            its range. Nothing is changed.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> _ = apply_compander(model, skip=["1"])
        >>> [name for name, _ in model.named_parameters() if "log" in name]
        ['0.parametrizations.weight.0.log_a', '0.parametrizations.weight.0.log_b']

    Source:
        As :func:`compand`.
    """
    check_module("model", model)
    skipped = set([skip] if isinstance(skip, str) else skip)
    names = {name for name, _ in model.named_modules()}
    if skipped - names:
        raise ValueError(f"skip must name modules of the model, got {sorted(skipped - names)}")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, types)
        and name not in skipped
        and not parametrize.is_parametrized(module, "weight")
    }
    if not layers:
        raise ValueError(f"model must have a layer of {types} to compand, got none")
    places: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append(f"{module_name}.{name}")
    companders: list[tuple[nn.Module, WeightCompander]] = []
    for module in layers.values():
        weight: Any = module.weight
        check_floating("weight", weight)
        if len(places[id(weight)]) > 1:
            raise ValueError(f"skip must name tied layers, got {places[id(weight)]} untouched")
        compander = WeightCompander(weight, a=a, b=b, learn=learn, per=per, kind=kind)
        companders.append((module, compander))
    for module, compander in companders:
        parametrize.register_parametrization(module, "weight", compander)
    return model


def compander_params(model: nn.Module, *, lr: float | None = None) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer: a and b of every compander without weight decay.

    Args:
        model: a model with :class:`WeightCompander` in it.
        lr: learning rate of a and b; the optimizer's own when omitted.

    Returns:
        Two groups: all other parameters; and the shapes, with ``weight_decay=0``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no compander in it, or ``lr`` is not above 0.

    Example:
        >>> model = apply_compander(torch.nn.Linear(8, 4))
        >>> optimizer = torch.optim.AdamW(compander_params(model, lr=1e-4), weight_decay=0.1)
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(2, 0.1), (2, 0.0)]

    Source:
        As :func:`compand`.
    """
    check_module("model", model)
    if lr is not None:
        check_positive("lr", lr)
    companders = [m for m in model.modules() if isinstance(m, WeightCompander)]
    if not companders:
        raise ValueError("model must have a WeightCompander, got none")
    shapes = [p for compander in companders for p in compander.parameters()]
    known = {id(p) for p in shapes}
    others = [p for p in model.parameters() if id(p) not in known]
    group: dict[str, Any] = {"params": shapes, "weight_decay": 0.0}
    if lr is not None:
        group["lr"] = lr
    return [{"params": others}, group]


def _bound(kind: str) -> float:
    return math.pi / 2 if kind == "arctan" else 1.0


def _curve(v: Tensor, a: float | Tensor, b: float | Tensor, kind: str) -> Tensor:
    wide = v.to(accumulate_dtype(v.dtype))
    curve = torch.arctan if kind == "arctan" else torch.tanh
    companded: Tensor = a * curve(wide / b)
    return companded.to(v.dtype)


def _check_shape_parameters(a: float | Tensor, b: float | Tensor) -> None:
    for name, value in (("a", a), ("b", b)):
        if isinstance(value, Tensor):
            values = known_range(value.detach())
            if values is not None and not values[0] > 0:
                raise ValueError(f"{name} must be above 0, got {values[0]}")
        else:
            check_positive(name, value)
