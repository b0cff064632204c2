"""Methods that remove, truncate or perturb part of a network's computation while it trains."""

from regularizers.dropout.drop_block import (
    DropBlock2d,
    apply_progressive_drop_block,
    drop_block2d,
    progressive_rates,
)
from regularizers.dropout.drop_path import (
    ScheduledDropPath,
    apply_scheduled_drop_path,
    drop_path,
    drop_path_compact,
    set_drop_path_progress,
)
from regularizers.dropout.feature_subset import (
    sample_feature_masks,
)
from regularizers.dropout.layer_shuffle import (
    StochasticLayerShuffle,
    apply_layer_shuffle,
    shuffled_call,
)
from regularizers.dropout.masked_input import (
    causal_right_window_mask,
    decay_parameter_groups,
    mask_inputs,
    masked_diffusion_loss,
    masked_input_loss,
)
from regularizers.dropout.modality import (
    ModalityMAE,
    modality_dropout,
)
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
from regularizers.dropout.nested import (
    CoTeachingStep,
    NestedDropout,
    nested_co_teaching_step,
    nested_dropout,
    select_prefix,
)
from regularizers.dropout.noise_mask import (
    BetaNoisePolicy,
    EMABaseline,
    apply_noise_mask,
    noise_mask_step,
    reinforce_loss,
    sample_noise_mask,
)
from regularizers.dropout.ordered import (
    OrderedLowRankConv2d,
    OrderedLowRankLayer,
    OrderedLowRankLinear,
)
from regularizers.dropout.ordered_training import (
    FixedFractionRankSampler,
    IndependentRankSampler,
    RankSampler,
    SingleLayerRankSampler,
    decompose,
    group_lasso_penalty,
    lod_loss,
    merge,
    ordered_layers,
    sampled_ranks,
    shrink_model,
)
from regularizers.dropout.prefix import (
    PrefixDistribution,
    prefix_mask,
)
from regularizers.dropout.quantized_perturbation import (
    PerturbedTokens,
    ProjectedVectorQuantizer,
    QuantizedPerturbation,
    codebook_entropy_loss,
    perturb_indices,
    ramped_ema,
    semi_supervised_seg_loss,
    straight_through,
    vq_alignment_loss,
)
from regularizers.dropout.schedules import (
    DepthSchedule,
    DropoutSchedule,
    RateSchedule,
    ScheduledDropout,
    TimeSchedule,
    apply_schedule,
    set_dropout,
)
from regularizers.dropout.sensory import (
    SensoryDropout,
)
from regularizers.dropout.subsampled_attention import (
    jitter_permutation,
    sample_keys,
    subsampled_attention,
)
from regularizers.dropout.subsampled_layers import (
    SSASchedule,
    SubsampledSelfAttention,
    convert_attention,
    self_ensemble,
)
from regularizers.dropout.token_padding import (
    RedundantTokenPadding,
    SemanticProjector,
    freeze_for_decoder_finetune,
    hierarchical_semantic_loss,
    sample_num_tokens,
)
from regularizers.ops.prefix_scan import (
    expected_prefix_cross_entropy,
    prefix_accuracy,
    prefix_logits,
)

__all__ = [
    "BetaNoisePolicy",
    "CoTeachingStep",
    "ConcatFusion",
    "DepthSchedule",
    "DropBlock2d",
    "DropoutSchedule",
    "EMABaseline",
    "FixedFractionRankSampler",
    "IndependentRankSampler",
    "ModalityMAE",
    "MultiSampleDropout",
    "MultiSampleDropoutCrossEntropy",
    "NestedDropout",
    "OrderedLowRankConv2d",
    "OrderedLowRankLayer",
    "OrderedLowRankLinear",
    "PerturbedTokens",
    "PrefixDistribution",
    "ProjectedVectorQuantizer",
    "QuantizedPerturbation",
    "RankSampler",
    "RateSchedule",
    "RedundantTokenPadding",
    "SSASchedule",
    "ScheduledDropPath",
    "ScheduledDropout",
    "SemanticProjector",
    "SensoryDropout",
    "SingleLayerRankSampler",
    "StochasticLayerShuffle",
    "SubsampledSelfAttention",
    "SumFusion",
    "TimeSchedule",
    "TransformerFusion",
    "apply_layer_shuffle",
    "apply_noise_mask",
    "apply_progressive_drop_block",
    "apply_schedule",
    "apply_scheduled_drop_path",
    "causal_right_window_mask",
    "codebook_entropy_loss",
    "convert_attention",
    "decay_parameter_groups",
    "decompose",
    "drop_block2d",
    "drop_path",
    "drop_path_compact",
    "evaluate_modality_subsets",
    "expected_prefix_cross_entropy",
    "freeze_for_decoder_finetune",
    "group_lasso_penalty",
    "hierarchical_semantic_loss",
    "jitter_permutation",
    "lod_loss",
    "mask_inputs",
    "masked_diffusion_loss",
    "masked_input_loss",
    "merge",
    "modality_dropout",
    "multi_sample_dropout",
    "multi_sample_loss",
    "nested_co_teaching_step",
    "nested_dropout",
    "noise_mask_step",
    "ordered_layers",
    "perturb_indices",
    "prefix_accuracy",
    "prefix_logits",
    "prefix_mask",
    "progressive_rates",
    "ramped_ema",
    "reinforce_loss",
    "sample_feature_masks",
    "sample_keys",
    "sample_noise_mask",
    "sample_num_tokens",
    "sampled_ranks",
    "select_prefix",
    "self_ensemble",
    "semi_supervised_seg_loss",
    "set_drop_path_progress",
    "set_dropout",
    "shrink_model",
    "shuffled_call",
    "straight_through",
    "subsampled_attention",
    "vq_alignment_loss",
]
