"""Gathered attention on a CUDA device: values and draws of the CPU, repeatable bits, memory."""

import pytest
import torch

from regularizers.dropout import sample_keys, subsampled_attention
from regularizers.ops import gathered_attention
from tests.harness import DTYPES, TOLERANCES

pytestmark = pytest.mark.gpu


def _qkv(dtype, tokens=700, features=64):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, tokens, features)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def _run(tensors, **options):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    result = subsampled_attention(*leaves, seed=3, **options)
    result.backward(torch.ones_like(result))
    return [result.detach(), *(leaf.grad for leaf in leaves)]


def test_keys_are_those_of_the_cpu():
    padding = torch.zeros(4, 1000, dtype=torch.bool)
    padding[1, 300:] = True
    options = {"seed": 5}
    for mask in (None, padding):
        expected = sample_keys(4, 1000, 400, key_padding_mask=mask, **options)
        on_device = None if mask is None else mask.cuda()
        found = sample_keys(4, 1000, 400, key_padding_mask=on_device, device="cuda", **options)
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [31, 64, 128, 256])
def test_results_and_gradients_agree_with_the_cpu_and_repeat_bit_by_bit(dtype, features):
    tensors = _qkv(dtype, features=features)
    # Half types: weights are rounded for the tensor cores. float32: three products in tf32.
    tolerances = {name: 4 * value for name, value in TOLERANCES[dtype].items()}
    for options in (
        {"num_keys": 150},
        {"num_keys": 150, "is_causal": True},
        {"window": 150, "mode": "local", "is_causal": True},
    ):
        expected = _run(tensors, **options)
        on_device = [tensor.cuda() for tensor in tensors]
        found, again = (_run(on_device, **options) for _ in range(2))
        for have, same, want in zip(found, again, expected, strict=True):
            assert torch.equal(have, same)
            torch.testing.assert_close(have.cpu(), want, **tolerances)


def test_nothing_of_the_size_of_the_weights_is_stored():
    q, k, v = (tensor.cuda().requires_grad_() for tensor in _qkv(torch.float32, tokens=4096))
    keys = sample_keys(2, 4096, 2048, seed=0, device="cuda")
    gathered_attention(q, k, v, keys).sum().backward()  # compiles
    q.grad = k.grad = v.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gathered_attention(q, k, v, keys).sum().backward()
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 8 * q.nbytes < 2 * 3 * 4096 * 2048 * 4
