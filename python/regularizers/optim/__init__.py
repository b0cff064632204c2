"""Optimizers and decays that regularize through the update itself."""

from regularizers.optim.adamhd import AdamHD, HuberDecay, huber_penalty
from regularizers.optim.allora import (
    ALLoRALinear,
    inject_allora,
    scale_gradient,
    scale_updates,
)
from regularizers.optim.base import DecoupledOptimizer
from regularizers.optim.decay import (
    WeightDecayScheduler,
    delta_decay_,
    huber_decay_,
    l1_decay_,
    l2_decay_,
)
from regularizers.optim.lowrank import LowRankLinear, inject_low_rank, merge_low_rank

__all__ = [
    "ALLoRALinear",
    "AdamHD",
    "DecoupledOptimizer",
    "HuberDecay",
    "LowRankLinear",
    "WeightDecayScheduler",
    "delta_decay_",
    "huber_decay_",
    "huber_penalty",
    "inject_allora",
    "inject_low_rank",
    "l1_decay_",
    "l2_decay_",
    "merge_low_rank",
    "scale_gradient",
    "scale_updates",
]
