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
from regularizers.optim.gradient_dropout import (
    GradientDropout,
    gradient_dropout,
    keep_probability,
    soft_kl,
)
from regularizers.optim.infinite_compute import (
    LocalOptimum,
    LogitEnsemble,
    distill_loss,
    ensemble_nll,
    locally_optimal,
    member_setting,
)
from regularizers.optim.mask_tuning import (
    BinaryMask,
    attach_masks,
    binarize_ste,
    fold_masks,
    mask_norm,
    masked_fraction,
    select_parameters,
)

__all__ = [
    "AdamHD",
    "BinaryMask",
    "DecoupledOptimizer",
    "GradientDropout",
    "HuberDecay",
    "LocalOptimum",
    "LogitEnsemble",
    "WeightDecayScheduler",
    "attach_masks",
    "binarize_ste",
    "delta_decay_",
    "distill_loss",
    "ensemble_nll",
    "fold_masks",
    "gradient_dropout",
    "huber_decay_",
    "huber_penalty",
    "keep_probability",
    "l1_decay_",
    "l2_decay_",
    "locally_optimal",
    "mask_norm",
    "masked_fraction",
    "member_setting",
    "select_parameters",
    "soft_kl",
]
