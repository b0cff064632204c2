"""Methods on what a network's features look like: self-supervision, attention, collapse."""

from regularizers.representation.attention import (
    BalancedAttention2d,
    CoordinateAttention2d,
    SqueezeExcitation2d,
)
from regularizers.representation.collapse import (
    collapse_metrics,
)
from regularizers.representation.dispersive import (
    DispersiveRegularizer,
    dispersive_loss,
)
from regularizers.representation.energy_confusion import (
    ECAML,
    energy_confusion,
    energy_distance,
)
from regularizers.representation.feature_tokens import (
    FeatureTokenizer,
    RegularizationTokens,
)
from regularizers.representation.gdwct import (
    GroupWhiteningColoring,
    WCTOutput,
    coloring_loss,
    coloring_matrix,
    exact_whiten_color,
    group_covariance,
    whitening_loss,
)
from regularizers.representation.msbreg import (
    MSBLoss,
    MSBReg,
    brownian_diffusive_loss,
    byol_momentum,
    multiview_centroid_loss,
    singular_value_loss,
)
from regularizers.representation.tabular_jepa import (
    FeaturePredictor,
    TabularJEPA,
    TabularJEPAOutput,
    ema_update_,
    jepa_loss,
)

__all__ = [
    "ECAML",
    "BalancedAttention2d",
    "CoordinateAttention2d",
    "DispersiveRegularizer",
    "FeaturePredictor",
    "FeatureTokenizer",
    "GroupWhiteningColoring",
    "MSBLoss",
    "MSBReg",
    "RegularizationTokens",
    "SqueezeExcitation2d",
    "TabularJEPA",
    "TabularJEPAOutput",
    "WCTOutput",
    "brownian_diffusive_loss",
    "byol_momentum",
    "collapse_metrics",
    "coloring_loss",
    "coloring_matrix",
    "dispersive_loss",
    "ema_update_",
    "energy_confusion",
    "energy_distance",
    "exact_whiten_color",
    "group_covariance",
    "jepa_loss",
    "multiview_centroid_loss",
    "singular_value_loss",
    "whitening_loss",
]
