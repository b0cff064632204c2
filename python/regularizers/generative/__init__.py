"""Losses and regularizers of generative models."""

__all__: list[str] = []
