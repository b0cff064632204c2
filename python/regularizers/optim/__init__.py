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
from regularizers.optim.lowrank import (
    LowRankLinear,
    inject_low_rank,
    merge_low_rank,
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
from regularizers.optim.minifloat import (
    RF8,
    MiniFloat,
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
    "RF8",
    "ALLoRALinear",
    "ActivationMean",
    "AdamHD",
    "AdamR",
    "BackSlash",
    "BinaryMask",
    "DecoupledOptimizer",
    "GeneralizedGaussian",
    "GradientDropout",
    "HuberDecay",
    "LocalOptimum",
    "LogitEnsemble",
    "LowRankLinear",
    "MiniFloat",
    "Muon",
    "OrthoGrad",
    "SoMALinear",
    "StateDelta",
    "WeightDecayAnnealing",
    "WeightDecayScheduler",
    "analytic_layer_q",
    "analytic_q",
    "attach_masks",
    "binarize_ste",
    "darex",
    "deepshape_",
    "delta_decay_",
    "distill_loss",
    "drop_delta",
    "ensemble_nll",
    "entropy_bits",
    "estimate_shape",
    "exp_golomb_bits",
    "fold_masks",
    "gg_init_",
    "gradient_dropout",
    "huber_decay_",
    "huber_penalty",
    "importance_mask",
    "inject_allora",
    "inject_low_rank",
    "inject_soma",
    "keep_probability",
    "l1_decay_",
    "l2_decay_",
    "learn_q",
    "locally_optimal",
    "log_stablemax",
    "mask_norm",
    "masked_fraction",
    "member_setting",
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
    "select_parameters",
    "soft_kl",
    "softmax_collapse_fraction",
    "spectral_stats",
    "stablemax",
    "stablemax_cross_entropy",
]
