"""Methods that remove, truncate or perturb part of a network's computation while it trains."""

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
from regularizers.dropout.prefix import PrefixDistribution, prefix_mask
from regularizers.ops.prefix_scan import (
    expected_prefix_cross_entropy,
    prefix_accuracy,
    prefix_logits,
)

__all__ = [
    "CoTeachingStep",
    "MultiSampleDropout",
    "MultiSampleDropoutCrossEntropy",
    "NestedDropout",
    "PrefixDistribution",
    "expected_prefix_cross_entropy",
    "multi_sample_dropout",
    "multi_sample_loss",
    "nested_co_teaching_step",
    "nested_dropout",
    "prefix_accuracy",
    "prefix_logits",
    "prefix_mask",
    "select_prefix",
]
