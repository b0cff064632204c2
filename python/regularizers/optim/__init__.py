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
from regularizers.optim.muon import Muon, muon_param_groups
from regularizers.optim.spectral import newton_schulz, spectral_stats

__all__ = [
    "AdamHD",
    "DecoupledOptimizer",
    "HuberDecay",
    "Muon",
    "WeightDecayScheduler",
    "delta_decay_",
    "huber_decay_",
    "huber_penalty",
    "l1_decay_",
    "l2_decay_",
    "muon_param_groups",
    "newton_schulz",
    "spectral_stats",
]
