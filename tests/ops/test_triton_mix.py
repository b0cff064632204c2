"""Triton kernels that mix rows against the references: on a GPU, or in the interpreter."""

import pytest
import torch

import regularizers
from regularizers.ops import mix, paste_boxes
from tests.harness import DTYPES
from tests.triton_harness import DEVICE, assert_agree, randn

pytestmark = pytest.mark.interpreter


def _tensor(*values):
    return torch.tensor(values, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 1500])
def test_blends_and_their_gradients_agree(dtype, size):
    x, lam = randn(4, size, dtype=dtype), randn(4, seed=1).sigmoid()
    for perm in (_tensor(2, 0, 1, 3), _tensor(3, 0), _tensor(0)):
        assert_agree(lambda x, w, p=perm: mix(x, p, w[: len(p)]), x, lam)
        assert_agree(lambda x, p=perm: mix(x, p, 0.3), x)


def test_the_weight_alone_may_be_wanted():
    x = randn(3, 2000)
    assert_agree(lambda w: mix(x, _tensor(2, 0, 1), w), randn(3, seed=1).sigmoid())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_boxes_and_their_gradients_agree(dtype):
    each = _tensor([[0, 2], [1, 5]], [[1, 1], [0, 5]], [[0, 3], [0, 5]])
    image, volume = randn(3, 2, 3, 5, dtype=dtype), randn(3, 2, 2, 3, 4, dtype=dtype)
    perm = _tensor(2, 0, 1)
    for x, box in [
        (image, each),
        (image, each[0]),
        (image.to(memory_format=torch.channels_last), each),
        (image.to(memory_format=torch.channels_last), each[:, 1:]),
        (volume, _tensor([0, 1], [1, 3], [2, 4])),
        (volume.to(memory_format=torch.channels_last_3d), _tensor([0, 2], [1, 3], [0, 4])),
        (randn(3, 2, 1100, dtype=dtype), _tensor([1000, 1050])),
    ]:
        assert_agree(lambda x, b=box: paste_boxes(x, perm, b), x)
    assert_agree(lambda x: paste_boxes(x, perm[:1], each[:1]), image)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.complex128], ids=str)
def test_boxes_are_pasted_between_rows_of_any_dtype(dtype):
    x = (10 * randn(2, 3, 4, 5)).to(dtype)
    box = _tensor([1, 3], [0, 4])
    with regularizers.use_backend("triton"):
        found = paste_boxes(x, _tensor(1, 0), box)
    expected = x.clone()
    expected[:, :, 1:3, 0:4] = x.flip(0)[:, :, 1:3, 0:4]
    assert torch.equal(found, expected)


def test_empty_batches_agree():
    assert_agree(lambda x: mix(x, _tensor(1, 0), 0.5), randn(2, 0))
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert_agree(lambda x: mix(x, none, 0.5), randn(0, 3))
    assert_agree(lambda x: mix(x, none, 0.5), randn(2, 3))
    assert_agree(lambda x: paste_boxes(x, none, _tensor([0, 1])), randn(2, 3))
