"""Methods on what a network's features look like: self-supervision, attention, collapse."""

from regularizers.representation.activation_maximization import (
    Octave,
    UnitActivation,
    center_crop_offset,
    maximize_activation,
    paper_octaves,
)
from regularizers.representation.attention import (
    BalancedAttention2d,
    CoordinateAttention2d,
    SqueezeExcitation2d,
)
from regularizers.representation.collapse import (
    collapse_metrics,
)
from regularizers.representation.facets import (
    Facets,
    find_facets,
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
from regularizers.representation.tv import (
    tv_denoise,
)

__all__ = [
    "BalancedAttention2d",
    "CoordinateAttention2d",
    "Facets",
    "FeaturePredictor",
    "FeatureTokenizer",
    "Octave",
    "RegularizationTokens",
    "SAELoss",
    "SAEOutput",
    "SqueezeExcitation2d",
    "TabularJEPA",
    "TabularJEPAOutput",
    "TopKSAE",
    "UnintendedFeatureRegularizer",
    "UnitActivation",
    "VariationalTopKSAE",
    "center_crop_offset",
    "collapse_metrics",
    "dead_fraction",
    "ema_update_",
    "feature_similarity_penalty",
    "find_facets",
    "finetune_sae",
    "jepa_loss",
    "maximize_activation",
    "paper_octaves",
    "project_out",
    "tv_denoise",
    "unintended_directions",
]
