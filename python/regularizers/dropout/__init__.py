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
from regularizers.dropout.nested import (
    CoTeachingStep,
    NestedDropout,
    nested_co_teaching_step,
    nested_dropout,
    select_prefix,
)
from regularizers.dropout.noise_mask import (
    BetaNoisePolicy,
    EMABaseline,
    apply_noise_mask,
    noise_mask_step,
    reinforce_loss,
    sample_noise_mask,
)
from regularizers.dropout.prefix import (
    PrefixDistribution,
    prefix_mask,
)
from regularizers.dropout.sensory import (
    SensoryDropout,
)
from regularizers.ops.prefix_scan import (
    expected_prefix_cross_entropy,
    prefix_accuracy,
    prefix_logits,
)

__all__ = [
    "BetaNoisePolicy",
    "CoTeachingStep",
    "ConcatFusion",
    "EMABaseline",
    "ModalityMAE",
    "MultiSampleDropout",
    "MultiSampleDropoutCrossEntropy",
    "NestedDropout",
    "PrefixDistribution",
    "SensoryDropout",
    "SumFusion",
    "TransformerFusion",
    "apply_noise_mask",
    "causal_right_window_mask",
    "decay_parameter_groups",
    "evaluate_modality_subsets",
    "expected_prefix_cross_entropy",
    "mask_inputs",
    "masked_diffusion_loss",
    "masked_input_loss",
    "modality_dropout",
    "multi_sample_dropout",
    "multi_sample_loss",
    "nested_co_teaching_step",
    "nested_dropout",
    "noise_mask_step",
    "prefix_accuracy",
    "prefix_logits",
    "prefix_mask",
    "reinforce_loss",
    "sample_noise_mask",
    "select_prefix",
]
