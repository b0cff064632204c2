"""The fused operators: functions of tensors and a seed, with kernels and a plain reference."""

from regularizers.ops.dropout import dropout_samples
from regularizers.ops.masked_linear_cross_entropy import multi_sample_dropout_cross_entropy
from regularizers.ops.philox import dropout_mask, philox_4x32, philox_words
from regularizers.ops.sinkhorn import SinkhornOutput, sinkhorn, transport_plan
from regularizers.ops.sinkhorn_points import sinkhorn_points
from regularizers.ops.sketch import sliced_characteristic, sliced_epps_pulley, sliced_quantile
from regularizers.ops.transport_apply import transport_apply

__all__ = [
    "SinkhornOutput",
    "dropout_mask",
    "dropout_samples",
    "multi_sample_dropout_cross_entropy",
    "philox_4x32",
    "philox_words",
    "sinkhorn",
    "sinkhorn_points",
    "sliced_characteristic",
    "sliced_epps_pulley",
    "sliced_quantile",
    "transport_apply",
    "transport_plan",
]
