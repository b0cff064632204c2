"""Triton kernels that mix rows against the references: on a GPU, or in the interpreter.

The interpreter has to be chosen before import: TRITON_INTERPRET=1 python -m pytest this file.
"""

import pytest
import torch

import regularizers
from regularizers.backend import interpreting, why_unavailable
from regularizers.ops import mix, paste_boxes
from tests.harness import DTYPES, TOLERANCES, forward_and_gradients

REASON = why_unavailable("triton")
if REASON:
    pytest.skip(REASON, allow_module_level=True)

pytestmark = pytest.mark.interpreter
DEVICE = "cpu" if interpreting() else "cuda"


def _randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def _tensor(*values):
    return torch.tensor(values, device=DEVICE)


def _on_both(call, tensors):
    found = []
    for backend in ("triton", "reference"):
        with regularizers.use_backend(backend):
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            result, gradients = forward_and_gradients(call, leaves)
        found.append((result, *gradients))
    return found


def assert_agree(call, *tensors):
    for have, want in zip(*_on_both(call, tensors), strict=True):
        assert have.stride() == want.stride()
        torch.testing.assert_close(have, want, **TOLERANCES[tensors[0].dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 1500])
def test_blends_and_their_gradients_agree(dtype, size):
    x, lam = _randn(4, size, dtype=dtype), _randn(4, seed=1).sigmoid()
    for perm in (_tensor(2, 0, 1, 3), _tensor(3, 0), _tensor(0)):
        assert_agree(lambda x, w, p=perm: mix(x, p, w[: len(p)]), x, lam)
        assert_agree(lambda x, p=perm: mix(x, p, 0.3), x)


def test_the_weight_alone_may_be_wanted():
    x = _randn(3, 2000)
    assert_agree(lambda w: mix(x, _tensor(2, 0, 1), w), _randn(3, seed=1).sigmoid())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_boxes_and_their_gradients_agree(dtype):
    each = _tensor([[0, 2], [1, 5]], [[1, 1], [0, 5]], [[0, 3], [0, 5]])
    image, volume = _randn(3, 2, 3, 5, dtype=dtype), _randn(3, 2, 2, 3, 4, dtype=dtype)
    perm = _tensor(2, 0, 1)
    for x, box in [
        (image, each),
        (image, each[0]),
        (image.to(memory_format=torch.channels_last), each),
        (image.to(memory_format=torch.channels_last), each[:, 1:]),
        (volume, _tensor([0, 1], [1, 3], [2, 4])),
        (volume.to(memory_format=torch.channels_last_3d), _tensor([0, 2], [1, 3], [0, 4])),
        (_randn(3, 2, 1100, dtype=dtype), _tensor([1000, 1050])),
    ]:
        assert_agree(lambda x, b=box: paste_boxes(x, perm, b), x)
    assert_agree(lambda x: paste_boxes(x, perm[:1], each[:1]), image)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.complex128], ids=str)
def test_boxes_are_pasted_between_rows_of_any_dtype(dtype):
    x = (10 * _randn(2, 3, 4, 5)).to(dtype)
    box = _tensor([1, 3], [0, 4])
    with regularizers.use_backend("triton"):
        found = paste_boxes(x, _tensor(1, 0), box)
    expected = x.clone()
    expected[:, :, 1:3, 0:4] = x.flip(0)[:, :, 1:3, 0:4]
    assert torch.equal(found, expected)


def test_empty_batches_agree():
    assert_agree(lambda x: mix(x, _tensor(1, 0), 0.5), _randn(2, 0))
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert_agree(lambda x: mix(x, none, 0.5), _randn(0, 3))
    assert_agree(lambda x: mix(x, none, 0.5), _randn(2, 3))
    assert_agree(lambda x: paste_boxes(x, none, _tensor([0, 1])), _randn(2, 3))
