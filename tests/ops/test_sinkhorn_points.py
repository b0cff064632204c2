"""sinkhorn_points and transport_apply: the operator contract, and equality with stored costs."""

import math

import pytest
import torch

import regularizers
from regularizers.ops import sinkhorn, sinkhorn_points, transport_apply, transport_plan
from regularizers.ops._operator import accumulate_dtype
from regularizers.ops._sinkhorn_arguments import COSTS
from regularizers.ops.sinkhorn_points import SINKHORN_POINTS
from regularizers.ops.transport_apply import APPLY, MARGINAL_SOLVE, point_costs
from tests.harness import OperatorContract, Sample, run_python

TIGHT = {"tol": 1e-13, "max_iter": 25}


def clouds(rows, columns, features, *batch, dtype=torch.float32):
    """Return two clouds of points and logits of their masses."""
    generator = torch.Generator().manual_seed(rows + columns + features)
    shapes = ((rows, features), (columns, features), (rows,), (columns,))
    return tuple(
        (torch.randn(*batch, *shape, generator=generator, dtype=torch.float64) / 2).to(dtype)
        for shape in shapes
    )


def softmax(logits):
    return logits.to(accumulate_dtype(logits.dtype)).softmax(-1)


def exp(logits):
    return logits.to(accumulate_dtype(logits.dtype)).exp()


def value(x, y, a, b, **options):
    return sinkhorn_points(x, y, softmax(a), softmax(b), **options).value


def value_unbalanced(x, y, a, b, **options):
    return sinkhorn_points(x, y, exp(a), exp(b), **options).value


def potentials(x, y, a, b, **options):
    found = sinkhorn_points(x, y, softmax(a), softmax(b), **options)
    centred = found.f - found.f.mean(-1, keepdim=True)
    return torch.cat([centred, found.f[..., :1] + found.g], -1)


class TestContract(OperatorContract):
    # Sums over columns and rows have an order of their own; the products too: one thread a row.
    bitwise_across_threads = True
    autocast_dtype = torch.float32
    scheduled = {"epsilon": (0.3, 1.0)}

    def samples(self, dtype):
        def sample(name, shape, call=value, **options):
            options = {"epsilon": 0.8, **TIGHT, **options}
            return Sample(name, clouds(*shape, dtype=dtype), call, options)

        transposed = sample("transposed", (3, 4, 2))
        transposed.differentiable = tuple(
            tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
            for tensor in transposed.differentiable
        )
        return [
            sample("odd sizes", (3, 5, 2)),
            sample("batch", (3, 2, 2, 2), cost="euclidean"),
            sample("cosine", (3, 4, 3), cost="cosine", scale=2.0),
            sample("potentials", (3, 2, 2), potentials, scale=0.5),
            sample("unbalanced", (2, 3, 2), value_unbalanced, tau_a=0.5, tau_b=0.7),
            sample("one of each", (1, 1, 1)),
            transposed,
        ]

    def empty(self, dtype):
        options = {"epsilon": 0.8}
        return [
            Sample("no problems", clouds(3, 4, 2, 0, dtype=dtype), value, options),
            Sample("no rows", clouds(0, 4, 2, 2, dtype=dtype), value, options),
        ]

    def operator_calls(self):
        x, y, a, b = clouds(4, 5, 3, 2, dtype=torch.float64)
        sides = tuple(t.requires_grad_() for t in (x, y, softmax(a), softmax(b)))
        strength = torch.full((2,), 0.8, dtype=torch.float64)
        sizes = (torch.tensor([4, 3]), None)
        options = (1e-12, 60, 0, 1, 1.0, 1.0, 0.0, 0.9, 0.9, False, False)
        f, g, v = torch.zeros_like(a), torch.zeros_like(b), torch.rand_like(y)
        return [
            (SINKHORN_POINTS, (*sides, strength, None, None, *sizes, 0, 1.0, *options)),
            (APPLY, (*sides, strength, f, g, v, *sizes, 1, 1.0, True)),
            (MARGINAL_SOLVE, (*sides, strength, f, g, f, g, *sizes, 0, 1.0, 0.9, 0.9, "")),
        ]

    def bad_inputs(self):
        x, y, a, b = clouds(3, 4, 2)
        a, b = softmax(a), softmax(b)

        def call(x=x, y=y, a=a, b=b, **options):
            return lambda: sinkhorn_points(x, y, a, b, **{"epsilon": 0.1, **options})

        return [
            (TypeError, "x must", call(x=x.long())),
            (ValueError, "x must", call(x=x[0])),
            (ValueError, "x must be finite", call(x=x * math.nan)),
            (TypeError, "y must", call(y=y.double())),
            (ValueError, "y must", call(y=y[:, :1])),
            (ValueError, "y must", call(y=y[None])),
            (ValueError, "y must", call(b=None, y=y, symmetric=True)),
            (ValueError, "a must", call(a=b)),
            (ValueError, "b must", call(b=-b)),
            (ValueError, "equal sums", call(b=2 * b)),
            (ValueError, "cost must", call(cost="manhattan")),
            (ValueError, "scale must", call(scale=0.0)),
            (ValueError, "epsilon must", call(epsilon=-1.0)),
            (ValueError, "f0 must", call(f0=torch.zeros(2))),
        ]


