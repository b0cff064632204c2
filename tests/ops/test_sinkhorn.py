"""sinkhorn and transport_plan: the operator contract, and what a solver of transport promises."""

import math

import pytest
import torch

import regularizers
from regularizers.ops import sinkhorn, transport_plan
from regularizers.ops._marginal_solve import MARGINAL_SOLVE
from regularizers.ops._operator import accumulate_dtype
from regularizers.ops.sinkhorn import SINKHORN, TRANSPORT_PLAN
from tests.harness import OperatorContract, Sample

TIGHT = {"tol": 1e-13, "max_iter": 30}


def problem(rows, columns, *batch, dtype=torch.float32):
    """Return costs in [0, 1] and logits of masses."""
    generator = torch.Generator().manual_seed(rows + columns)
    cost = torch.rand(*batch, rows, columns, generator=generator, dtype=torch.float64)
    a, b = (
        torch.randn(*batch, count, generator=generator, dtype=torch.float64) / 2
        for count in (rows, columns)
    )
    return cost.to(dtype), a.to(dtype), b.to(dtype)


def wide(tensor):
    return tensor.to(accumulate_dtype(tensor.dtype))


def value(cost, a, b, **options):
    """Solve with softmax masses, which stay balanced whatever is done to the logits."""
    return sinkhorn(cost, wide(a).softmax(-1), wide(b).softmax(-1), **options).value


def value_unbalanced(cost, a, b, **options):
    return sinkhorn(cost, wide(a).exp(), wide(b).exp(), **options).value


def potentials(cost, a, b, **options):
    """Give what a balanced problem fixes of f and g: f without its mean, and f + g."""
    found = sinkhorn(cost, wide(a).softmax(-1), wide(b).softmax(-1), **options)
    centred = found.f - found.f.mean(-1, keepdim=True)
    return torch.cat([centred, found.f[..., :1] + found.g], -1)


