"""Laws and tools of training at scale: repeated data, sparse proxies, power laws."""

from regularizers.scaling.power_law import (
    JointFit,
    PowerLawFit,
    data_efficiency,
    fit_joint_asymptote,
    fit_power_law,
)
from regularizers.scaling.repetition import (
    SwitchFeedForward,
    match_sparse_experts,
    multi_epoch_degradation,
    switch_balance_loss,
)

__all__ = [
    "JointFit",
    "PowerLawFit",
    "SwitchFeedForward",
    "data_efficiency",
    "fit_joint_asymptote",
    "fit_power_law",
    "match_sparse_experts",
    "multi_epoch_degradation",
    "switch_balance_loss",
]
