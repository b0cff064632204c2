"""Sparse projections, transport duals and plans: the operator contract and facts of paper 122."""

import pytest
import torch

import regularizers
from regularizers.ops import (
    regularized_plan,
    sparse_projection,
    sparse_regularized_plan,
    transport_dual,
)
from regularizers.ops.sparse_ot import DUAL, PLAN, SPARSE_PLAN
from regularizers.ops.sparse_projection import PROJECTION, PROJECTION_BACKWARD
from tests.harness import OperatorContract, Sample, can_run, needs_kernels

GAMMA = torch.tensor(0.7, dtype=torch.float64)


def _randn(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class TestProjectionContract(OperatorContract):
    bitwise_across_threads = True
    autocast_dtype = torch.float32
    scheduled = {"z": (0.5, 3.0)}

    def samples(self, dtype):
        def sample(name, v, *more, **options):
            call = lambda v, z=1.0, **o: sparse_projection(v, z, **o)
            return Sample(name, (v, *more), call, options)

        return [
            sample("simplex", _randn(3, 7, dtype=dtype)),
            sample("top 3", _randn(4, 19, dtype=dtype, seed=1), k=3, z=2.0),
            sample("one for each", _randn(3, 5, dtype=dtype), _randn(3, dtype=dtype).abs(), k=2),
            sample("no sum", _randn(3, 9, dtype=dtype), k=2, z=None),
            sample("along another dimension", _randn(6, 2, 3, dtype=dtype), k=3, dim=0),
            sample("transposed", _randn(5, 4, dtype=dtype).t(), k=4),
            sample("one", _randn(1, 1, dtype=dtype)),
        ]

    def empty(self, dtype):
        call = lambda v, **o: sparse_projection(v, **o)
        return [
            Sample("no rows", (_randn(0, 3, dtype=dtype),), call, {"k": 2}),
            Sample("no entries", (_randn(2, 0, dtype=dtype),), call, {"z": None}),
        ]

    def operator_calls(self):
        v, z = _randn(3, 6).requires_grad_(), torch.ones(3, dtype=torch.float64).requires_grad_()
        out = PROJECTION.kernel(None)(v, z, 2).detach()
        grad = _randn(3, 6, seed=2).requires_grad_()
        return [
            (PROJECTION, (v, z, 2)),
            (PROJECTION, (v, None, 2)),
            (PROJECTION_BACKWARD, (grad, out, True)),
            (PROJECTION_BACKWARD, (grad, out, False)),
        ]

    def bad_inputs(self):
        v = _randn(3, 4)
        return [
            (TypeError, "v must", lambda: sparse_projection(v.long())),
            (ValueError, "z must", lambda: sparse_projection(v, -1.0)),
            (ValueError, "z must", lambda: sparse_projection(v, torch.tensor([1.0, -1.0, 1.0]))),
            (ValueError, "z must", lambda: sparse_projection(v, torch.ones(4))),
            (TypeError, "z must", lambda: sparse_projection(v, "1")),
            (ValueError, "k must", lambda: sparse_projection(v, k=0)),
            (TypeError, "k must", lambda: sparse_projection(v, k=1.5)),
            (ValueError, "dim must", lambda: sparse_projection(v, dim=2)),
        ]


def _problem(dtype, batch=(), n=3, m=4, seed=0):
    """alpha, cost, a, b, beta."""
    alpha, beta = 0.3 * _randn(*batch, m, seed=seed), 0.3 * _randn(*batch, n, seed=seed + 1)
    cost = _randn(*batch, n, m, seed=seed + 2)
    a, b = _randn(*batch, m, seed=seed + 3).abs(), _randn(*batch, n, seed=seed + 4).abs() + 0.1
    return tuple(tensor.to(dtype) for tensor in (alpha, cost, a, b, beta))


class TestDualContract(OperatorContract):
    bitwise_across_threads = True
    autocast_dtype = torch.float32
    scheduled = {"gamma": (0.2, 2.0)}

    def samples(self, dtype):
        def sample(name, beta=False, transposed=False, **options):
            problem = _problem(dtype, **options.pop("shape", {}))
            tensors = problem if beta else problem[:4]
            if transposed:
                tensors = tuple(t.mT.contiguous().mT if t.dim() > 1 else t for t in tensors)
            call = lambda *tensors, **o: transport_dual(*tensors, **o).value.to(dtype)
            return Sample(name, tensors, call, {"gamma": 0.7, **options})

        return [
            sample("quadratic"),
            sample("quadratic dual", beta=True, shape={"batch": (2,)}),
            sample("top 2", k=2, shape={"m": 9}),
            sample("top 2 dual", beta=True, k=2),
            sample("entropic", regularizer="entropic"),
            sample("entropic dual", beta=True, regularizer="entropic", transposed=True),
            sample("one", shape={"n": 1, "m": 1}),
        ]

    def empty(self, dtype):
        call = lambda *tensors, **o: transport_dual(*tensors, **o).value.to(dtype)
        return [Sample("no problems", _problem(dtype, batch=(0,))[:4], call, {})]

    def operator_calls(self):
        alpha, cost, a, b, beta = (t.requires_grad_() for t in _problem(torch.float64, (2,)))
        return [
            (DUAL, (alpha, side, cost, a, b, GAMMA, 2, code, envelope))
            for side in (None, beta)
            for code in (0, 1)
            for envelope in (False, True)
        ]

    def bad_inputs(self):
        alpha, cost, a, b, _ = _problem(torch.float32)

        def call(alpha=alpha, cost=cost, a=a, b=b, beta=None, **options):
            return lambda: transport_dual(alpha, cost, a, b, beta, **options)

        return [
            (ValueError, "cost must", call(cost=cost[0])),
            (TypeError, "cost must", call(cost=cost.long())),
            (ValueError, "alpha must", call(alpha=alpha[1:])),
            (ValueError, "a must", call(a=b)),
            (ValueError, "b must", call(b=a)),
            (ValueError, "beta must", call(beta=alpha)),
            (ValueError, "b must", call(b=b.to("meta"))),
            (ValueError, "gamma must", call(gamma=0.0)),
            (ValueError, "gamma must", call(gamma=torch.tensor(-1.0))),
            (ValueError, "regularizer must", call(regularizer="l2")),
            (ValueError, "k must", call(k=0)),
            (ValueError, "k must be None", call(k=2, regularizer="entropic")),
        ]


class TestPlanContract(OperatorContract):
    bitwise_across_threads = True
    autocast_dtype = torch.float32
    scheduled = {"gamma": (0.2, 2.0)}

    def samples(self, dtype):
        def sample(name, beta=False, sparse=False, **options):
            alpha, cost, _, b, side = _problem(dtype, **options.pop("shape", {}))
            plan = (
                (lambda *t, **o: sparse_regularized_plan(*t, **o)[0])
                if sparse
                else regularized_plan
            )
            tensors = (alpha, cost, b, side) if beta else (alpha, cost, b)
            return Sample(name, tensors, plan, {"gamma": 0.7, **options})

        return [
            sample("quadratic"),
            sample("quadratic dual", beta=True, shape={"batch": (2,)}),
            sample("top 2", k=2, shape={"m": 9}),
            sample("top 2 dual", beta=True, k=2),
            sample("entropic", regularizer="entropic", shape={"batch": (2, 1)}),
            sample("entropic dual", beta=True, regularizer="entropic"),
            sample("values", sparse=True, k=3, shape={"batch": (2,)}),
            sample("values of a dual", sparse=True, beta=True, k=3),
        ]

    def empty(self, dtype):
        alpha, cost, _, b, _ = _problem(dtype, batch=(0,))
        return [Sample("no problems", (alpha, cost, b), regularized_plan, {})]

    def operator_calls(self):
        alpha, cost, _, b, beta = (t.requires_grad_() for t in _problem(torch.float64, (2,)))
        plans = [(PLAN, (alpha, side, cost, b, GAMMA, 2, 1)) for side in (None, beta)]
        return [*plans, (SPARSE_PLAN, (alpha, beta, cost, b, GAMMA, 2))]

    def bad_inputs(self):
        alpha, cost, _, b, _ = _problem(torch.float32)
        return [
            (ValueError, "gamma must", lambda: regularized_plan(alpha, cost, b, gamma=-1.0)),
            (ValueError, "alpha must", lambda: regularized_plan(b, cost, b)),
            (ValueError, "k must", lambda: sparse_regularized_plan(alpha, cost, b, k=0)),
        ]


@pytest.mark.parametrize("k", [1, 2, 5, 40, 63, 64, 200, None])
@pytest.mark.parametrize("m", [1, 16, 33, 257])
@pytest.mark.parametrize("z", [1e-3, 1.0, 100.0])
def test_long_rows_agree_with_a_sort(m, k, z):
    # Every way through the kernel: few survivors, many, more than k, selection by halving.
    v = _randn(5, m, seed=m)
    with regularizers.use_backend("reference"):
        expected = sparse_projection(v, z, k=k)
    torch.testing.assert_close(sparse_projection(v, z, k=k), expected)


@pytest.mark.parametrize("k", [1, 3, 40])
def test_of_equal_entries_the_first_are_kept(k):
    v = torch.cat([torch.zeros(50), torch.ones(100)])
    support = sparse_projection(v, k=k).nonzero().flatten()
    assert support.tolist() == list(range(50, 50 + k))


def test_small_sums_beside_large_entries_keep_the_sum():
    v = 1e4 + torch.rand(100)
    torch.testing.assert_close(sparse_projection(v, 1e-6).sum(), torch.tensor(1e-6))


def test_nan_stays_in_its_row():
    v = torch.ones(2, 20)
    v[0, 3] = torch.nan
    found = sparse_projection(v, k=2)
    assert found[0].isnan().all()
    assert found[1].sum() == 1


def test_forbidden_places_get_nothing():
    v = torch.tensor([0.0, -torch.inf, 1.0])
    assert sparse_projection(v, 1e30)[1] == 0
    alpha, cost, _, b, _ = _problem(torch.float64)
    cost[:, 2] = torch.inf
    assert (regularized_plan(alpha, cost, b, k=3)[:, 2] == 0).all()


def test_dual_conjugate_by_hand():
    # Sheet of paper 122: s = [1, -1, 2], gamma 1.
    alpha, cost, zero = torch.tensor([1.0, -1.0, 2.0]), torch.zeros(1, 3), torch.zeros(1)
    found = {}
    for k in (1, 2, 3):
        dual = transport_dual(alpha, cost, torch.zeros(3), zero, zero, k=k)
        found[k] = (-dual.value.item(), (-dual.grad_alpha).tolist())
    assert found == {1: (2.0, [0, 0, 2]), 2: (2.5, [1, 0, 2]), 3: (2.5, [1, 0, 2])}


def test_potentials_are_not_changed():
    problem = _problem(torch.float64)
    copies = [tensor.clone() for tensor in problem]
    transport_dual(*problem, k=2)
    regularized_plan(*problem[:2], *problem[3:], k=2)
    assert all(torch.equal(new, old) for new, old in zip(problem, copies, strict=True))


@pytest.mark.parametrize("dual", [False, True])
def test_values_and_rows_make_up_the_plan(dual):
    alpha, cost, _, b, beta = _problem(torch.float64, (2,), n=5, m=40)
    side = beta if dual else None
    plan = regularized_plan(alpha, cost, b, side, k=4)
    values, rows = sparse_regularized_plan(alpha, cost, b, side, k=4)
    assert torch.equal(torch.zeros_like(plan).scatter_add(-1, rows, values), plan)


def test_multipliers_are_the_derivative_in_b():
    for regularizer in ("quadratic", "entropic"):
        alpha, cost, a, b, _ = _problem(torch.float64)
        b.requires_grad_()
        dual = transport_dual(alpha, cost, a, b, regularizer=regularizer)
        torch.testing.assert_close(torch.autograd.grad(dual.value, b)[0], dual.grad_beta)


def test_a_column_without_mass_stays_empty():
    for regularizer in ("quadratic", "entropic"):
        alpha, cost, a, b, _ = _problem(torch.float64)
        b[1] = 0
        assert (regularized_plan(alpha, cost, b, regularizer=regularizer)[1] == 0).all()
        assert all(t.isfinite().all() for t in transport_dual(alpha, cost, a, b))


@pytest.mark.parametrize("k", [None, 1])
@pytest.mark.parametrize("dual", [False, True])
@needs_kernels
def test_a_nan_among_the_scores_of_a_column_is_not_passed_over(dual, k):
    cost = torch.zeros(2, 40)
    cost[1, 17] = torch.nan
    beta = torch.zeros(2) if dual else None
    for backend in ("cpp", "reference"):
        with regularizers.use_backend(backend):
            plan = regularized_plan(torch.zeros(40), cost, torch.ones(2), beta, k=k)
            values, _ = sparse_regularized_plan(
                torch.zeros(40), cost, torch.ones(2), beta, k=k or 40
            )
            found = transport_dual(torch.zeros(40), cost, torch.ones(40), torch.ones(2), beta, k=k)
        assert plan[0].isfinite().all(), backend
        assert plan[1].isnan().all(), backend
        assert values[1].isnan().all(), backend
        assert found.value.isnan(), backend
        assert found.grad_beta.isnan().tolist() == [False, True], backend


def test_no_columns_cost_nothing():
    alpha, cost, b = torch.ones(3), torch.ones(0, 3), torch.ones(0)
    assert regularized_plan(alpha, cost, b).shape == (0, 3)
    assert sparse_regularized_plan(alpha, cost, b, k=2)[0].shape == (0, 2)
    assert transport_dual(alpha, cost, torch.ones(3), b).value == 3


def test_vectors_without_entries_project_to_themselves():
    for backend in filter(can_run, ("cpp", "reference")):
        with regularizers.use_backend(backend):
            assert sparse_projection(torch.ones(0, 8), k=1, dim=0).shape == (0, 8)


def test_reference_projects_a_vector_with_a_nan_to_nan_for_every_k():
    with regularizers.use_backend("reference"):
        assert sparse_projection(torch.tensor([1.0, torch.nan, 2.0]), k=1).isnan().all()
