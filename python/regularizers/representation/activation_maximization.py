"""Images that activate a unit most: normalised ascent, total-variation denoising, random crops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_module,
    check_not_negative,
    check_one_of,
    check_positive,
    check_shape,
)
from regularizers._shared.randomness import check_caller_draws
from regularizers._shared.taps import ActivationTap
from regularizers.representation.tv import tv_denoise

Objective = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Octave:
    """A stretch of the ascent at one size.

    Args:
        iterations: n, at least 1.
        step: mean absolute change of a pixel in an iteration, at least 0 and in units of the
            pixels; a number, or the values it moves between: ``s0 + (s1 - s0) i / n``.
        denoise: weight of :func:`tv_denoise` after every step, above 0, a number or the values it
            moves between; LARGER is less smoothing. None: no denoising.
        scale: the image grows by this factor first, above 0 (bilinear).
        window: spread of the random crops' offsets, as in :func:`center_crop_offset`.
        margin: width of the border of the crop, in pixels, that the step leaves alone.
        objective: what to maximise here in place of the objective of the call.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> Octave(150, step=(6.0, 1.0), denoise=0.08, scale=1.2).iterations
        150
    """

    iterations: int
    step: float | tuple[float, float]
    denoise: float | tuple[float, float] | None = None
    scale: float = 1.0
    window: float = 0.3
    margin: int = 0
    objective: Objective | None = None

    def __post_init__(self) -> None:
        check_at_least("iterations", self.iterations, 1)
        for value in _ends("step", self.step):
            check_not_negative("step", value)
        for value in () if self.denoise is None else _ends("denoise", self.denoise):
            check_positive("denoise", value)
        check_positive("scale", self.scale)
        check_not_negative("window", self.window)
        check_at_least("margin", self.margin, 0)


def _ends(name: str, value: float | tuple[float, float]) -> tuple[float, float]:
    if not isinstance(value, tuple):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name} must be a number or two, got {len(value)}")
    return value


def paper_octaves(
    mode: Literal["mean", "center"] = "mean",
    *,
    logits: Objective | None = None,
    value_range: tuple[float, float] = (0.0, 255.0),
) -> tuple[Octave, ...]:
    """Return the schedule of the paper, for a network of 227 x 227 pixels.

    Args:
        mode: ``"mean"`` starts from the mean image of a facet; ``"center"`` from noise, and draws
            one object in the middle.
        logits: for ``"center"``, the unit before the softmax, from the third octave on; the first
            two maximise the objective of the call, there the unit after the softmax.
        value_range: of the pixels. Steps and denoising are scaled to it: a weight of the denoiser
            is in units of one over a pixel's.

    Returns:
        The octaves for :func:`maximize_activation`.

    Raises:
        ValueError: ``mode`` is unknown, or ``value_range`` does not rise.

    Example:
        >>> [octave.iterations for octave in paper_octaves("mean")]
        [190, 150, 20, 10]

    Source:
        A. Nguyen, J. Yosinski, J. Clune, 2016, arXiv 1602.03616; numbers of the authors' scripts.
        Their denoiser is another (see :func:`tv_denoise`), so the weights smooth differently here.
    """
    check_one_of("mode", mode, ("mean", "center"))
    span = _span(value_range) / 255

    def octave(
        iterations: int,
        step: tuple[float, float],
        denoise: tuple[float, float],
        *,
        scale: float = 1.0,
        window: float = 0.3,
        margin: int = 0,
        objective: Objective | None = None,
    ) -> Octave:
        steps = step[0] * span, step[1] * span
        weights = denoise[0] / span, denoise[1] / span
        return Octave(iterations, steps, weights, scale, window, margin, objective)

    if mode == "mean":
        return (
            octave(190, (1, 2), (0.4, 0.4)),
            octave(150, (1, 1), (0.01, 2), scale=1.2),
            octave(20, (2, 2), (0.1, 2), window=0.2, margin=50),
            octave(10, (2, 2), (0.4, 2)),
        )
    return (
        octave(190, (11, 11), (0.001, 0.05)),
        octave(150, (6, 6), (0.01, 0.08), scale=1.2),
        octave(150, (1, 1), (0.01, 2), scale=1.2, objective=logits),
        octave(30, (3, 3), (0.1, 2), window=0.1, margin=50, objective=logits),
        octave(10, (6, 3), (0.01, 2), objective=logits),
    )


def _span(value_range: tuple[float, float]) -> float:
    low, high = value_range
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"value_range must be finite and rising, got {value_range}")
    return high - low


def maximize_activation(
    objective: Objective,
    init: Tensor,
    octaves: Sequence[Octave],
    *,
    value_range: tuple[float, float] = (0.0, 1.0),
    crop: tuple[int, int] | None = None,
    match_reference: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Change images until they activate a unit, and keep them smooth.

    .. math::
        x \leftarrow \operatorname{clip}\big(x + s\, g \,/ \operatorname{mean} |g|\big), \qquad
        x \leftarrow \operatorname{argmin}_u \mathrm{TV}(u) + w \|u - x\|^2, \qquad
        g = \nabla_x \mathrm{objective}(x)

    Every image is optimised by itself. With ``crop`` an iteration sees a random crop of each image
    (:func:`center_crop_offset`), and changes that crop alone. The denoising is a proximal step, not
    a term of the objective. An image whose gradient is 0 throughout takes no step.

    Args:
        objective: from ``[B, C, h, w]`` to one number an image, ``[B]``;
            :class:`UnitActivation` for a unit of a network. If it is a module, it runs in
            evaluation mode, and every part of it gets its mode back afterwards. Parameters get no
            gradient.
        init: ``[B, C, H, W]``; the mean images of facets, or noise. Not changed.
        octaves: what happens, one after the other; :func:`paper_octaves` has the paper's.
        value_range: pixels stay within.
        crop: height and width of the crops, what the network expects; None: the whole image.
        match_reference: interpolate the denoiser's weight as the authors' scripts do, where a
            misplaced bracket makes it d0 (1 - 1 / n) + d1 i / n, so that a constant weight doubles
            over an octave.
        generator: of the crops, on any device; drawn on the host's default one when omitted.

    Returns:
        ``[B, C, H', W']``, dtype of ``init``; larger by the product of the octaves' scales.

    Raises:
        TypeError: ``init`` is not floating-point, or an octave is none.
        ValueError: an argument is out of range or of the wrong shape, a crop is larger than the
            image in some octave, a margin leaves nothing of the crop, or the objective does not
            return ``[B]``. NaN in a gradient gives a NaN image.

    Example:
        >>> template = torch.rand(1, 8, 8)
        >>> def match(x):
        ...     return (x * template).sum((1, 2, 3)) / x.flatten(1).norm(dim=1)
        >>> start = torch.full((1, 1, 8, 8), 0.5)
        >>> image = maximize_activation(match, start, [Octave(50, 0.05, denoise=50.0)])
        >>> bool(match(image) > match(start))
        True

    Source:
        A. Nguyen, J. Yosinski, J. Clune, "Multifaceted Feature Visualization: Uncovering the
        Different Types of Features Learned By Each Neuron in Deep Neural Networks", 2016, arXiv
        1602.03616, authors' scripts read. Images grow bilinearly (there: by a cubic spline).
    """
    check_floating("init", init)
    check_shape("init", init, (None, None, None, None), "[batch, channels, height, width]")
    _span(value_range)
    if generator is not None:
        check_caller_draws(generator)
    _check_sizes(octaves, init, crop)
    image = init.detach().clone()
    with _evaluating([objective, *(octave.objective for octave in octaves)]):
        for octave in octaves:
            if octave.scale != 1:
                size = _grown(image, octave.scale)
                image = F.interpolate(image, size, mode="bilinear", align_corners=False)
            for i in range(octave.iterations):
                offsets = _offsets(image, crop, octave.window, generator)
                _ascend(objective, image, octave, i, offsets, crop, value_range, match_reference)
    return image


