"""Methods on what a network's features look like: self-supervision, attention, collapse."""

from regularizers.representation.attention import (
    BalancedAttention2d,
    CoordinateAttention2d,
    SqueezeExcitation2d,
)

__all__ = [
    "BalancedAttention2d",
    "CoordinateAttention2d",
    "SqueezeExcitation2d",
]
