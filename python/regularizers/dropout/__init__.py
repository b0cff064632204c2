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
from regularizers.dropout.layer_shuffle import (
    StochasticLayerShuffle,
    apply_layer_shuffle,
    shuffled_call,
)
from regularizers.dropout.multi_sample import (
    MultiSampleDropout,
    MultiSampleDropoutCrossEntropy,
    multi_sample_dropout,
    multi_sample_loss,
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

__all__ = [
    "DepthSchedule",
    "DropBlock2d",
    "DropoutSchedule",
    "MultiSampleDropout",
    "MultiSampleDropoutCrossEntropy",
    "RateSchedule",
    "ScheduledDropPath",
    "ScheduledDropout",
    "StochasticLayerShuffle",
    "TimeSchedule",
    "apply_layer_shuffle",
    "apply_progressive_drop_block",
    "apply_schedule",
    "apply_scheduled_drop_path",
    "drop_block2d",
    "drop_path",
    "drop_path_compact",
    "multi_sample_dropout",
    "multi_sample_loss",
    "progressive_rates",
    "set_drop_path_progress",
    "set_dropout",
    "shuffled_call",
]