class TestApplyContract(OperatorContract):
    bitwise_across_threads = True
    autocast_dtype = torch.float32
    scheduled = {"epsilon": (0.3, 1.0)}

    def samples(self, dtype):
        def sample(name, shape, **options):
            x, y, a, b = clouds(*shape, dtype=dtype)
            generator = torch.Generator().manual_seed(5)
            v = torch.rand(*y.shape[:-1], 3, generator=generator, dtype=torch.float64).to(dtype)
            call = lambda x, y, f, g, v, a, b, **more: transport_apply(
                x, y, f, g, v, exp(a), exp(b), **more
            )
            wide = accumulate_dtype(dtype)
            tensors = (x, y, a.to(wide), b.to(wide), v, a, b)
            return Sample(name, tensors, call, {"epsilon": 0.7, **options})

        return [
            sample("odd sizes", (3, 5, 2)),
            sample("euclidean batch", (2, 3, 2, 2), cost="euclidean"),
            sample("cosine", (3, 2, 3), cost="cosine"),
            sample("ragged", (4, 3, 2, 2), row_sizes=torch.tensor([4, 2])),
        ]

    def empty(self, dtype):
        x, y, f, g = clouds(0, 4, 2, dtype=dtype)
        call = lambda x, y, f, g: transport_apply(x, y, f, g, y, epsilon=0.7)
        return [Sample("no rows", (x, y, f, g), call, {})]

    def operator_calls(self):
        return [TestContract().operator_calls()[1]]

    def bad_inputs(self):
        x, y, f, g = clouds(3, 4, 2)
        return [
            (ValueError, "f must", lambda: transport_apply(x, y, g, f, y, epsilon=1.0)),
            (TypeError, "v must", lambda: transport_apply(x, y, f, g, y.long(), epsilon=1.0)),
            (ValueError, "v must", lambda: transport_apply(x, y, f, g, x, epsilon=1.0)),
            (ValueError, "epsilon", lambda: transport_apply(x, y, f, g, y, epsilon=0.0)),
        ]


