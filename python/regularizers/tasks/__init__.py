"""Protocols and losses of particular tasks."""

from regularizers.tasks.blind_evaluation import GroupedBlindTrial
from regularizers.tasks.mixture_weights import temperature_mixture_weights

__all__ = ["GroupedBlindTrial", "temperature_mixture_weights"]
