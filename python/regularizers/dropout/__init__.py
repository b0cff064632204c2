"""Methods that remove, truncate or perturb part of a network's computation while it trains."""

from regularizers.dropout.masked_input import (
    causal_right_window_mask,
    decay_parameter_groups,
    mask_inputs,
    masked_diffusion_loss,
    masked_input_loss,
)
from regularizers.dropout.modality import (
    ConcatFusion,
    ModalityMAE,
    SumFusion,
    TransformerFusion,
    evaluate_modality_subsets,
    modality_dropout,
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
from regularizers.dropout.sensory import (
    SensoryDropout,
)

__all__ = [
    "BetaNoisePolicy",
    "ConcatFusion",
    "EMABaseline",
    "ModalityMAE",
    "MultiSampleDropout",
    "MultiSampleDropoutCrossEntropy",
    "SensoryDropout",
    "SumFusion",
    "TransformerFusion",
    "apply_noise_mask",
    "causal_right_window_mask",
    "decay_parameter_groups",
    "evaluate_modality_subsets",
    "mask_inputs",
    "masked_diffusion_loss",
    "masked_input_loss",
    "modality_dropout",
    "multi_sample_dropout",
    "multi_sample_loss",
    "noise_mask_step",
    "reinforce_loss",
    "sample_noise_mask",
]
