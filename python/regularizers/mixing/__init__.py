"""New training inputs mixed from old ones, and the losses that tie predictions on them together."""

__all__: list[str] = []
