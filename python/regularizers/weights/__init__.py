"""Weights of classes, samples and losses."""

__all__: list[str] = []
