"""Attention over places and over channels of a feature map, and a learned blend of both."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from regularizers._shared.checks import check_at_least, check_floating, check_shape


def _check_image(x: Tensor, channels: int) -> None:
    check_floating("x", x)
    check_shape("x", x, (None, channels, None, None), "[batch, channels, height, width]")


def _reduced(channels: int, reduction: int) -> int:
    check_at_least("channels", channels, 1)
    check_at_least("reduction", reduction, 1)
    if channels // reduction < 1:
        raise ValueError(f"reduction must be at most channels = {channels}, got {reduction}")
    return channels // reduction


class CoordinateAttention2d(nn.Module):
    r"""Scale a feature map by a gate for each row and one for each column.

    .. math::
        [h; w] = \mathrm{ReLU}(\mathrm{BN}(W_1 [\bar x^{(W)}; \bar x^{(H)}])), \qquad
        y = x \odot \sigma(W_h h) \odot \sigma(W_w w)

    with means over the width and over the height, laid end to end along H + W. No layer has a bias.

    Args:
        channels: C.
        reduction: the hidden layer has C // reduction channels.

    Shape:
        ``[B, C, H, W]`` to the same.

    Raises:
        ValueError: ``channels // reduction`` is below 1, or ``x`` has another shape.
        TypeError: an argument is of the wrong type.

    Example:
        >>> CoordinateAttention2d(16)(torch.randn(2, 16, 8, 6)).shape
        torch.Size([2, 16, 8, 6])

    Source:
        arXiv 2510.15527, after Q. Hou, D. Zhou, J. Feng, 2021, arXiv 2103.02907; layers of the
        public model file of the former.
    """

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        hidden = _reduced(channels, reduction)
        self.channels = channels
        self.squeeze = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.rows = nn.Conv2d(hidden, channels, 1, bias=False)
        self.columns = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled feature map."""
        _check_image(x, self.channels)
        sides = [x.shape[2], x.shape[3]]
        means = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)], dim=2)
        rows, columns = self.norm(self.squeeze(means)).relu().split(sides, dim=2)
        gates: Tensor = self.rows(rows).sigmoid() * self.columns(columns).sigmoid().transpose(2, 3)
        return x * gates


class SqueezeExcitation2d(nn.Module):
    r"""Scale a feature map by a gate for each channel.

    .. math:: y = x \odot \sigma(W_2\, \mathrm{ReLU}(W_1 \bar x))

    with the mean over all pixels. No layer has a bias; torchvision's ``SqueezeExcitation`` has
    them.

    Args:
        channels: C.
        reduction: the hidden layer has C // reduction channels.

    Shape:
        ``[B, C, H, W]`` to the same.

    Raises:
        ValueError: ``channels // reduction`` is below 1, or ``x`` has another shape.
        TypeError: an argument is of the wrong type.

    Example:
        >>> SqueezeExcitation2d(32)(torch.randn(2, 32, 8, 6)).shape
        torch.Size([2, 32, 8, 6])

    Source:
        arXiv 2510.15527, after J. Hu, L. Shen, G. Sun, 2017, arXiv 1709.01507; layers of the public
        model file of the former.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = _reduced(channels, reduction)
        self.channels = channels
        self.squeeze = nn.Linear(channels, hidden, bias=False)
        self.excite = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled feature map."""
        _check_image(x, self.channels)
        gates: Tensor = self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()
        return x * gates[:, :, None, None]


class BalancedAttention2d(nn.Module):
    r"""Blend coordinate attention and squeeze-and-excitation with one learned weight.

    .. math:: y = \alpha\, \mathrm{coord}(x) + (1 - \alpha)\, \mathrm{se}(x), \qquad
        \alpha = \sigma(raw)

    Args:
        channels: C, at least 16.
        init: raw at the beginning; 0.5 gives alpha = 0.62. The paper ends at alpha = 0.57.
        coordinate_reduction: as ``reduction`` of :class:`CoordinateAttention2d`.
        excitation_reduction: as ``reduction`` of :class:`SqueezeExcitation2d`.

    Shape:
        ``[B, C, H, W]`` to the same.

    Raises:
        ValueError: a hidden layer would have no channel, or ``init`` is not finite.
        TypeError: an argument is of the wrong type.

    Example:
        >>> layer = BalancedAttention2d(16)
        >>> round(layer.alpha.item(), 4)
        0.6225

    Source:
        arXiv 2510.15527; formulas from the public model file.
    """

    def __init__(
        self,
        channels: int,
        *,
        init: float = 0.5,
        coordinate_reduction: int = 8,
        excitation_reduction: int = 16,
    ) -> None:
        super().__init__()
        if not math.isfinite(init):
            raise ValueError(f"init must be finite, got {init}")
        self.coordinate = CoordinateAttention2d(channels, coordinate_reduction)
        self.excitation = SqueezeExcitation2d(channels, excitation_reduction)
        self.raw = nn.Parameter(torch.tensor(float(init)))

    @property
    def alpha(self) -> Tensor:
        """Weight of coordinate attention, in [0, 1]."""
        return self.raw.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Return the blend."""
        excited: Tensor = self.excitation(x)
        return torch.lerp(excited, self.coordinate(x), self.alpha.to(excited.dtype))
