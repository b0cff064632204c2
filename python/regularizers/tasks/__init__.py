"""Protocols and losses of particular tasks."""

__all__: list[str] = []
