"""Methods on what a network's features look like: self-supervision, attention, collapse."""

from regularizers.representation.attention import (
    BalancedAttention2d,
    CoordinateAttention2d,
    SqueezeExcitation2d,
)
from regularizers.representation.collapse import (
    collapse_metrics,
)
from regularizers.representation.feature_tokens import (
    FeatureTokenizer,
    RegularizationTokens,
)
from regularizers.representation.sae import (
    SAELoss,
    SAEOutput,
    TopKSAE,
    VariationalTopKSAE,
    dead_fraction,
)
from regularizers.representation.sae_selfreg import (
    UnintendedFeatureRegularizer,
    feature_similarity_penalty,
    finetune_sae,
    project_out,
    unintended_directions,
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
    "CoordinateAttention2d",
    "FeaturePredictor",
    "FeatureTokenizer",
    "RegularizationTokens",
    "SAELoss",
    "SAEOutput",
    "SqueezeExcitation2d",
    "TabularJEPA",
    "TabularJEPAOutput",
    "TopKSAE",
    "UnintendedFeatureRegularizer",
    "VariationalTopKSAE",
    "collapse_metrics",
    "dead_fraction",
    "ema_update_",
    "feature_similarity_penalty",
    "finetune_sae",
    "jepa_loss",
    "project_out",
    "unintended_directions",
]
