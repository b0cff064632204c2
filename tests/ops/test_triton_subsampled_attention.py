"""Triton kernels of gathered attention against the references: on a GPU, or in the interpreter."""

import pytest
import torch

import regularizers
from regularizers.ops import gathered_attention
from regularizers.ops.subsampled_attention import SAMPLE_WORDS
from tests import triton_harness
from tests.harness import DTYPES
from tests.triton_harness import DEVICE, randn

pytestmark = pytest.mark.interpreter


def _index(batch, tokens, n):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(tokens, generator=generator)[:n] for _ in range(batch)]
    return torch.stack(rows).to(DEVICE)


def assert_agree(call, *tensors):
    # Weights are rounded for the tensor cores, which the reference does not do.
    triton_harness.assert_agree(call, *tensors, half_factor=3)


def _problem(dtype, batch, queries, tokens, features, values):
    return (
        randn(batch, 2, queries, features, dtype=dtype),
        randn(batch, 2, tokens, features, dtype=dtype, seed=1),
        randn(batch, 2, tokens, values, dtype=dtype, seed=2),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "tokens", "n"), [(1, 3, 2), (70, 90, 67)])
def test_lists_of_samples_agree(dtype, queries, tokens, n):
    tensors = _problem(dtype, 2, queries, tokens, 5, 17)
    index = _index(2, tokens, n)
    index[0, 1] = -1
    assert_agree(lambda q, k, v: gathered_attention(q, k, v, index), *tensors)
    assert_agree(lambda q, k, v: gathered_attention(q, k, v, index[:1], scale=0.2), *tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_own_keys_causality_and_bias_agree(dtype):
    tensors = _problem(dtype, 2, 70, 70, 5, 17)
    index = _index(2, 70, 20)
    own = torch.ones(2, 70, dtype=torch.bool, device=DEVICE).scatter(1, index, False)
    own[0, 0] = False
    bias = randn(1, 2, 70, 70, dtype=dtype, seed=3)
    options = {"own": own, "is_causal": True}
    assert_agree(lambda q, k, v: gathered_attention(q, k, v, index, **options), *tensors)
    biased = lambda q, k, v, b: gathered_attention(q, k, v, index, attn_bias=b, **options)
    assert_agree(biased, *tensors, bias)


def test_windows_agree():
    tensors = _problem(torch.float32, 1, 50, 50, 8, 8)
    windows = torch.nn.functional.pad(_index(1, 50, 50), (0, 6), value=-1).view(1, 7, 8)
    options = {"query_index": windows, "is_causal": True}
    assert_agree(lambda q, k, v: gathered_attention(q, k, v, windows, **options), *tensors)


def test_strides_are_followed_and_empty_lists_give_zeros():
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in
               _problem(torch.float32, 2, 9, 9, 4, 4))  # fmt: skip
    assert_agree(lambda q, k, v: gathered_attention(q, k, v, _index(1, 9, 4)), q, k, v)
    none = torch.full((1, 3), -1, device=DEVICE)
    with regularizers.use_backend("triton"):
        assert (gathered_attention(q, k, v, none) == 0).all()


def test_words_of_samples_are_those_of_the_reference():
    seed = torch.tensor(-7, device=DEVICE)
    for elements in (1, 1025):
        words = [SAMPLE_WORDS.kernel(b)(seed, 3, elements, 2) for b in ("triton", "reference")]
        assert torch.equal(*words)
