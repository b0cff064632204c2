"""Triton kernels of sparse transport against the references: on a GPU, or in the interpreter."""

import pytest
import torch

import regularizers
from regularizers.ops import (
    regularized_plan,
    sparse_projection,
    sparse_regularized_plan,
    transport_dual,
)
from regularizers.transport import SparsityConstrained, SquaredL2, regularized_ot
from tests.harness import DTYPES, TOLERANCES
from tests.triton_harness import DEVICE, assert_agree, randn

# Without Triton the line above skips this file.
# isort: split
from regularizers.ops.triton import sparse_ot as kernels

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 65])
def test_projections_agree(dtype, size):
    v, z = randn(3, size, dtype=dtype), randn(3, dtype=dtype, seed=1).abs()
    for k in (None, 1, 5):
        assert_agree(lambda v, z, k=k: sparse_projection(v, z, k=k), v, z)
        assert_agree(lambda v, k=k: sparse_projection(v, None, k=k), v)


@pytest.mark.parametrize("k", [1, 3, 40])
def test_of_equal_entries_the_first_are_kept(k):
    v = torch.cat([torch.zeros(50), -torch.ones(10), torch.ones(100)]).to(DEVICE)
    with regularizers.use_backend("triton"):
        support = sparse_projection(v, k=k).nonzero().flatten()
    assert support.tolist() == list(range(60, 60 + k))


def test_nan_stays_in_its_row_and_no_mass_gives_zeros():
    v = torch.ones(3, 20, device=DEVICE)
    v[0, 3] = torch.nan
    with regularizers.use_backend("triton"):
        found = sparse_projection(v, torch.tensor([1.0, 1.0, 0.0], device=DEVICE), k=2)
    assert found[0].isnan().all()
    assert found[1:].sum(1).tolist() == [1, 0]


def _problem(dtype, batch, n, m):
    alpha, beta = 0.3 * randn(batch, m), 0.3 * randn(batch, n, seed=1) - 0.5
    cost, a, b = randn(batch, n, m, seed=2), randn(batch, m, seed=3), randn(batch, n, seed=4)
    return [t.to(dtype) for t in (alpha, cost, a.abs(), b.abs() + 0.1, beta)]


OPTIONS = [{"k": None}, {"k": 1}, {"k": 3}, {"regularizer": "entropic"}]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dual", [False, True])
def test_duals_and_plans_agree(dtype, dual):
    for sizes in ((1, 1, 1), (2, 5, 19)):
        alpha, cost, a, b, beta = _problem(dtype, *sizes)
        for options in OPTIONS:
            side = (beta,) if dual else ()
            value = lambda *t, o=options: transport_dual(*t, gamma=0.7, **o).value
            assert_agree(value, alpha, cost, a, b, *side)
            plan = lambda *t, o=options: regularized_plan(*t, gamma=0.7, **o)
            assert_agree(plan, alpha, cost, b, *side)


def test_more_columns_than_strips_and_a_column_without_mass(monkeypatch):
    monkeypatch.setattr(kernels, "FILLING_PROGRAMS", 3)
    alpha, cost, a, b, _ = _problem(torch.float32, 1, 8, 9)
    b[0, 7] = 0
    for options in OPTIONS:
        results = []
        for backend in ("triton", "reference"):
            with regularizers.use_backend(backend):
                results.append(transport_dual(alpha, cost, a, b, **options))
        for have, want in zip(*results, strict=True):
            torch.testing.assert_close(have, want, **TOLERANCES[torch.float32])


def test_values_and_rows_agree():
    alpha, cost, _, b, _ = _problem(torch.float32, 2, 4, 21)
    found = []
    for backend in ("triton", "reference"):
        with regularizers.use_backend(backend):
            found.append(sparse_regularized_plan(alpha, cost, b, k=3))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("regularizer", [SquaredL2(1.0), SparsityConstrained(1.0, 4)], ids=repr)
def test_a_solver_runs_on_the_kernels(regularizer):
    cost = randn(9, 6).abs()
    found = []
    for backend in ("triton", "reference"):
        with regularizers.use_backend(backend):
            found.append(regularized_ot(cost, regularizer=regularizer, max_iter=15))
    torch.testing.assert_close(found[0].dual_value, found[1].dual_value, rtol=1e-3, atol=1e-4)
