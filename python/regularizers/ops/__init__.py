"""The fused operators: functions of tensors and a seed, with kernels and a plain reference."""

from regularizers.ops import transport_potentials as _transport_potentials  # noqa: F401 (registers)
from regularizers.ops.code_search import nearest_code, sample_code
from regularizers.ops.decay import decay_amount, decoupled_adam_, stochastic_round
from regularizers.ops.drop_block import drop_block
from regularizers.ops.dropout import dropout_samples
from regularizers.ops.gradient_gate import gradient_gate
from regularizers.ops.masked_linear_cross_entropy import multi_sample_dropout_cross_entropy
from regularizers.ops.mini_float import mini_float_bias, mini_float_pack, mini_float_unpack
from regularizers.ops.mix import mix, paste_boxes
from regularizers.ops.neighbours import nearest_neighbour
from regularizers.ops.nested import prefix_linear
from regularizers.ops.pairwise import (
    FalselyNear,
    LabelWindow,
    OtherLabel,
    PairwiseSums,
    SameLabel,
    pairwise_logsumexp,
)
from regularizers.ops.philox import dropout_mask, philox_4x32, philox_words
from regularizers.ops.prefix_scan import (
    expected_prefix_cross_entropy,
    prefix_accuracy,
    prefix_logits,
)
from regularizers.ops.row_gate import row_gate
from regularizers.ops.sinkhorn import SinkhornOutput, sinkhorn, transport_plan
from regularizers.ops.sinkhorn_points import sinkhorn_points
from regularizers.ops.sketch import sliced_characteristic, sliced_epps_pulley, sliced_quantile
from regularizers.ops.sparse_ot import (
    TransportDual,
    regularized_plan,
    sparse_regularized_plan,
    transport_dual,
)
from regularizers.ops.sparse_projection import sparse_projection
from regularizers.ops.subsampled_attention import gathered_attention
from regularizers.ops.transport_apply import transport_apply

__all__ = [
    "FalselyNear",
    "LabelWindow",
    "OtherLabel",
    "PairwiseSums",
    "SameLabel",
    "SinkhornOutput",
    "TransportDual",
    "decay_amount",
    "decoupled_adam_",
    "drop_block",
    "dropout_mask",
    "dropout_samples",
    "expected_prefix_cross_entropy",
    "gathered_attention",
    "gradient_gate",
    "mini_float_bias",
    "mini_float_pack",
    "mini_float_unpack",
    "mix",
    "multi_sample_dropout_cross_entropy",
    "nearest_code",
    "nearest_neighbour",
    "pairwise_logsumexp",
    "paste_boxes",
    "philox_4x32",
    "philox_words",
    "prefix_accuracy",
    "prefix_linear",
    "prefix_logits",
    "regularized_plan",
    "row_gate",
    "sample_code",
    "sinkhorn",
    "sinkhorn_points",
    "sliced_characteristic",
    "sliced_epps_pulley",
    "sliced_quantile",
    "sparse_projection",
    "sparse_regularized_plan",
    "stochastic_round",
    "transport_apply",
    "transport_dual",
    "transport_plan",
]
