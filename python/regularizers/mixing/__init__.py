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
    cat_step,
    straight_through_gumbel,
)
from regularizers.mixing.transforms import TransformFamily, default_families
from regularizers.mixing.watermark import (
    bit_accuracy,
    detection_rate,
    watermark_capacity,
    watermark_step,
)

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
