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
from regularizers.mixing.compositional_adversary import (
    Attack,
    CATStep,
    CompositionalAdversary,
    GradientReversal,
    cat_step,
    straight_through_gumbel,
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
from regularizers.mixing.transforms import (
    TransformFamily,
    default_families,
)
from regularizers.mixing.watermark import (
    bit_accuracy,
    detection_rate,
    watermark_capacity,
    watermark_step,
)

__all__ = [
    "AdaMixUp",
    "AdaMixUpOutput",
    "AdaWAC",
    "AdaptiveConsistencyWeights",
    "Attack",
    "CATStep",
    "CompositionalAdversary",
    "CutMix",
    "GradientReversal",
    "MixBatch",
    "MixUp",
    "PolicyRegion",
    "Semixup",
    "SemixupOutput",
    "SemixupParts",
    "TransformFamily",
    "bit_accuracy",
    "cat_step",
    "cutmix",
    "default_families",
    "detection_rate",
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
    "straight_through_gumbel",
    "watermark_capacity",
    "watermark_step",
]
