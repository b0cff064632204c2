"""Methods on what a network's features look like: self-supervision, attention, collapse."""

from regularizers.representation.attention import (
    BalancedAttention2d,
    CoordinateAttention2d,
    SqueezeExcitation2d,
)
from regularizers.representation.attention_entropy import (
    GatedAttentionMIL,
    aem_loss,
    attention_neg_entropy,
    attention_neg_entropy_from_probs,
)
from regularizers.representation.collapse import (
    collapse_metrics,
)
from regularizers.representation.dual_stream import (
    DualStreamLoss,
    DualStreamTerms,
    StreamSplitter,
    intra_image_contrastive_loss,
    prototype_contrastive_loss,
)
from regularizers.representation.feature_tokens import (
    FeatureTokenizer,
    RegularizationTokens,
)
from regularizers.representation.inp import (
    INPDecoderBlock,
    INPExtractor,
    INPFormer,
    INPOutput,
)
from regularizers.representation.inp_loss import (
    PrototypeAssignment,
    anomaly_map,
    coherence_loss,
    soft_mining_cosine_loss,
)
from regularizers.representation.repa import (
    REPA,
    REPAProjector,
    repa_loss,
    sample_interpolant,
)
from regularizers.representation.tabular_jepa import (
    FeaturePredictor,
    TabularJEPA,
    TabularJEPAOutput,
    ema_update_,
    jepa_loss,
)

__all__ = [
    "REPA",
    "BalancedAttention2d",
    "CoordinateAttention2d",
    "DualStreamLoss",
    "DualStreamTerms",
    "FeaturePredictor",
    "FeatureTokenizer",
    "GatedAttentionMIL",
    "INPDecoderBlock",
    "INPExtractor",
    "INPFormer",
    "INPOutput",
    "PrototypeAssignment",
    "REPAProjector",
    "RegularizationTokens",
    "SqueezeExcitation2d",
    "StreamSplitter",
    "TabularJEPA",
    "TabularJEPAOutput",
    "aem_loss",
    "anomaly_map",
    "attention_neg_entropy",
    "attention_neg_entropy_from_probs",
    "coherence_loss",
    "collapse_metrics",
    "ema_update_",
    "intra_image_contrastive_loss",
    "jepa_loss",
    "prototype_contrastive_loss",
    "repa_loss",
    "sample_interpolant",
    "soft_mining_cosine_loss",
]