class TestContract(OperatorContract):
    bitwise_across_threads = True
    autocast_dtype = torch.float32
    scheduled = {"epsilon": (0.2, 1.0)}

    def samples(self, dtype):
        def sample(name, shape, call=value, **options):
            options = {"epsilon": 0.5, **TIGHT, **options}
            return Sample(name, problem(*shape, dtype=dtype), call, options)

        transposed = sample("transposed", (4, 5))
        cost, *logits = transposed.differentiable
        transposed.differentiable = (cost.t().contiguous().t(), *logits)
        return [
            sample("odd sizes", (3, 5)),
            sample("batch", (4, 3, 2)),
            sample("potentials", (3, 4), potentials),
            sample("unbalanced", (3, 5), value_unbalanced, tau_a=0.5, tau_b=0.7),
            sample("half unbalanced", (3, 4), value_unbalanced, tau_b=0.4),
            sample("annealed", (3, 4), eps_init=4.0, eps_decay=0.5),
            sample("one of each", (1, 1)),
            transposed,
        ]

    def empty(self, dtype):
        return [
            Sample("no problems", problem(3, 4, 0, dtype=dtype), value, {"epsilon": 0.4}),
            Sample("no rows", problem(0, 4, 2, dtype=dtype), value, {"epsilon": 0.4}),
        ]

    def operator_calls(self):
        cost, a, b = problem(4, 5, 2, dtype=torch.float64)
        a, b = a.softmax(-1).requires_grad_(), b.softmax(-1).requires_grad_()
        cost.requires_grad_()
        strength = torch.full((2,), 0.4, dtype=torch.float64)
        sizes = (torch.tensor([4, 3]), None)
        options = (1e-12, 60, 0, 1, 1.0, 1.0, 0.0, 0.9, 0.9, False, False)
        f, g = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.float64)
        plan = torch.rand(2, 4, 5, dtype=torch.float64, requires_grad=True)
        return [
            (SINKHORN, (cost, a, b, strength, None, None, *sizes, *options)),
            (TRANSPORT_PLAN, (cost, a, b, strength, f, g, torch.ones_like(f[:, 0]), *sizes)),
            (MARGINAL_SOLVE, (plan, torch.rand_like(f), torch.rand_like(g), 0.9, 0.8)),
        ]

    def bad_inputs(self):
        cost, a, b = problem(3, 4)
        a, b = a.softmax(-1), b.softmax(-1)

        def call(cost=cost, a=a, b=b, **options):
            return lambda: sinkhorn(cost, a, b, **{"epsilon": 0.1, **options})

        nan = cost.clone()
        nan[1, 2] = math.nan
        return [
            (TypeError, "cost must", call(cost=cost.long())),
            (TypeError, "cost must", call(cost=[[0.0]])),
            (ValueError, "cost must", call(cost=cost[0])),
            (ValueError, "cost must", call(cost=nan)),
            (ValueError, "cost must", call(cost=torch.full((3, 4), math.inf))),
            (ValueError, "cost must", call(a=None, b=None, symmetric=True)),
            (TypeError, "a must", call(a=a.long())),
            (ValueError, "a must", call(a=a[:2])),
            (ValueError, "a must", call(a=-a)),
            (ValueError, "a must", call(a=a * math.nan)),
            (ValueError, "a must", call(a=a.to("meta"))),
            (ValueError, "b must", call(b=b[:, None])),
            (ValueError, "a and b must have equal sums", call(a=2 * a)),
            (TypeError, "epsilon must", call(epsilon="small")),
            (ValueError, "epsilon must", call(epsilon=0.0)),
            (ValueError, "epsilon must", call(epsilon=math.nan)),
            (ValueError, "epsilon must", call(epsilon=torch.tensor(-1.0))),
            (ValueError, "epsilon must", call(epsilon=torch.ones(2))),
            (ValueError, "max_iter must", call(max_iter=0)),
            (TypeError, "max_iter must", call(max_iter=10.0)),
            (ValueError, "min_iter must", call(min_iter=-1)),
            (ValueError, "inner_iter must", call(inner_iter=0)),
            (ValueError, "tol must", call(tol=-1e-3)),
            (ValueError, "tol must", call(tol=math.nan)),
            (ValueError, "norm_error must", call(norm_error="l2")),
            (ValueError, "eps_init must", call(eps_init=0.5)),
            (ValueError, "eps_decay must", call(eps_decay=0.0)),
            (ValueError, "momentum must", call(momentum=2.0)),
            (ValueError, "momentum must", call(momentum="heavy")),
            (ValueError, "tau_a must", call(tau_a=0.0)),
            (ValueError, "tau_b must", call(tau_b=1.5)),
            (ValueError, "f0 must", call(f0=torch.zeros(2))),
            (ValueError, "g0 must", call(g0=torch.zeros(3))),
            (ValueError, "row_sizes must", call(row_sizes=torch.tensor([3]))),
            (ValueError, "column_sizes must", call(column_sizes=torch.tensor(5))),
        ]


class TestPlanContract(OperatorContract):
    bitwise_across_threads = True
    autocast_dtype = torch.float32
    scheduled = {"epsilon": (0.2, 1.0)}

    def samples(self, dtype):
        def sample(name, rows, columns, *batch, **options):
            cost, a, b = problem(rows, columns, *batch, dtype=dtype)
            call = lambda cost, f, g, a, b, **more: transport_plan(
                cost, f, g, wide(a).exp(), wide(b).exp(), **more
            )
            tensors = (cost, wide(a), wide(b), a, b)
            return Sample(name, tensors, call, {"epsilon": 0.7, **options})

        return [
            sample("odd sizes", 3, 5),
            sample("batch", 2, 17, 3),
            sample("ragged", 4, 3, 2, row_sizes=torch.tensor([4, 2])),
            sample("one of each", 1, 1),
        ]

    def empty(self, dtype):
        return [Sample("no rows", problem(0, 4, dtype=dtype), self.rowless, {})]

    @staticmethod
    def rowless(cost, a, b):
        return transport_plan(cost, a, b, epsilon=1.0)

    def operator_calls(self):
        calls = TestContract().operator_calls()
        return [calls[1]]

    def bad_inputs(self):
        cost, f, g = problem(3, 4)
        return [
            (TypeError, "f must", lambda: transport_plan(cost, "f", g, epsilon=1.0)),
            (ValueError, "f must", lambda: transport_plan(cost, g, f, epsilon=1.0)),
            (ValueError, "g must", lambda: transport_plan(cost, f, f, epsilon=1.0)),
            (ValueError, "epsilon", lambda: transport_plan(cost, f, g, epsilon=0.0)),
        ]


