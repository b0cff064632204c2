"""Triton kernels, one file a kernel family; imported when a CUDA tensor, or Triton's interpreter, asks for one."""
