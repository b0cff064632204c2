"""What the tests of Triton's kernels share: importing this file skips the tests without Triton.

They run on a GPU, or in the interpreter, which has to be chosen before import:
TRITON_INTERPRET=1 python -m pytest tests/ops/test_triton*.py
"""

import pytest
import torch

import regularizers
from regularizers.backend import interpreting, why_unavailable
from tests.harness import TOLERANCES, forward_and_gradients

REASON = why_unavailable("triton")
if REASON:
    pytest.skip(REASON, allow_module_level=True)

DEVICE = "cpu" if interpreting() else "cuda"


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def on_both(call, *tensors):
    """Return (result, *gradients) of the Triton kernels and of the reference."""
    found = []
    for backend in ("triton", "reference"):
        with regularizers.use_backend(backend):
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            result, gradients = forward_and_gradients(call, leaves)
        found.append((result, *gradients))
    return found


def assert_agree(call, *tensors, half_factor=1):
    """Compare result and gradients; ``half_factor`` widens the tolerance of the half types."""
    dtype = tensors[0].dtype
    factor = half_factor if dtype.itemsize == 2 else 1
    tolerances = {name: factor * value for name, value in TOLERANCES[dtype].items()}
    for have, want in zip(*on_both(call, *tensors), strict=True):
        torch.testing.assert_close(have, want, equal_nan=True, check_stride=True, **tolerances)
