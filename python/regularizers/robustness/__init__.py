"""Learning from noisy labels and under attack or shift."""

from regularizers.robustness.co_teaching import forget_rate_schedule, small_loss_select

__all__ = ["forget_rate_schedule", "small_loss_select"]
