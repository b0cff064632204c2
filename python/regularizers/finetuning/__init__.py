"""Methods that keep a pretrained model's knowledge while it learns a new task."""

__all__: list[str] = []
