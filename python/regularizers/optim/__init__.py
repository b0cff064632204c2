"""Optimizers and decays that regularize through the update itself."""

from regularizers.optim.adamhd import AdamHD, HuberDecay, huber_penalty
from regularizers.optim.adamr import AdamR
from regularizers.optim.allora import (
    ALLoRALinear,
    inject_allora,
    scale_gradient,
    scale_updates,
)
from regularizers.optim.base import DecoupledOptimizer
from regularizers.optim.darex import (
    ActivationMean,
    darex,
    drop_delta,
    importance_mask,
    output_change,
)
from regularizers.optim.decay import (
    WeightDecayScheduler,
    delta_decay_,
    huber_decay_,
    l1_decay_,
    l2_decay_,
)
from regularizers.optim.delta import StateDelta
from regularizers.optim.delta_scale import (
    analytic_layer_q,
    analytic_q,
    learn_q,
    mse_q,
    search_q,
    seeded_score,
)
from regularizers.optim.lowrank import LowRankLinear, inject_low_rank, merge_low_rank
from regularizers.optim.soma import SoMALinear, WeightDecayAnnealing, inject_soma

__all__ = [
    "ALLoRALinear",
    "ActivationMean",
    "AdamHD",
    "AdamR",
    "DecoupledOptimizer",
    "HuberDecay",
    "LowRankLinear",
    "SoMALinear",
    "StateDelta",
    "WeightDecayAnnealing",
    "WeightDecayScheduler",
    "analytic_layer_q",
    "analytic_q",
    "darex",
    "delta_decay_",
    "drop_delta",
    "huber_decay_",
    "huber_penalty",
    "importance_mask",
    "inject_allora",
    "inject_low_rank",
    "inject_soma",
    "l1_decay_",
    "l2_decay_",
    "learn_q",
    "merge_low_rank",
    "mse_q",
    "output_change",
    "scale_gradient",
    "scale_updates",
    "search_q",
    "seeded_score",
]
