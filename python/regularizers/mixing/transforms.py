"""Differentiable image transforms with one strength a sample: what an adversary composes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import check_floating, check_same_device, check_shape

Transform = Callable[..., Tensor]


class TransformFamily(nn.Module):
    r"""A transform with a range of strengths.

    .. math:: T(x; \sigma), \qquad \sigma_i \sim U(\text{low}, \text{high}) \text{ for each sample}

    Args:
        name: shown in errors and plots.
        fn: ``fn(x, strength)`` with ``x [B, *]`` and ``strength [B]``, differentiable in ``x``; for
            random transforms ``fn(x, strength, generator)``. It must keep the shape, and treat
            every sample for itself.
        strength_range: (low, high), with low at most high.
        random: whether ``fn`` draws, and takes a generator.

    Shape:
        ``[B, *]`` to the same; ``strength [B]`` is drawn when omitted.

    Raises:
        TypeError: ``fn`` is not callable or ``x`` no floating-point tensor.
        ValueError: the range is empty or not finite; ``fn`` changed the shape.

    Example:
        >>> gain = TransformFamily("gain", lambda x, s: x * s[:, None], (0.5, 2.0))
        >>> gain(torch.ones(2, 3), torch.tensor([0.5, 2.0]))
        tensor([[0.5000, 0.5000, 0.5000],
                [2.0000, 2.0000, 2.0000]])

    Source:
        Compositional adversarial training (2026, arXiv 2605.16720); the interface is ours.
    """

    def __init__(
        self,
        name: str,
        fn: Transform,
        strength_range: tuple[float, float],
        *,
        random: bool = False,
    ) -> None:
        super().__init__()
        if not callable(fn):
            raise TypeError(f"fn must be callable, got {type(fn).__name__}")
        low, high = strength_range
        if not -float("inf") < low <= high < float("inf"):
            raise ValueError(f"strength_range must be finite and ascending, got {strength_range}")
        self.name = name
        self.fn = fn
        self.low, self.high = float(low), float(high)
        self.random = random

    def draw_strength(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw one strength a sample of ``x``, uniformly: ``[B]``."""
        share = torch.rand(x.shape[0], generator=generator, device=x.device)
        return self.strength(share.to(x.dtype))

    def strength(self, share: Tensor) -> Tensor:
        """Return the strength that lies at ``share`` in [0, 1] of the range."""
        return self.low + (self.high - self.low) * share

    def forward(
        self,
        x: Tensor,
        strength: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Transform ``x``."""
        check_floating("x", x)
        if strength is None:
            strength = self.draw_strength(x, generator)
        check_shape("strength", strength, (x.shape[0],), "[batch of x]")
        check_same_device("strength", strength, "x", x)
        arguments: tuple[Any, ...] = (generator,) if self.random else ()
        result: Tensor = self.fn(x, strength, *arguments)
        if result.shape != x.shape:
            raise ValueError(
                f"fn of family {self.name!r} must keep the shape {list(x.shape)}, "
                f"got {list(result.shape)}"
            )
        return result

    def extra_repr(self) -> str:
        """Name the family and its range."""
        return f"{self.name!r}, strength_range=({self.low:g}, {self.high:g})"


def default_families() -> list[TransformFamily]:
    """Make the default suite of attacks on images ``[B, C, H, W]`` with values in [0, 1].

    Strengths are mild to strong in the sense that a person still recognises the image; none of the
    results is clamped to [0, 1].

    ================== ============ ===============================================================
    family             strength     what it does
    ================== ============ ===============================================================
    identity           -            nothing
    brightness         0.5 to 1.5   factor of all values
    contrast           0.5 to 1.5   factor of the distance to the mean grey
    saturation         0 to 2       factor of the distance to the grey image
    gaussian_blur      0.3 to 2     standard deviation in pixels
    gaussian_noise     0 to 0.1     standard deviation
    resize             0.3 to 1     scale of the smaller image, which is enlarged again
    crop               0.6 to 1     side of a random crop, which is enlarged again
    rotation           -15 to 15    degrees; corners are black
    horizontal_flip    -            left becomes right
    jpeg               20 to 95     quality; rounding passes its gradient straight through
    masking            0.05 to 0.5  share of the 8 x 8 cells of the image that turn black
    ================== ============ ===============================================================

    Returns:
        A list of :class:`TransformFamily`.

    Example:
        >>> families = default_families()
        >>> [family.name for family in families][:4]
        ['identity', 'brightness', 'contrast', 'saturation']
        >>> families[10](torch.rand(2, 3, 20, 30)).shape
        torch.Size([2, 3, 20, 30])

    Source:
        Compositional adversarial training (2026, arXiv 2605.16720) names the families; the ranges
        are reconstructed.
    """
    return [
        TransformFamily("identity", _identity, (0.0, 0.0)),
        TransformFamily("brightness", _brightness, (0.5, 1.5)),
        TransformFamily("contrast", _contrast, (0.5, 1.5)),
        TransformFamily("saturation", _saturation, (0.0, 2.0)),
        TransformFamily("gaussian_blur", _gaussian_blur, (0.3, 2.0)),
        TransformFamily("gaussian_noise", _gaussian_noise, (0.0, 0.1), random=True),
        TransformFamily("resize", _resize, (0.3, 1.0)),
        TransformFamily("crop", _crop, (0.6, 1.0), random=True),
        TransformFamily("rotation", _rotation, (-15.0, 15.0)),
        TransformFamily("horizontal_flip", _flip, (0.0, 0.0)),
        TransformFamily("jpeg", _jpeg, (20.0, 95.0)),
        TransformFamily("masking", _masking, (0.05, 0.5), random=True),
    ]


def _per_image(strength: Tensor) -> Tensor:
    return strength[:, None, None, None]


def _grey(x: Tensor) -> Tensor:
    """Return the grey image [B, 1, H, W]: Rec. 601 for three channels, else their mean."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return torch.einsum("bchw,c->bhw", x, x.new_tensor([0.299, 0.587, 0.114]))[:, None]


def _identity(x: Tensor, strength: Tensor) -> Tensor:
    return x


def _flip(x: Tensor, strength: Tensor) -> Tensor:
    return x.flip(-1)


def _brightness(x: Tensor, strength: Tensor) -> Tensor:
    return x * _per_image(strength)


def _contrast(x: Tensor, strength: Tensor) -> Tensor:
    mean = _grey(x).mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * _per_image(strength)


def _saturation(x: Tensor, strength: Tensor) -> Tensor:
    grey = _grey(x)
    return grey + (x - grey) * _per_image(strength)


def _along_sides(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply matrices [B, H, H] and [B, W, W] to the sides of each image."""
    return rows[:, None] @ x @ columns[:, None].mT


def _gaussian_blur(x: Tensor, strength: Tensor) -> Tensor:
    def matrix(size: int) -> Tensor:
        at = torch.arange(size, device=x.device, dtype=x.dtype)
        square = (at[:, None] - at).square() / (2 * strength.square()[:, None, None])
        return (-square).softmax(-1)  # what lies outside of the image has no say

    return _along_sides(x, matrix(x.shape[-2]), matrix(x.shape[-1]))


def _gaussian_noise(x: Tensor, strength: Tensor, generator: torch.Generator | None) -> Tensor:
    noise = torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype)
    return x + noise * _per_image(strength)


def _resize(x: Tensor, strength: Tensor) -> Tensor:
    """Reduce with a triangle filter to ``strength`` of the size, and enlarge bilinearly.

    As matrices of one size, so that every sample has a scale of its own, with a derivative.
    """

    def matrix(size: int) -> Tensor:
        scale = strength[:, None, None]
        at = torch.arange(size, device=x.device, dtype=x.dtype)
        # Pixel i lies at (i + 1/2) s in the smaller image, its pixel k at k + 1/2.
        distance = ((at + 0.5) * scale - (at[:, None] + 0.5)).abs()  # [B, k, i]
        exists = at[:, None] + 0.5 < scale * size + 0.5
        triangle = torch.where(exists, (1 - distance).clamp(min=0), 0)
        reduce = triangle / triangle.sum(-1, keepdim=True).clamp(min=1e-6)
        enlarge = triangle / triangle.sum(-2, keepdim=True).clamp(min=1e-6)
        return enlarge.mT @ reduce

    return _along_sides(x, matrix(x.shape[-2]), matrix(x.shape[-1]))


def _sample_at(x: Tensor, matrix: Tensor, padding: str) -> Tensor:
    """Sample each image where the affine map [B, 2, 3] of the square [-1, 1]^2 sends its pixels."""
    grid = F.affine_grid(matrix.to(x.dtype), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode=padding, align_corners=False)


def _crop(x: Tensor, strength: Tensor, generator: torch.Generator | None) -> Tensor:
    place = torch.rand(2, x.shape[0], generator=generator, device=x.device).to(x.dtype)
    right, down = (2 * place - 1) * (1 - strength)
    zero = torch.zeros_like(strength)
    rows = torch.stack([strength, zero, right, zero, strength, down], -1)
    return _sample_at(x, rows.unflatten(-1, (2, 3)), "border")


def _rotation(x: Tensor, strength: Tensor) -> Tensor:
    angle = torch.deg2rad(strength)
    cosine, sine, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    ratio = x.shape[-2] / x.shape[-1]  # a rotation of the plane, not of the unit square
    rows = torch.stack([cosine, -sine * ratio, zero, sine / ratio, cosine, zero], -1)
    return _sample_at(x, rows.unflatten(-1, (2, 3)), "zeros")


def _masking(x: Tensor, strength: Tensor, generator: torch.Generator | None) -> Tensor:
    cells = torch.rand(x.shape[0], 1, 8, 8, generator=generator, device=x.device).to(x.dtype)
    keep = (cells >= _per_image(strength)).to(x.dtype)
    return x * F.interpolate(keep, x.shape[-2:], mode="nearest")


# Annex K of the JPEG standard.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
_TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))
# The orthonormal cosine transform of 8 numbers.
_COSINES = tuple(
    tuple(math.cos((at + 0.5) * k * math.pi / 8) * (0.5 if k else 8**-0.5) for at in range(8))
    for k in range(8)
)


def _jpeg(x: Tensor, strength: Tensor) -> Tensor:
    """Quantize the cosine transform of 8 x 8 blocks as JPEG does, without chroma subsampling."""
    height, width = x.shape[-2:]
    color = x.shape[1] == 3
    planes = torch.einsum("bchw,dc->bdhw", x, x.new_tensor(_TO_YCBCR)) if color else x
    # Levels about 0; the chroma of three channels is already.
    shift = 255 * x.new_tensor([0.5, 0.0, 0.0] if color else [0.5] * x.shape[1])[:, None, None]
    planes = F.pad(255 * planes - shift, (0, -width % 8, 0, -height % 8), mode="replicate")
    blocks = planes.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-3, -2)
    cosines = x.new_tensor(_COSINES)
    table = x.new_tensor([_LUMINANCE, _CHROMINANCE, _CHROMINANCE] if color else [_LUMINANCE])
    percent = torch.where(strength < 50, 5000 / strength, 200 - 2 * strength)
    step = (table * percent[:, None, None, None] / 100).clamp(1, 255)[:, :, None, None]
    levels = cosines @ blocks @ cosines.mT / step
    levels = levels + (levels.round() - levels).detach()
    blocks = cosines.mT @ (levels * step) @ cosines
    planes = blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2)[..., :height, :width]
    planes = (planes + shift) / 255
    return torch.einsum("bchw,dc->bdhw", planes, x.new_tensor(_TO_RGB)) if color else planes
