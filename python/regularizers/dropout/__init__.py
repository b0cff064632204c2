"""Methods that remove, truncate or perturb part of a network's computation while it trains."""

from regularizers.dropout.multi_sample import (
    MultiSampleDropout,
    MultiSampleDropoutCrossEntropy,
    multi_sample_dropout,
    multi_sample_loss,
)

__all__ = [
    "MultiSampleDropout",
    "MultiSampleDropoutCrossEntropy",
    "multi_sample_dropout",
    "multi_sample_loss",
]
