"""Optimizers and decays that regularize through the update itself."""

from regularizers.optim.adamhd import (
    AdamHD,
    HuberDecay,
    huber_penalty,
)
from regularizers.optim.adamr import (
    AdamR,
)
from regularizers.optim.allora import (
    ALLoRALinear,
    inject_allora,
    scale_gradient,
    scale_updates,
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
from regularizers.optim.deepshape import (
    deepshape_,
)
from regularizers.optim.delta import (
    StateDelta,
)
from regularizers.optim.delta_scale import (
    analytic_layer_q,
    analytic_q,
    learn_q,
    mse_q,
    search_q,
    seeded_score,
)
from regularizers.optim.generalized_gaussian import (
    GeneralizedGaussian,
    estimate_shape,
    gg_init_,
)
from regularizers.optim.lowrank import (
    LowRankLinear,
    inject_low_rank,
    merge_low_rank,
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
from regularizers.optim.soma import (
    SoMALinear,
    WeightDecayAnnealing,
    inject_soma,
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
    "ALLoRALinear",
    "ActivationMean",
    "AdamHD",
    "AdamR",
    "BackSlash",
    "DecoupledOptimizer",
    "GeneralizedGaussian",
    "HuberDecay",
    "LowRankLinear",
    "MiniFloat",
    "Muon",
    "OrthoGrad",
    "RF8",
    "SoMALinear",
    "StateDelta",
    "WeightDecayAnnealing",
    "WeightDecayScheduler",
    "analytic_layer_q",
    "analytic_q",
    "darex",
    "deepshape_",
    "delta_decay_",
    "drop_delta",
    "entropy_bits",
    "estimate_shape",
    "exp_golomb_bits",
    "gg_init_",
    "huber_decay_",
    "huber_penalty",
    "importance_mask",
    "inject_allora",
    "inject_low_rank",
    "inject_soma",
    "l1_decay_",
    "l2_decay_",
    "learn_q",
    "log_stablemax",
    "merge_low_rank",
    "mse_q",
    "muon_param_groups",
    "newton_schulz",
    "nlm_alignment",
    "orthogonalize_grad_",
    "output_change",
    "rate_penalty",
    "scale_gradient",
    "scale_updates",
    "search_q",
    "seeded_score",
    "softmax_collapse_fraction",
    "spectral_stats",
    "stablemax",
    "stablemax_cross_entropy",
]
