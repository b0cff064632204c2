"""Rigid motions, shapes and manifolds: transforms and the penalties on them."""

__all__: list[str] = []
