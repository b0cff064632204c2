"""Laws and tools of training at scale: repeated data, sparse proxies."""

from regularizers.scaling.repetition import (
    SwitchFeedForward,
    match_sparse_experts,
    multi_epoch_degradation,
    switch_balance_loss,
)

__all__ = [
    "SwitchFeedForward",
    "match_sparse_experts",
    "multi_epoch_degradation",
    "switch_balance_loss",
]
