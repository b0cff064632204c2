"""New training inputs mixed from old ones, and the losses that tie predictions on them together."""

from regularizers.mixing.adamixup import (
    AdaMixUp,
    AdaMixUpOutput,
    PolicyRegion,
    local_linearity_gap,
    manifold_intrusion_rate,
    sample_policy,
)
from regularizers.mixing.adawac import (
    AdaptiveConsistencyWeights,
    AdaWAC,
    feature_consistency,
)
from regularizers.mixing.cutmix import (
    CutMix,
    cutmix,
    random_box,
)
from regularizers.mixing.functional import (
    MixBatch,
    mixed_cross_entropy,
    sample_lambda,
    softmax_consistency,
)
from regularizers.mixing.mixup import (
    MixUp,
    mixup,
)
from regularizers.mixing.semixup import (
    Semixup,
    SemixupOutput,
    SemixupParts,
    semixup_unlabeled_loss,
)

__all__ = [
    "AdaMixUp",
    "AdaMixUpOutput",
    "AdaWAC",
    "AdaptiveConsistencyWeights",
    "CutMix",
    "MixBatch",
    "MixUp",
    "PolicyRegion",
    "Semixup",
    "SemixupOutput",
    "SemixupParts",
    "cutmix",
    "feature_consistency",
    "local_linearity_gap",
    "manifold_intrusion_rate",
    "mixed_cross_entropy",
    "mixup",
    "random_box",
    "sample_lambda",
    "sample_policy",
    "semixup_unlabeled_loss",
    "softmax_consistency",
]
