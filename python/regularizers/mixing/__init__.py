"""New training inputs mixed from old ones, and the losses that tie predictions on them together."""

from regularizers.mixing.adawac import (
    AdaptiveConsistencyWeights,
    AdaWAC,
    feature_consistency,
)

__all__ = [
    "AdaWAC",
    "AdaptiveConsistencyWeights",
    "feature_consistency",
]
