"""Methods that remove, truncate or perturb part of a network's computation while it trains."""

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

__all__ = [
    "MultiSampleDropout",
    "MultiSampleDropoutCrossEntropy",
    "causal_right_window_mask",
    "decay_parameter_groups",
    "mask_inputs",
    "masked_diffusion_loss",
    "masked_input_loss",
    "multi_sample_dropout",
    "multi_sample_loss",
]
