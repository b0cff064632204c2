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
from regularizers.representation.attention_entropy import (
    GatedAttentionMIL,
    aem_loss,
    attention_neg_entropy,
    attention_neg_entropy_from_probs,
)
from regularizers.representation.collapse import (
    collapse_metrics,
)
from regularizers.representation.conr import (
    ConRLoss,
    conr_loss,
)
from regularizers.representation.dispersive import (
    DispersiveRegularizer,
    dispersive_loss,
)
from regularizers.representation.dual_stream import (
    DualStreamLoss,
    DualStreamTerms,
    StreamSplitter,
    intra_image_contrastive_loss,
    prototype_contrastive_loss,
)
from regularizers.representation.energy_confusion import (
    ECAML,
    energy_confusion,
    energy_distance,
)
from regularizers.representation.enforced_moe import (
    EnforcedMoE,
    convert_to_enforced_moe,
    expert_assignment,
    seed_domain_tokens,
)
from regularizers.representation.facets import (
    Facets,
    find_facets,
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
from regularizers.representation.hypertopo import (
    ManifoldOutput,
    ProductManifoldHead,
    hyperbolic_info_nce,
    linear_warmup,
    poincare_distance,
    poincare_expmap0,
    select_checkpoint,
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
from regularizers.representation.msbreg import (
    MSBLoss,
    MSBReg,
    brownian_diffusive_loss,
    byol_momentum,
    multiview_centroid_loss,
    singular_value_loss,
)
from regularizers.representation.repa import (
    REPA,
    REPAProjector,
    repa_loss,
    sample_interpolant,
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
from regularizers.representation.tv import (
    tv_denoise,
)
from regularizers.representation.uncertainty import (
    MultiGrainedUncertaintyLoss,
    NormalAugmenter,
    uncertainty_matching_loss,
)

__all__ = [
    "ECAML",
    "REPA",
    "BalancedAttention2d",
    "ConRLoss",
    "CoordinateAttention2d",
    "DispersiveRegularizer",
    "DualStreamLoss",
    "DualStreamTerms",
    "EnforcedMoE",
    "Facets",
    "FeaturePredictor",
    "FeatureTokenizer",
    "GatedAttentionMIL",
    "GroupWhiteningColoring",
    "INPDecoderBlock",
    "INPExtractor",
    "INPFormer",
    "INPOutput",
    "ItemAugmenter",
    "MSBLoss",
    "MSBReg",
    "ManifoldOutput",
    "MultiGrainedUncertaintyLoss",
    "NormalAugmenter",
    "Octave",
    "ProductManifoldHead",
    "PrototypeAssignment",
    "REPAProjector",
    "RegularizationTokens",
    "SAELoss",
    "SAEOutput",
    "SimilarityF1",
    "SqueezeExcitation2d",
    "StreamSplitter",
    "TabularJEPA",
    "TabularJEPAOutput",
    "TopKSAE",
    "UnintendedFeatureRegularizer",
    "UnitActivation",
    "VariationalTopKSAE",
    "WCTOutput",
    "aem_loss",
    "anomaly_map",
    "attention_neg_entropy",
    "attention_neg_entropy_from_probs",
    "batch_contrastive_loss",
    "batch_softmax_loss",
    "betti_numbers",
    "boundary_f1",
    "brownian_diffusive_loss",
    "byol_momentum",
    "center_crop_offset",
    "coherence_loss",
    "collapse_metrics",
    "coloring_loss",
    "coloring_matrix",
    "conr_loss",
    "convert_to_enforced_moe",
    "correlated_feature_mask",
    "dead_fraction",
    "dispersive_loss",
    "ema_update_",
    "energy_confusion",
    "energy_distance",
    "euler_characteristic_loss",
    "exact_whiten_color",
    "expert_assignment",
    "feature_mutual_information",
    "feature_similarity_penalty",
    "find_facets",
    "finetune_sae",
    "group_covariance",
    "hyperbolic_info_nce",
    "intra_image_contrastive_loss",
    "jepa_loss",
    "linear_warmup",
    "maximize_activation",
    "mnr_loss",
    "mnr_plus_loss",
    "multiview_centroid_loss",
    "paper_octaves",
    "persistence_diagram_distance",
    "poincare_distance",
    "poincare_expmap0",
    "project_out",
    "prototype_contrastive_loss",
    "random_feature_mask",
    "repa_loss",
    "sample_interpolant",
    "seed_domain_tokens",
    "select_checkpoint",
    "similarity_f1",
    "similarity_ratio",
    "singular_value_loss",
    "soft_euler_characteristic",
    "soft_mining_cosine_loss",
    "spread_out_loss",
    "topology_surrogate_loss",
    "total_variation",
    "tv_denoise",
    "uncertainty_matching_loss",
    "unintended_directions",
    "whitening_loss",
]
