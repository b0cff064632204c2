"""Methods that remove, truncate or perturb part of a network's computation while it trains."""

from regularizers.dropout.multi_sample import (
    MultiSampleDropout,
    MultiSampleDropoutCrossEntropy,
    multi_sample_dropout,
    multi_sample_loss,
)
from regularizers.dropout.subsampled_attention import (
    jitter_permutation,
    sample_keys,
    subsampled_attention,
)
from regularizers.dropout.subsampled_layers import (
    SSASchedule,
    SubsampledSelfAttention,
    convert_attention,
    self_ensemble,
)

__all__ = [
    "MultiSampleDropout",
    "MultiSampleDropoutCrossEntropy",
    "SSASchedule",
    "SubsampledSelfAttention",
    "convert_attention",
    "jitter_permutation",
    "multi_sample_dropout",
    "multi_sample_loss",
    "sample_keys",
    "self_ensemble",
    "subsampled_attention",
]
