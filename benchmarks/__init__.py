"""Benchmarks: one file a kernel family, run by ``python -m regularizers bench``."""
