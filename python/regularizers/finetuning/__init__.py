"""Methods that keep a pretrained model's knowledge while it learns a new task."""

from regularizers.finetuning.stages import StagedTraining

__all__ = ["StagedTraining"]
