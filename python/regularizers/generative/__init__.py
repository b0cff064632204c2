"""Losses and regularizers of generative models."""

from regularizers.generative.flow_matching import (
    flow_matching_loss,
)
from regularizers.generative.meanflow import (
    meanflow_loss,
    meanflow_sample,
)

__all__ = ["flow_matching_loss", "meanflow_loss", "meanflow_sample"]
