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
from regularizers.optim.generalized_gaussian import (
    GeneralizedGaussian,
    estimate_shape,
    gg_init_,
)

__all__ = [
    "AdamHD",
    "DecoupledOptimizer",
    "GeneralizedGaussian",
    "HuberDecay",
    "WeightDecayScheduler",
    "delta_decay_",
    "estimate_shape",
    "gg_init_",
    "huber_decay_",
    "huber_penalty",
    "l1_decay_",
    "l2_decay_",
]
