"""Losses and regularizers of generative models."""

from regularizers.generative.flow_matching import flow_matching_loss

__all__ = ["flow_matching_loss"]
