"""Weights of classes, samples and losses."""

from regularizers.weights.class_balance import class_balanced_weights

__all__ = [
    "class_balanced_weights",
]
