"""The fused operators: functions of tensors and a seed, with kernels and a plain reference."""

from regularizers.ops import transport_potentials as _transport_potentials  # noqa: F401 (registers)
from regularizers.ops.dropout import dropout_samples
from regularizers.ops.masked_linear_cross_entropy import multi_sample_dropout_cross_entropy
from regularizers.ops.philox import dropout_mask, philox_4x32, philox_words
from regularizers.ops.sparse_ot import (
    TransportDual,
    sparse_transport_plan,
    transport_dual,
    transport_plan,
)
from regularizers.ops.sparse_projection import sparse_projection

__all__ = [
    "TransportDual",
    "dropout_mask",
    "dropout_samples",
    "multi_sample_dropout_cross_entropy",
    "philox_4x32",
    "philox_words",
    "sparse_projection",
    "sparse_transport_plan",
    "transport_dual",
    "transport_plan",
]
