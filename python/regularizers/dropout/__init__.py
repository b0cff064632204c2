"""Methods that remove, truncate or perturb part of a network's computation while it trains."""

from regularizers.dropout.masked_input import (
    causal_right_window_mask,
    decay_parameter_groups,
    mask_inputs,
    masked_diffusion_loss,
    masked_input_loss,
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
from regularizers.dropout.prefix import PrefixDistribution, prefix_mask
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
    "EMABaseline",
    "FixedFractionRankSampler",
    "IndependentRankSampler",
    "MultiSampleDropout",
    "MultiSampleDropoutCrossEntropy",
    "NestedDropout",
    "OrderedLowRankConv2d",
    "OrderedLowRankLayer",
    "OrderedLowRankLinear",
    "PrefixDistribution",
    "RankSampler",
    "RedundantTokenPadding",
    "SemanticProjector",
    "SingleLayerRankSampler",
    "apply_noise_mask",
    "causal_right_window_mask",
    "decay_parameter_groups",
    "decompose",
    "expected_prefix_cross_entropy",
    "freeze_for_decoder_finetune",
    "group_lasso_penalty",
    "hierarchical_semantic_loss",
    "lod_loss",
    "mask_inputs",
    "masked_diffusion_loss",
    "masked_input_loss",
    "merge",
    "multi_sample_dropout",
    "multi_sample_loss",
    "nested_co_teaching_step",
    "nested_dropout",
    "noise_mask_step",
    "ordered_layers",
    "prefix_accuracy",
    "prefix_logits",
    "prefix_mask",
    "reinforce_loss",
    "sample_noise_mask",
    "sample_num_tokens",
    "sampled_ranks",
    "select_prefix",
    "shrink_model",
]