def large(dtype=torch.float32, rows=300, columns=200, features=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    y = torch.randn(columns, features, generator=generator, dtype=torch.float64) * 1.3 + 0.5
    return x.to(dtype), y.to(dtype)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_solver_on_stored_costs(cost, dtype):
    x, y = large(dtype)
    stored = point_costs(x[None], y[None], COSTS.index(cost), 0.7)[0]
    for options in (
        {},
        {"tau_a": 0.8, "tau_b": 0.9},
        {"eps_init": 20.0, "eps_decay": 0.7},
        {"momentum": 1.0},
    ):
        options = {"epsilon": 0.2, "tol": 0, "max_iter": 60, **options}
        found = sinkhorn_points(x, y, cost=cost, scale=0.7, **options)
        expected = sinkhorn(stored, **options)
        tolerance = 1e-9 if dtype == torch.float64 else 3e-4
        torch.testing.assert_close(found.value, expected.value, rtol=tolerance, atol=0)
        plan = transport_plan(stored, expected.f, expected.g, epsilon=0.2)
        again = transport_plan(stored, found.f, found.g, epsilon=0.2)
        assert (plan - again).abs().sum() < tolerance * 10


@pytest.mark.parametrize("cost", COSTS)
def test_gradients_in_the_points_equal_those_through_stored_costs(cost):
    x, y = large(torch.float64, 40, 30, 3)
    results = []
    for stored in (False, True):
        leaves = (x.clone().requires_grad_(), y.clone().requires_grad_())
        if stored:
            matrix = point_costs(*(side[None] for side in leaves), COSTS.index(cost), 0.7)[0]
            found = sinkhorn(matrix, epsilon=0.3, tol=1e-11)
        else:
            found = sinkhorn_points(*leaves, cost=cost, scale=0.7, epsilon=0.3, tol=1e-11)
        centred = (found.f - found.f.mean()).square().sum() + (found.f[0] + found.g).sin().sum()
        results.append(torch.autograd.grad(found.value + centred, leaves))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


def test_far_from_the_origin_nothing_cancels():
    x, y = large()
    near = sinkhorn_points(x, y, epsilon=0.5, tol=1e-5)
    far = sinkhorn_points(x + 1000, y + 1000, epsilon=0.5, tol=1e-5)
    # float32 rounds the shifted points themselves to 6e-5.
    torch.testing.assert_close(far.value, near.value, rtol=1e-4, atol=0)


def test_points_without_mass_may_be_anything():
    x, y = large(torch.float64, 30, 20)
    a = torch.full((30,), 1 / 28, dtype=torch.float64)
    a[[3, 7]] = 0
    few = sinkhorn_points(x[a > 0], y, epsilon=0.5, tol=1e-11)
    spoilt = x.clone()
    spoilt[3], spoilt[7] = math.nan, math.inf
    spoilt.requires_grad_()
    for backend in ("cpp", "reference"):
        with regularizers.use_backend(backend):
            found = sinkhorn_points(spoilt, y, a, epsilon=0.5, tol=1e-11)
            (gradient,) = torch.autograd.grad(found.value, spoilt)
        torch.testing.assert_close(found.value, few.value)
        assert gradient.isfinite().all()
        assert (gradient[[3, 7]] == 0).all()


def test_euclidean_gradient_is_zero_at_distance_zero():
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    found = sinkhorn_points(x, torch.zeros(2, 3, dtype=torch.float64), cost="euclidean", epsilon=1)
    assert torch.equal(torch.autograd.grad(found.value, x)[0], torch.zeros_like(x))


def test_translation_costs_its_squared_length():
    # Sheet of paper 42: with x = y + v the terms of S(x, y) differ by |v|^2, for every epsilon.
    x, _ = large(torch.float64, 60)
    v = torch.tensor([1.5, 0.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    for epsilon in (5.0, 0.5):
        values = [sinkhorn_points(x, y, epsilon=epsilon, tol=1e-10).value for y in (x + v, x)]
        torch.testing.assert_close(values[0] - values[1], v.square().sum(), rtol=0, atol=1e-7)


def test_symmetric_update_gives_the_same_value():
    x, _ = large(torch.float64)
    alternating = sinkhorn_points(x, x, epsilon=1.0, tol=1e-10)
    for backend in ("cpp", "reference"):
        with regularizers.use_backend(backend):
            found = sinkhorn_points(x, x, epsilon=1.0, tol=1e-10, symmetric=True)
        assert found.converged
        torch.testing.assert_close(found.value, alternating.value)


def test_ragged_batch_equals_its_problems_one_by_one():
    x, y = (torch.stack([side, side + 0.1]) for side in large(torch.float64, 40, 50))
    rows, columns = torch.tensor([40, 23]), torch.tensor([11, 50])
    for i in range(2):
        x[i, rows[i] :], y[i, columns[i] :] = math.nan, math.nan
    options = {"epsilon": 1.0, "tol": 1e-10}
    found = sinkhorn_points(x, y, row_sizes=rows, column_sizes=columns, **options)
    for i in range(2):
        alone = sinkhorn_points(x[i, : rows[i]], y[i, : columns[i]], **options)
        torch.testing.assert_close(found.value[i], alone.value)
        assert (found.f[i, rows[i] :] == 0).all()


def test_apply_multiplies_by_the_plan():
    x, y = large(torch.float64)
    v = torch.randn(200, 70, dtype=torch.float64)
    found = sinkhorn_points(x, y, epsilon=0.5)
    plan = transport_plan(point_costs(x[None], y[None], 0, 1.0)[0], found.f, found.g, epsilon=0.5)
    torch.testing.assert_close(transport_apply(x, y, found.f, found.g, v, epsilon=0.5), plan @ v)
    u = torch.randn(300, 1, dtype=torch.float64)
    back = transport_apply(y, x, found.g, found.f, u, epsilon=0.5)
    torch.testing.assert_close(back, plan.T @ u)


def test_streaming_holds_no_array_of_all_pairs():
    script = """
import resource, torch
from regularizers.ops import sinkhorn_points
x, y = (torch.randn(8000, 16, requires_grad=True) for _ in range(2))
sinkhorn_points(x[:64], y[:64], epsilon=5.0, tol=0, max_iter=2).value.backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sinkhorn_points(x, y, epsilon=5.0, tol=0, max_iter=2).value.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    kibibytes = int(run_python(script).stdout)
    assert kibibytes < 8000 * 8000 * 4 / 1024 / 10


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_point_with_mass_that_is_not_finite_is_refused(cost, value):
    x, y = torch.tensor([[value], [1.0]]), torch.tensor([[0.0], [1.0]])
    f = torch.zeros(2)
    for one, other, name in ((x, y, "x"), (y, x, "y")):
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            sinkhorn_points(one, other, epsilon=1.0, cost=cost)
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            transport_apply(one, other, f, f, y, epsilon=1.0, cost=cost)


@pytest.mark.parametrize("cost", range(len(COSTS)))
def test_the_reference_costs_of_a_nan_are_nan(cost):
    x = torch.tensor([[[math.nan], [1.0]]])
    assert point_costs(x, torch.ones(1, 1, 1), cost, 1.0).isnan().tolist() == [[[True], [False]]]
