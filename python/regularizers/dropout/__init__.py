"""Methods that remove, truncate or perturb part of a network's computation while it trains."""

from regularizers.dropout.modality import (
    ConcatFusion,
    ModalityMAE,
    SumFusion,
    TransformerFusion,
    evaluate_modality_subsets,
    modality_dropout,
from regularizers.dropout.masked_input import (
    causal_right_window_mask,
    decay_parameter_groups,
    mask_inputs,
    masked_diffusion_loss,
    masked_input_loss,
)
from regularizers.dropout.multi_sample import (
    MultiSampleDropout,
    MultiSampleDropoutCrossEntropy,
    multi_sample_dropout,
    multi_sample_loss,
)
from regularizers.dropout.noise_mask import (
    BetaNoisePolicy,
    EMABaseline,
    apply_noise_mask,
    noise_mask_step,
    reinforce_loss,
    sample_noise_mask,
)

__all__ = [
    "ConcatFusion",
    "ModalityMAE",
    "MultiSampleDropout",
    "MultiSampleDropoutCrossEntropy",
    "SumFusion",
    "TransformerFusion",
    "evaluate_modality_subsets",
    "modality_dropout",
    "BetaNoisePolicy",
    "EMABaseline",
    "apply_noise_mask",
    "causal_right_window_mask",
    "decay_parameter_groups",
    "mask_inputs",
    "masked_diffusion_loss",
    "masked_input_loss",
    "multi_sample_dropout",
    "multi_sample_loss",
    "noise_mask_step",
    "reinforce_loss",
    "sample_noise_mask",
]
