"""Protocols and losses of particular tasks."""

from regularizers.tasks.blind_evaluation import (
    BlindResult,
    BlindTrial,
    Estimate,
    GroupedBlindTrial,
)
from regularizers.tasks.mixture_weights import temperature_mixture_weights

__all__ = [
    "BlindResult",
    "BlindTrial",
    "Estimate",
    "GroupedBlindTrial",
    "temperature_mixture_weights",
]
