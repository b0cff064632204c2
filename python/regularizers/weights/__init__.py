"""Weights of classes, samples and losses."""

from regularizers.weights.class_balance import (
    class_balanced_weights,
)
from regularizers.weights.compander import (
    WeightCompander,
    apply_compander,
    compand,
    compand_inverse,
    compander_params,
)

__all__ = [
    "WeightCompander",
    "apply_compander",
    "class_balanced_weights",
    "compand",
    "compand_inverse",
    "compander_params",
]
