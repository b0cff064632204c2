"""Triton kernels, one file a kernel family; imported when a CUDA tensor or the interpreter asks."""
