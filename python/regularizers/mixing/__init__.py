"""New training inputs mixed from old ones, and the losses that tie predictions on them together."""

from regularizers.mixing.adawac import (
    AdaptiveConsistencyWeights,
    AdaWAC,
    feature_consistency,
)
from regularizers.mixing.compositional_adversary import (
    Attack,
    CATStep,
    CompositionalAdversary,
    GradientReversal,
    bit_accuracy,
    cat_step,
    detection_rate,
    straight_through_gumbel,
    watermark_capacity,
    watermark_step,
)
from regularizers.mixing.transforms import TransformFamily, default_families

__all__ = [
    "AdaWAC",
    "AdaptiveConsistencyWeights",
    "Attack",
    "CATStep",
    "CompositionalAdversary",
    "GradientReversal",
    "TransformFamily",
    "bit_accuracy",
    "cat_step",
    "default_families",
    "detection_rate",
    "feature_consistency",
    "straight_through_gumbel",
    "watermark_capacity",
    "watermark_step",
]
