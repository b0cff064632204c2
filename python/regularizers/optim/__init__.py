"""Optimizers and decays that regularize through the update itself."""

from regularizers.optim.adamhd import AdamHD, HuberDecay, huber_penalty
from regularizers.optim.base import DecoupledOptimizer
from regularizers.optim.decay import (
    WeightDecayScheduler,
    delta_decay_,
    huber_decay_,
    l1_decay_,
    l2_decay_,
)

__all__ = [
    "AdamHD",
    "DecoupledOptimizer",
    "HuberDecay",
    "WeightDecayScheduler",
    "delta_decay_",
    "huber_decay_",
    "huber_penalty",
    "l1_decay_",
    "l2_decay_",
]
