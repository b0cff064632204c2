"""Methods on what a network's features look like: self-supervision, attention, collapse."""

__all__: list[str] = []
