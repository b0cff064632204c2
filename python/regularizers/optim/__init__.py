"""Optimizers and decays that regularize through the update itself."""

from regularizers.optim.adamhd import AdamHD, HuberDecay, huber_penalty
from regularizers.optim.backslash import BackSlash, rate_penalty
from regularizers.optim.base import DecoupledOptimizer
from regularizers.optim.code_length import entropy_bits, exp_golomb_bits
from regularizers.optim.decay import (
    WeightDecayScheduler,
    delta_decay_,
    huber_decay_,
    l1_decay_,
    l2_decay_,
)
from regularizers.optim.deepshape import deepshape_
from regularizers.optim.generalized_gaussian import (
    GeneralizedGaussian,
    estimate_shape,
    gg_init_,
)
from regularizers.optim.minifloat import RF8, MiniFloat

__all__ = [
    "RF8",
    "AdamHD",
    "BackSlash",
    "DecoupledOptimizer",
    "GeneralizedGaussian",
    "HuberDecay",
    "MiniFloat",
    "WeightDecayScheduler",
    "deepshape_",
    "delta_decay_",
    "entropy_bits",
    "estimate_shape",
    "exp_golomb_bits",
    "gg_init_",
    "huber_decay_",
    "huber_penalty",
    "l1_decay_",
    "l2_decay_",
    "rate_penalty",
]
