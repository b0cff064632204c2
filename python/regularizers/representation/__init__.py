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
from regularizers.representation.hypertopo import (
    ManifoldOutput,
    ProductManifoldHead,
    hyperbolic_info_nce,
    linear_warmup,
    poincare_distance,
    poincare_expmap0,
    select_checkpoint,
)
from regularizers.representation.tabular_jepa import (
    FeaturePredictor,
    TabularJEPA,
    TabularJEPAOutput,
    ema_update_,
    jepa_loss,
)
from regularizers.representation.topology import (
    euler_characteristic_loss,
    soft_euler_characteristic,
    topology_surrogate_loss,
    total_variation,
)
from regularizers.representation.topology_metrics import (
    betti_numbers,
    boundary_f1,
    persistence_diagram_distance,
)
from regularizers.representation.uncertainty import (
    MultiGrainedUncertaintyLoss,
    NormalAugmenter,
    uncertainty_matching_loss,
)

__all__ = [
    "BalancedAttention2d",
    "CoordinateAttention2d",
    "FeaturePredictor",
    "FeatureTokenizer",
    "ManifoldOutput",
    "MultiGrainedUncertaintyLoss",
    "NormalAugmenter",
    "ProductManifoldHead",
    "RegularizationTokens",
    "SqueezeExcitation2d",
    "TabularJEPA",
    "TabularJEPAOutput",
    "betti_numbers",
    "boundary_f1",
    "collapse_metrics",
    "ema_update_",
    "euler_characteristic_loss",
    "hyperbolic_info_nce",
    "jepa_loss",
    "linear_warmup",
    "persistence_diagram_distance",
    "poincare_distance",
    "poincare_expmap0",
    "select_checkpoint",
    "soft_euler_characteristic",
    "topology_surrogate_loss",
    "total_variation",
    "uncertainty_matching_loss",
]
