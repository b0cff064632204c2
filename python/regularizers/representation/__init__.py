"""Methods on what a network's features look like: self-supervision, attention, collapse."""

from regularizers.representation.attention import (
    BalancedAttention2d,
    CoordinateAttention2d,
    SqueezeExcitation2d,
)
from regularizers.representation.collapse import (
    collapse_metrics,
)
from regularizers.representation.conr import (
    ConRLoss,
    conr_loss,
)
from regularizers.representation.enforced_moe import (
    EnforcedMoE,
    convert_to_enforced_moe,
    expert_assignment,
    seed_domain_tokens,
)
from regularizers.representation.feature_tokens import (
    FeatureTokenizer,
    RegularizationTokens,
)
from regularizers.representation.item_ssl import (
    batch_contrastive_loss,
    batch_softmax_loss,
    spread_out_loss,
)
from regularizers.representation.item_views import (
    ItemAugmenter,
    correlated_feature_mask,
    feature_mutual_information,
    random_feature_mask,
)
from regularizers.representation.mnr import (
    mnr_loss,
    mnr_plus_loss,
)
from regularizers.representation.similarity import (
    SimilarityF1,
    similarity_f1,
    similarity_ratio,
)
from regularizers.representation.tabular_jepa import (
    FeaturePredictor,
    TabularJEPA,
    TabularJEPAOutput,
    ema_update_,
    jepa_loss,
)

__all__ = [
    "BalancedAttention2d",
    "ConRLoss",
    "CoordinateAttention2d",
    "EnforcedMoE",
    "FeaturePredictor",
    "FeatureTokenizer",
    "ItemAugmenter",
    "RegularizationTokens",
    "SimilarityF1",
    "SqueezeExcitation2d",
    "TabularJEPA",
    "TabularJEPAOutput",
    "batch_contrastive_loss",
    "batch_softmax_loss",
    "collapse_metrics",
    "conr_loss",
    "convert_to_enforced_moe",
    "correlated_feature_mask",
    "ema_update_",
    "expert_assignment",
    "feature_mutual_information",
    "jepa_loss",
    "mnr_loss",
    "mnr_plus_loss",
    "random_feature_mask",
    "seed_domain_tokens",
    "similarity_f1",
    "similarity_ratio",
    "spread_out_loss",
]
