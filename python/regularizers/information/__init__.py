"""Methods on mutual information, entropy and dependence: estimators, bounds and penalties."""

__all__: list[str] = []
