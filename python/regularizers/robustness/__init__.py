"""Learning from noisy labels and under attack or shift."""

__all__: list[str] = []
