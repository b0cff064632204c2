"""Triton kernels of the codebook search against the references: on a GPU, or in the interpreter."""

import pytest
import torch

import regularizers
from regularizers.ops import nearest_code, sample_code
from tests.harness import DTYPES
from tests.triton_harness import DEVICE, randn

# Without Triton the line above skips this file.
# isort: split
from regularizers.ops.triton import code_search as kernels

pytestmark = pytest.mark.interpreter
SIZES = [(1, 2, 1), (5, 7, 3), (37, 150, 35), (20, 300, 16)]


def assert_agree(call):
    with regularizers.use_backend("triton"):
        found = call()
    with regularizers.use_backend("reference"):
        assert torch.equal(found, call())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearest_codes_agree(dtype):
    for n, codes, features in SIZES:
        z, codebook = randn(n, features, dtype=dtype), randn(codes, features, dtype=dtype, seed=1)
        assert_agree(lambda z=z, e=codebook: nearest_code(z, e))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 50.0])
def test_draws_agree(dtype, temperature):
    for n, codes, features in SIZES:
        codebook = randn(codes, features, dtype=dtype)
        index = torch.arange(n, device=DEVICE) * 13 % codes
        for selected in (None, index % 3 == 0, index < 0):
            options = {"temperature": temperature, "selected": selected, "seed": 4}
            assert_agree(lambda i=index, e=codebook, o=options: sample_code(i, e, **o))


def test_codes_shared_out_over_programs_give_the_same(monkeypatch):
    monkeypatch.setattr(kernels, "TILE_CODES", 16)
    monkeypatch.setattr(kernels, "LEAST_STEPS", 2)
    z, codebook = randn(3, 8), randn(200, 8, seed=1)
    index = torch.tensor([0, 60, 199], device=DEVICE)
    assert_agree(lambda: nearest_code(z, codebook))
    assert_agree(lambda: sample_code(index, codebook, seed=1))


def test_of_equal_codes_the_first_counts():
    codebook = randn(3, 8).repeat(40, 1)
    with regularizers.use_backend("triton"):
        assert nearest_code(codebook[:6], codebook).tolist() == [0, 1, 2, 0, 1, 2]


def test_a_token_that_is_not_finite_gets_code_0():
    z = torch.tensor([[torch.nan, 0.0], [torch.inf, 0.0], [1.0, 1.0]], device=DEVICE)
    with regularizers.use_backend("triton"):
        found = nearest_code(z, torch.tensor([[0.0, 0.0], [1.0, 1.0]], device=DEVICE))
    assert found.tolist() == [0, 0, 1]


def test_no_tokens_give_no_codes():
    with regularizers.use_backend("triton"):
        assert nearest_code(randn(0, 3), randn(4, 3)).shape == (0,)