def _grown(image: Tensor, scale: float) -> tuple[int, int]:
    return round(image.shape[2] * scale), round(image.shape[3] * scale)


def _check_sizes(octaves: Sequence[Octave], init: Tensor, crop: tuple[int, int] | None) -> None:
    size = init.shape[2], init.shape[3]
    for octave in octaves:
        if not isinstance(octave, Octave):
            raise TypeError(f"octaves must hold Octave, got {type(octave).__name__}")
        if octave.scale != 1:
            size = round(size[0] * octave.scale), round(size[1] * octave.scale)
        seen = size if crop is None else crop
        if min(seen) < 1 or seen[0] > size[0] or seen[1] > size[1]:
            raise ValueError(f"crop must lie within the image of {size} pixels, got {seen}")
        if 2 * octave.margin >= min(seen):
            raise ValueError(
                f"margin must be below half of the crop of {seen} pixels, got {octave.margin}"
            )


@contextmanager
def _evaluating(objectives: Sequence[Objective | None]) -> Iterator[None]:
    modules = [objective for objective in objectives if isinstance(objective, nn.Module)]
    modes = {part: part.training for module in modules for part in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _offsets(
    image: Tensor, crop: tuple[int, int] | None, window: float, generator: torch.Generator | None
) -> list[tuple[int, int]]:
    if crop is None:
        return [(0, 0)] * len(image)
    size = image.shape[2], image.shape[3]
    return [center_crop_offset(size, crop, window=window, generator=generator) for _ in image]


def _ascend(
    objective: Objective,
    image: Tensor,
    octave: Octave,
    i: int,
    offsets: list[tuple[int, int]],
    crop: tuple[int, int] | None,
    value_range: tuple[float, float],
    match_reference: bool,
) -> None:
    """Do iteration i of an octave on ``image``, in place."""
    height, width = image.shape[2:] if crop is None else crop
    windows = [
        one[:, y : y + height, x : x + width] for one, (y, x) in zip(image, offsets, strict=True)
    ]
    seen = torch.stack(windows)
    gradient = _gradient(octave.objective or objective, seen)
    if octave.margin > 0:
        inner = slice(octave.margin, -octave.margin)
        kept = torch.zeros_like(gradient)
        kept[..., inner, inner] = gradient[..., inner, inner]
        gradient = kept
    mean = gradient.abs().mean((1, 2, 3), keepdim=True)
    direction = gradient / mean.where(mean != 0, 1.0)
    changed = (seen + _at(_ends("step", octave.step), i, octave) * direction).clamp(*value_range)
    if octave.denoise is not None:
        first, last = _ends("denoise", octave.denoise)
        weight = _at((first, last), i, octave)
        if match_reference:
            weight = first * (1 - 1 / octave.iterations) + last * i / octave.iterations
        changed = tv_denoise(changed, weight=weight).clamp_(*value_range)
    for target, source in zip(windows, changed, strict=True):
        target.copy_(source)


def _at(ends: tuple[float, float], i: int, octave: Octave) -> float:
    return ends[0] + (ends[1] - ends[0]) * i / octave.iterations


def _gradient(objective: Objective, images: Tensor) -> Tensor:
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        values = objective(leaf)
        if values.shape != leaf.shape[:1]:
            raise ValueError(
                f"objective must return one number an image, [{len(leaf)}], "
                f"got shape {list(values.shape)}"
            )
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return gradient


class UnitActivation(nn.Module):
    r"""What a unit of a network says of images: an objective for :func:`maximize_activation`.

    .. math:: \mathrm{objective}(x)_b = h_{\mathrm{name}}(x_b)_{\mathrm{unit}}

    Args:
        model: the network.
        name: qualified name of one of its submodules, as ``model.named_modules()`` gives it;
            ``""`` for the network itself.
        unit: index of the unit, or of the channel of a map, whose central place is taken then.

    Shape:
        What ``model`` takes, to ``[B]``; the submodule returns ``[B, units]`` or
        ``[B, units, h, w]``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``name`` is unknown, the submodule returns something else, or has no such unit.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
        >>> images = torch.randn(2, 1, 6, 6)
        >>> bool((UnitActivation(model, "3", 7)(images) == model(images)[:, 7]).all())
        True
        >>> UnitActivation(model, "0", 2)(images).shape
        torch.Size([2])

    Source:
        The units that arXiv 1602.03616 draws: of the classifier, and centres of hidden maps.
    """

    def __init__(self, model: nn.Module, name: str, unit: int) -> None:
        super().__init__()
        check_module("model", model)
        check_at_least("unit", unit, 0)
        if name not in dict(model.named_modules()):
            raise ValueError(f"name must name a submodule of the model, got {name!r}")
        self.model = model
        self.name = name
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        """Run the network and return the unit's activation for every image."""
        with ActivationTap(self.model, [self.name]) as tap:
            self.model(x)
        outputs = tap[self.name]
        if outputs.dim() not in (2, 4) or outputs.shape[1] <= self.unit:
            raise ValueError(
                f"name must be of a layer that returns [B, units > {self.unit}] or "
                f"[B, units, h, w], got {list(outputs.shape)} from {self.name!r}"
            )
        if outputs.dim() == 4:
            outputs = outputs[:, :, outputs.shape[2] // 2, outputs.shape[3] // 2]
        return outputs[:, self.unit]

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return f"name={self.name!r}, unit={self.unit}"


def center_crop_offset(
    size: tuple[int, int],
    crop: tuple[int, int],
    *,
    window: float,
    generator: torch.Generator | None = None,
) -> tuple[int, int]:
    r"""Draw the corner of a crop that is often near the middle of an image.

    .. math:: o \sim N\big(\tfrac{S - c}{2}, ((S - c)\, \mathrm{window})^2\big)

    cut off to an integer and clipped to [0, S - c], for both axes.

    Args:
        size: S, height and width of the image.
        crop: c, height and width of the crop, at most S.
        window: standard deviation over the room to move, at least 0; 0 for the middle.
        generator: to draw from, on any device.

    Returns:
        The row and the column of the crop's first pixel.

    Raises:
        ValueError: the crop is larger than the image or empty, or ``window`` is negative.

    Example:
        >>> center_crop_offset((300, 240), (227, 227), window=0.0)
        (36, 6)

    Source:
        arXiv 1602.03616, authors' scripts.
    """
    check_not_negative("window", window)
    if min(crop) < 1 or crop[0] > size[0] or crop[1] > size[1]:
        raise ValueError(f"crop must lie within the image of {tuple(size)} pixels, got {crop}")
    device = "cpu" if generator is None else generator.device
    draws = torch.randn(2, generator=generator, device=device, dtype=torch.float64).tolist()
    y, x = (
        min(max(int(room / 2 + room * window * draw), 0), room)
        for room, draw in zip((size[0] - crop[0], size[1] - crop[1]), draws, strict=True)
    )
    return y, x
