"""Mixing rows on a CUDA device: the values of the CPU, large rows, repeatable bits."""

import pytest
import torch

from regularizers.mixing import cutmix
from regularizers.ops import mix, paste_boxes
from tests.harness import DTYPES, TOLERANCES, forward_and_gradients

pytestmark = pytest.mark.gpu


def _on(device, call, *tensors):
    leaves = [tensor.detach().to(device).requires_grad_() for tensor in tensors]
    result, gradients = forward_and_gradients(call, leaves)
    return [value.cpu() for value in (result, *gradients)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blends_agree_with_the_cpu_and_repeat_bit_by_bit(dtype):
    x = torch.randn(37, 3, 33, 35, generator=torch.Generator().manual_seed(0)).to(dtype)
    lam, perm = torch.rand(37), torch.randperm(37)
    call = lambda x, lam: mix(x, perm.to(x.device), lam)
    found, again, expected = (_on(device, call, x, lam) for device in ("cuda", "cuda", "cpu"))
    for have, same, want in zip(found, again, expected, strict=True):
        assert torch.equal(have, same)
        # A product for a weight is a sum of 3465 terms of size 1.
        torch.testing.assert_close(have, want, rtol=TOLERANCES[dtype]["rtol"], atol=1e-2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_boxes_agree_with_the_cpu(layout):
    x = torch.randn(37, 3, 33, 35).to(memory_format=layout)
    perm = torch.randperm(37)
    begin = torch.randint(0, 16, (37, 2))
    box = torch.stack([begin, begin + 9], -1)
    call = lambda x: paste_boxes(x, perm.to(x.device), box.to(x.device))
    for have, want in zip(_on("cuda", call, x), _on("cpu", call, x), strict=True):
        assert torch.equal(have, want)


def test_a_row_of_more_blocks_than_a_short_axis_of_the_grid_has():
    x = torch.arange(1 << 27, dtype=torch.float32, device="cuda").view(2, -1, 64)
    perm = torch.tensor([1, 0], device="cuda")
    assert torch.equal(mix(x, perm, 0.0), x[perm])
    box = torch.tensor([[0, x.shape[1]], [0, 64]], device="cuda")
    assert torch.equal(paste_boxes(x, perm, box), x[perm])


def test_one_state_of_a_generator_gives_the_batch_of_the_cpu():
    x, y = torch.randn(16, 3, 20, 24), torch.arange(16)
    for options in ({}, {"per_sample": True}, {"prob": 0.5}):
        found, expected = (
            cutmix(
                x.to(device), y.to(device), generator=torch.Generator().manual_seed(3), **options
            )
            for device in ("cuda", "cpu")
        )
        for have, want in zip(found, expected, strict=True):
            assert torch.equal(have.cpu(), want)
