"""The fused operators: functions of tensors and a seed, with kernels and a plain reference."""

from regularizers.ops import transport_potentials as _transport_potentials  # noqa: F401 (registers)
from regularizers.ops.decay import decay_amount, decoupled_adam_, stochastic_round
from regularizers.ops.dropout import dropout_samples
from regularizers.ops.masked_linear_cross_entropy import multi_sample_dropout_cross_entropy
from regularizers.ops.philox import dropout_mask, philox_4x32, philox_words
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
from regularizers.ops.transport_apply import transport_apply

__all__ = [
    "SinkhornOutput",
    "TransportDual",
    "decay_amount",
    "decoupled_adam_",
    "dropout_mask",
    "dropout_samples",
    "multi_sample_dropout_cross_entropy",
    "philox_4x32",
    "philox_words",
    "regularized_plan",
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
