"""Methods that remove, truncate or perturb part of a network's computation while it trains."""

from regularizers.dropout.feature_subset import sample_feature_masks
from regularizers.dropout.modality import ModalityMAE, modality_dropout
from regularizers.dropout.modality_fusion import (
    ConcatFusion,
    SumFusion,
    TransformerFusion,
    evaluate_modality_subsets,
)
from regularizers.dropout.multi_sample import (
    MultiSampleDropout,
    MultiSampleDropoutCrossEntropy,
    multi_sample_dropout,
    multi_sample_loss,
)
from regularizers.dropout.sensory import SensoryDropout

__all__ = [
    "ConcatFusion",
    "ModalityMAE",
    "MultiSampleDropout",
    "MultiSampleDropoutCrossEntropy",
    "SensoryDropout",
    "SumFusion",
    "TransformerFusion",
    "evaluate_modality_subsets",
    "modality_dropout",
    "multi_sample_dropout",
    "multi_sample_loss",
    "sample_feature_masks",
]
