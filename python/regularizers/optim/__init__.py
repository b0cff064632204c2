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
from regularizers.optim.soma import SoMALinear, WeightDecayAnnealing, inject_soma

__all__ = [
    "ALLoRALinear",
    "AdamHD",
    "DecoupledOptimizer",
    "HuberDecay",
    "LowRankLinear",
    "SoMALinear",
    "WeightDecayAnnealing",
    "WeightDecayScheduler",
    "delta_decay_",
    "huber_decay_",
    "huber_penalty",
    "inject_allora",
    "inject_low_rank",
    "inject_soma",
    "l1_decay_",
    "l2_decay_",
    "merge_low_rank",
    "scale_gradient",
    "scale_updates",
]
