"""Gram matrices and covariances: the formulas, the types, and large means."""

import pytest
import torch

from regularizers._shared.moments import center, covariance, gram, off_diagonal
from tests.harness import DTYPES


def test_covariance_is_that_of_torch_in_every_batch():
    x = torch.randn(3, 9, 4, dtype=torch.float64)
    for correction in (0, 1):
        expected = torch.stack([torch.cov(rows.T, correction=correction) for rows in x])
        torch.testing.assert_close(covariance(x, correction=correction), expected)


def test_gram_is_the_product_of_the_columns():
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    torch.testing.assert_close(gram(x), x.transpose(1, 2) @ x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_types_accumulate_in_float32(dtype):
    # 0.1 a thousand times: a half type would stop growing.
    x = torch.full((1000, 2), 0.1).to(dtype)
    found = gram(x)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), gram(x.double()), rtol=1e-4, atol=0)


def test_a_large_mean_costs_no_digits():
    x = torch.randn(100, 3)
    torch.testing.assert_close(covariance(x + 1000), covariance(x), rtol=2e-3, atol=2e-4)


def test_autocast_leaves_products_alone():
    x = torch.randn(50, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = covariance(x)
    assert torch.equal(found, covariance(x))


def test_center_gives_the_mean_and_the_count():
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    centered, mean, count = center(x, (0, 2))
    assert count == 8
    torch.testing.assert_close(mean, x.mean((0, 2), keepdim=True))
    torch.testing.assert_close(centered + mean, x)


def test_off_diagonal_keeps_the_rest_and_nan():
    x = torch.arange(9.0).reshape(3, 3)
    expected = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 5.0], [6.0, 7.0, 0.0]])
    assert torch.equal(off_diagonal(x), expected)
    assert off_diagonal(torch.full((2, 2), torch.nan)).isnan().all()
