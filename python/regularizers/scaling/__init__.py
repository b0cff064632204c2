"""Laws and tools of training at scale: repeated data, sparse proxies."""

__all__: list[str] = []
