"""Optimizers and decays that regularize through the update itself."""

from regularizers.optim.adamhd import (
    AdamHD,
    HuberDecay,
    huber_penalty,
)
from regularizers.optim.backslash import (
    BackSlash,
    rate_penalty,
)
from regularizers.optim.base import (
    DecoupledOptimizer,
)
from regularizers.optim.code_length import (
    entropy_bits,
    exp_golomb_bits,
)
from regularizers.optim.decay import (
    WeightDecayScheduler,
    delta_decay_,
    huber_decay_,
    l1_decay_,
    l2_decay_,
)
from regularizers.optim.deepshape import (
    deepshape_,
)
from regularizers.optim.generalized_gaussian import (
    GeneralizedGaussian,
    estimate_shape,
    gg_init_,
)
from regularizers.optim.minifloat import (
    MiniFloat,
    RF8,
)
from regularizers.optim.muon import (
    Muon,
    muon_param_groups,
)
from regularizers.optim.orthograd import (
    OrthoGrad,
    nlm_alignment,
    orthogonalize_grad_,
)
from regularizers.optim.spectral import (
    newton_schulz,
    spectral_stats,
)
from regularizers.optim.stablemax import (
    log_stablemax,
    softmax_collapse_fraction,
    stablemax,
    stablemax_cross_entropy,
)

__all__ = [
    "AdamHD",
    "BackSlash",
    "DecoupledOptimizer",
    "GeneralizedGaussian",
    "HuberDecay",
    "MiniFloat",
    "Muon",
    "OrthoGrad",
    "RF8",
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
    "log_stablemax",
    "muon_param_groups",
    "newton_schulz",
    "nlm_alignment",
    "orthogonalize_grad_",
    "rate_penalty",
    "softmax_collapse_fraction",
    "spectral_stats",
    "stablemax",
    "stablemax_cross_entropy",
]