def test_two_points_in_closed_form():
    # Sheet of paper 42: the value is -epsilon log((1 + exp(-1 / epsilon)) / 2).
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    for epsilon, expected in ((1.0, 0.379885), (0.1, 0.0693102)):
        found = sinkhorn(cost, epsilon=epsilon, tol=1e-12)
        exact = -epsilon * math.log((1 + math.exp(-1 / epsilon)) / 2)
        assert abs(found.value.item() - exact) < 1e-12
        assert abs(exact - expected) < 1e-6
    plan = transport_plan(cost, *sinkhorn(cost, epsilon=1.0, tol=1e-12)[:2], epsilon=1.0)
    expected = torch.tensor([[0.365529, 0.134471], [0.134471, 0.365529]], dtype=torch.float64)
    torch.testing.assert_close(plan, expected, atol=1e-6, rtol=0)


def large(dtype=torch.float32, rows=300, columns=200, seed=0):
    """Return squared distances of two clouds in the plane, over their maximum."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    y = torch.randn(columns, 2, generator=generator, dtype=torch.float64) * 1.3 + 0.5
    cost = torch.cdist(x, y).square()
    return (cost / cost.max()).to(dtype)


@pytest.mark.parametrize("epsilon", [0.05, 0.005, 0.0005])
def test_marginals_are_met_at_any_epsilon(epsilon):
    cost = large()
    found = sinkhorn(cost, epsilon=epsilon, tol=1e-4)
    plan = transport_plan(cost, found.f, found.g, epsilon=epsilon).double()
    assert found.converged
    assert found.marginal_error <= 1e-4
    # Rounding of the potentials to float32 moves every entry by about 1e-7 / epsilon.
    rounding = 2e-7 / epsilon
    assert (plan.sum(1) - 1 / 300).abs().sum() < 1e-5 + rounding
    assert (plan.sum(0) - 1 / 200).abs().sum() < 1.1e-4 + rounding


@pytest.mark.parametrize("epsilon", [0.05, 0.005])
def test_plan_in_float32_is_near_the_plan_in_float64(epsilon):
    cost = large(torch.float64)
    plans = []
    for dtype in (torch.float32, torch.float64):
        found = sinkhorn(cost.to(dtype), epsilon=epsilon, tol=0, max_iter=50)
        plans.append(transport_plan(cost.to(dtype), found.f, found.g, epsilon=epsilon).double())
    assert (plans[0] - plans[1]).abs().sum() < 1e-4


def test_tol_zero_runs_all_iterations():
    assert sinkhorn(large(), epsilon=0.5, tol=0, max_iter=37).n_iter == 37


def test_reported_error_is_that_of_the_columns():
    cost = large(torch.float64)
    for options in ({"momentum": 1.0}, {}):
        found = sinkhorn(cost, epsilon=0.01, tol=0, max_iter=7, **options)
        plan = transport_plan(cost, found.f, found.g, epsilon=0.01)
        error = (plan.sum(0) - 1 / 200).abs().sum()
        torch.testing.assert_close(found.marginal_error, error, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(plan.sum(1), torch.full_like(plan[:, 0], 1 / 300))


def test_largest_error_is_what_linf_reports():
    cost = large(torch.float64)
    options = {"epsilon": 0.01, "tol": 0, "max_iter": 3}
    found = sinkhorn(cost, norm_error="linf", **options)
    plan = transport_plan(cost, found.f, found.g, epsilon=0.01)
    torch.testing.assert_close(found.marginal_error, (plan.sum(0) - 1 / 200).abs().max())


def test_over_relaxation_reaches_the_same_plan_in_fewer_iterations():
    cost = large(torch.float64)
    plain = sinkhorn(cost, epsilon=0.005, tol=1e-9, momentum=1.0)
    relaxed = sinkhorn(cost, epsilon=0.005, tol=1e-9)
    assert plain.converged
    assert relaxed.converged
    assert relaxed.n_iter < plain.n_iter / 2
    plans = [transport_plan(cost, o.f, o.g, epsilon=0.005) for o in (plain, relaxed)]
    assert (plans[0] - plans[1]).abs().sum() < 1e-6


def test_stored_kernel_is_given_up_when_potentials_drift():
    # Rows whose cheapest column is shared by all: potentials move by hundreds of epsilon.
    cost = (torch.arange(48.0)[:, None] - torch.arange(48.0) ** 1.3).abs() / 48
    with regularizers.use_backend("reference"):
        expected = sinkhorn(cost.double(), epsilon=2e-3, tol=1e-6)
    assert expected.f.max() - expected.f.min() > 400 * 2e-3
    for dtype in (torch.float32, torch.float64):
        found = sinkhorn(cost.to(dtype), epsilon=2e-3, tol=1e-4)
        assert found.converged
        torch.testing.assert_close(found.value.double(), expected.value, rtol=1e-4, atol=0)


def test_columns_that_underflow_are_computed_exactly():
    # After the first rows are updated, the last column gets exp(-2000) of the mass.
    cost = torch.tensor([[0.0, 5.0], [0.0, 2.0]])
    found = sinkhorn(cost, epsilon=1e-3, tol=1e-6)
    plan = transport_plan(cost, found.f, found.g, epsilon=1e-3)
    torch.testing.assert_close(plan, torch.tensor([[0.5, 0.0], [0.0, 0.5]]), atol=1e-4, rtol=0)


def test_points_without_mass_change_nothing_and_never_give_nan():
    cost = large(torch.float64, 20, 30)
    a, b = torch.ones(20, dtype=torch.float64) / 18, torch.ones(30, dtype=torch.float64) / 29
    a[[3, 7]], b[4] = 0, 0
    keep_rows, keep_columns = a > 0, b > 0
    few = sinkhorn(cost[keep_rows][:, keep_columns], epsilon=0.02, tol=1e-11)
    spoilt = cost.clone()
    spoilt[3], spoilt[:, 4] = math.nan, math.inf
    spoilt.requires_grad_()
    for backend in ("cpp", "reference"):
        with regularizers.use_backend(backend):
            found = sinkhorn(spoilt, a, b, epsilon=0.02, tol=1e-11)
            (gradient,) = torch.autograd.grad(found.value, spoilt)
        torch.testing.assert_close(found.value, few.value)
        torch.testing.assert_close(
            found.f[keep_rows] + found.g[0], few.f + few.g[0], atol=1e-8, rtol=0
        )
        assert (gradient[3] == 0).all()
        assert (gradient[:, 4] == 0).all()
        assert gradient.isfinite().all()


def test_potential_of_a_point_without_mass_is_the_one_that_mass_would_have():
    cost = large(torch.float64, 6, 5)
    a = torch.tensor([0.2, 0.3, 0.0, 0.1, 0.2, 0.2], dtype=torch.float64)
    found = sinkhorn(cost, a, epsilon=0.1, tol=1e-12)
    expected = -0.1 * torch.logsumexp((found.g - cost[2]) / 0.1 - math.log(5), 0)
    torch.testing.assert_close(found.f[2], expected)


def test_forbidden_pairs_get_no_mass():
    cost = torch.tensor([[0.0, math.inf, 1.0], [math.inf, 0.0, 1.0]])
    found = sinkhorn(cost, b=torch.tensor([0.25, 0.25, 0.5]), epsilon=0.5, tol=1e-6)
    plan = transport_plan(cost, found.f, found.g, b=torch.tensor([0.25, 0.25, 0.5]), epsilon=0.5)
    torch.testing.assert_close(plan, torch.tensor([[0.25, 0.0, 0.25], [0.0, 0.25, 0.25]]))


def test_ragged_batch_equals_its_problems_one_by_one():
    generator = torch.Generator().manual_seed(3)
    cost = torch.rand(3, 40, 50, generator=generator, dtype=torch.float64)
    rows, columns = torch.tensor([40, 7, 23]), torch.tensor([11, 50, 36])
    padded = cost.clone()
    for i in range(3):
        padded[i, rows[i] :], padded[i, :, columns[i] :] = math.nan, math.nan
    found = sinkhorn(padded, epsilon=0.05, tol=1e-10, row_sizes=rows, column_sizes=columns)
    plan = transport_plan(
        padded, found.f, found.g, epsilon=0.05, row_sizes=rows, column_sizes=columns
    )
    for i in range(3):
        n, m = rows[i], columns[i]
        alone = sinkhorn(cost[i, :n, :m], epsilon=0.05, tol=1e-10)
        torch.testing.assert_close(found.value[i], alone.value)
        torch.testing.assert_close(found.f[i, :n] + found.g[i, 0], alone.f + alone.g[0])
        assert (found.f[i, n:] == 0).all()
        assert (plan[i, n:] == 0).all()
        assert (plan[i, :, m:] == 0).all()
        torch.testing.assert_close(plan[i].sum(), torch.ones_like(plan[i].sum()))


def test_items_of_a_batch_stop_by_themselves():
    cost = torch.stack([large(torch.float64), large(torch.float64) * 40])
    found = sinkhorn(cost, epsilon=0.1, tol=1e-6)
    assert found.n_iter[0] < found.n_iter[1]
    assert found.converged.all()


def test_epsilon_may_differ_from_problem_to_problem():
    cost = large(torch.float64).expand(2, -1, -1)
    found = sinkhorn(cost, epsilon=torch.tensor([0.1, 0.02]), tol=1e-9)
    for i, epsilon in enumerate((0.1, 0.02)):
        alone = sinkhorn(cost[i], epsilon=torch.tensor(epsilon), tol=1e-9)
        torch.testing.assert_close(found.value[i], alone.value)


def test_start_at_the_solution_needs_one_iteration():
    cost = large(torch.float64)
    first = sinkhorn(cost, epsilon=0.01, tol=1e-8)
    again = sinkhorn(cost, epsilon=0.01, tol=1e-7, f0=first.f, g0=first.g)
    assert again.n_iter == 1
    torch.testing.assert_close(again.value, first.value)


def test_min_iter_and_inner_iter_delay_the_stop():
    cost = large(torch.float64)
    free = sinkhorn(cost, epsilon=0.1, tol=1e-2)
    assert free.n_iter < 7
    assert sinkhorn(cost, epsilon=0.1, tol=1e-2, min_iter=7).n_iter == 7
    assert sinkhorn(cost, epsilon=0.1, tol=1e-2, inner_iter=10).n_iter == 10


def test_annealing_ends_at_the_same_solution():
    cost = large(torch.float64)
    plain = sinkhorn(cost, epsilon=0.01, tol=1e-10)
    annealed = sinkhorn(cost, epsilon=0.01, tol=1e-10, eps_init=100.0, eps_decay=0.6)
    assert annealed.converged
    assert annealed.n_iter > 9  # 100 * 0.6^k > 1
    torch.testing.assert_close(annealed.value, plain.value)


def test_symmetric_update_gives_one_potential_and_the_same_value():
    points = torch.randn(80, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cost = torch.cdist(points, points).square()
    alternating = sinkhorn(cost, epsilon=0.5, tol=1e-10)
    for backend in ("cpp", "reference"):
        with regularizers.use_backend(backend):
            found = sinkhorn(cost, epsilon=0.5, tol=1e-10, symmetric=True)
        assert found.converged
        assert torch.equal(found.f, found.g)
        assert found.n_iter < alternating.n_iter
        torch.testing.assert_close(found.value, alternating.value)


def test_unbalanced_value_is_the_primal_objective():
    # Sheet of paper 42: the dual value equals <P, C> plus the three generalised divergences.
    cost, a, b = problem(6, 5, dtype=torch.float64)
    a, b, epsilon, tau_a, tau_b = a.exp(), 2 * b.exp(), 0.3, 0.8, 0.6
    found = sinkhorn(cost, a, b, epsilon=epsilon, tau_a=tau_a, tau_b=tau_b, tol=1e-13)
    plan = transport_plan(cost, found.f, found.g, a, b, epsilon=epsilon)

    def divergence(p, q):
        return (p * (p / q).log() - p + q).sum()

    rho_a, rho_b = (tau * epsilon / (1 - tau) for tau in (tau_a, tau_b))
    primal = (
        (plan * cost).sum()
        + epsilon * divergence(plan, a[:, None] * b)
        + rho_a * divergence(plan.sum(1), a)
        + rho_b * divergence(plan.sum(0), b)
    )
    torch.testing.assert_close(found.value, primal)


def test_value_of_an_unfinished_run_is_a_lower_bound():
    cost = large(torch.float64)
    exact = sinkhorn(cost, epsilon=0.01, tol=1e-10).value
    values = [
        sinkhorn(cost, epsilon=0.01, tol=0, max_iter=k, momentum=1.0).value for k in (1, 2, 4, 8)
    ]
    assert all(low < high for low, high in zip(values, [*values[1:], exact], strict=True))


def test_gradient_in_the_cost_is_the_plan():
    cost = large().requires_grad_()
    found = sinkhorn(cost, epsilon=0.02)
    (gradient,) = torch.autograd.grad(found.value, cost)
    plan = transport_plan(cost.detach(), found.f, found.g, epsilon=0.02)
    assert torch.equal(gradient, plan)


def test_implicit_derivatives_equal_those_of_unrolled_iterations():
    # Sheet of paper 42: against autograd through 3000 iterations.
    cost, a, b = problem(5, 4, dtype=torch.float64)
    masses = (a.softmax(-1), b.softmax(-1))
    cotangent = torch.randn(9, dtype=torch.float64)
    cotangent[5:] += (cotangent[:5].sum() - cotangent[5:].sum()) / 4  # free of the gauge

    def pull(cost):
        found = sinkhorn(cost, *masses, epsilon=0.3, tol=1e-15, max_iter=3000)
        return (torch.cat([found.f, found.g]) * cotangent).sum()

    implicit = torch.autograd.grad(pull(cost.requires_grad_()), cost)[0]
    unrolled = torch.func.grad(pull)(cost.detach())
    torch.testing.assert_close(implicit, unrolled, rtol=1e-9, atol=1e-12)


def test_half_precision_costs_are_computed_in_float32():
    cost = large(torch.bfloat16)
    found = sinkhorn(cost, epsilon=0.05)
    assert found.f.dtype == found.value.dtype == torch.float32
    torch.testing.assert_close(found.value, sinkhorn(cost.float(), epsilon=0.05).value)


def test_agrees_with_pot():
    ot = pytest.importorskip("ot")
    cost, a, b = problem(30, 40, dtype=torch.float64)
    a, b = a.softmax(-1), b.softmax(-1)
    _, log = ot.bregman.sinkhorn_log(
        a.numpy(), b.numpy(), cost.numpy(), 0.05, stopThr=1e-13, numItermax=5000, log=True
    )
    found = sinkhorn(cost, a, b, epsilon=0.05, tol=1e-12)
    theirs = torch.from_numpy(log["log_u"]) - a.log()  # POT keeps the masses inside
    difference = found.f / 0.05 - theirs
    torch.testing.assert_close(difference, difference[:1].expand(30), rtol=0, atol=1e-8)


def test_small_epsilon_nears_the_exact_cost():
    ot = pytest.importorskip("ot")
    cost, a, b = problem(30, 40, dtype=torch.float64)
    a, b = a.softmax(-1), b.softmax(-1)
    exact = ot.emd2(a.numpy(), b.numpy(), cost.numpy())
    found = sinkhorn(cost, a, b, epsilon=1e-4, tol=1e-7, max_iter=50000)
    plan = transport_plan(cost, found.f, found.g, a, b, epsilon=1e-4)
    # The entropic plan costs more than the optimum by at most epsilon log(n m).
    assert -1e-6 < (plan * cost).sum() - exact < 1e-4 * math.log(30 * 40)
