"""Methods that remove, truncate or perturb part of a network's computation while it trains."""

from regularizers.dropout.multi_sample import (
    MultiSampleDropout,
    MultiSampleDropoutCrossEntropy,
    multi_sample_dropout,
    multi_sample_loss,
)
from regularizers.dropout.quantized_perturbation import (
    PerturbedTokens,
    ProjectedVectorQuantizer,
    QuantizedPerturbation,
    codebook_entropy_loss,
    perturb_indices,
    ramped_ema,
    semi_supervised_seg_loss,
    straight_through,
    vq_alignment_loss,
)

__all__ = [
    "MultiSampleDropout",
    "MultiSampleDropoutCrossEntropy",
    "PerturbedTokens",
    "ProjectedVectorQuantizer",
    "QuantizedPerturbation",
    "codebook_entropy_loss",
    "multi_sample_dropout",
    "multi_sample_loss",
    "perturb_indices",
    "ramped_ema",
    "semi_supervised_seg_loss",
    "straight_through",
    "vq_alignment_loss",
]
