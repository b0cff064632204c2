"""Entropic transport between points: closed forms, derivatives, streaming, parity with peers."""

import math
import pickle
import warnings

import pytest
import torch

import regularizers
from regularizers.transport import (
    Arccos,
    Cosine,
    Euclidean,
    SinkhornSolution,
    SqEuclidean,
    TICost,
    sinkhorn,
    sinkhorn_cost,
)
from regularizers.transport.sinkhorn import CONVENTIONS

EXACT = {"tol": 1e-11, "max_iter": 20000}  # near the rounding of float64
STREAMING = [SqEuclidean(0.5), Euclidean(), Cosine()]


def points(n, d=3, shift=0.0, batch=()):
    return torch.randn(*batch, n, d, dtype=torch.float64) + shift


def masses(n):
    weight = torch.rand(n, dtype=torch.float64) + 0.2
    return weight / weight.sum()


def central_difference(function, at, step=1e-5):
    result = torch.empty_like(at)
    for place in range(at.numel()):
        ends = [at.clone(), at.clone()]
        for end, sign in zip(ends, (1, -1), strict=True):
            end.view(-1)[place] += sign * step
        result.view(-1)[place] = (function(ends[0]) - function(ends[1])) / (2 * step)
    return result


@pytest.mark.parametrize("epsilon", [1.0, 0.1])
def test_values_of_two_points_have_their_closed_forms(epsilon):
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    found = sinkhorn(x, x, epsilon=epsilon, **EXACT)
    stay = 1 / (1 + math.exp(-1 / epsilon))
    kl = -epsilon * math.log((1 + math.exp(-1 / epsilon)) / 2)
    expected = {"kl": kl, "entropy": kl - 2 * epsilon * math.log(2), "sharp": 1 - stay}
    expected["dual"] = expected["entropy"]
    for convention, value in expected.items():
        assert found.objective(convention).item() == pytest.approx(value, abs=1e-12)
    plan = torch.tensor([[stay, 1 - stay], [1 - stay, stay]], dtype=torch.float64) / 2
    torch.testing.assert_close(found.plan(), plan)


def test_values_are_their_definitions_on_the_plan():
    x, y, a, b = points(6), points(5), masses(6), masses(5)
    found = sinkhorn(x, y, a, b, epsilon=0.7, **EXACT)
    plan, cost = found.plan(), SqEuclidean().pairwise(x, y)
    sharp = (plan * cost).sum()
    kl = sharp + 0.7 * (plan * (plan / (a[:, None] * b)).log()).sum()
    entropy = sharp + 0.7 * (plan * plan.log()).sum()
    for convention, value in (("kl", kl), ("entropy", entropy), ("sharp", sharp)):
        torch.testing.assert_close(found.objective(convention), value)
    torch.testing.assert_close(found.objective("dual"), entropy)


@pytest.mark.parametrize(("epsilon", "value"), [(0.5, 2.267670), (2.0, 3.307508)])
def test_gaussians_in_one_dimension_have_their_closed_form(epsilon, value):
    s, t, shift, variance = 1.0, 2.0, 0.7, epsilon / 2
    root = math.sqrt(4 * s**2 * t**2 + variance**2)
    closed = shift**2 + s**2 + t**2 - root
    closed += variance * (1 - math.log(2 * variance) + math.log(root + variance))
    assert closed == pytest.approx(value, abs=1e-6)
    z = torch.linspace(-8, 8, 400, dtype=torch.float64)[:, None]
    weight = torch.softmax(-z[:, 0].square() / 2, 0)  # quadrature of a Gaussian: spectral accuracy
    found = sinkhorn_cost(s * z, shift + t * z, weight, weight, epsilon=epsilon, **EXACT)
    assert found.item() == pytest.approx(closed, abs=1e-8)


def test_soft_marginals_reach_the_primal_with_generalised_divergences():
    x, y, a, b = points(6), points(5), masses(6), 1.3 * masses(5)
    epsilon, tau_a, tau_b = 0.5, 0.7, 0.9
    found = sinkhorn(x, y, a, b, epsilon=epsilon, tau_a=tau_a, tau_b=tau_b, **EXACT)
    plan, cost = found.plan(), SqEuclidean().pairwise(x, y)

    def divergence(p, q):
        return (p * (p / q).log() - p + q).sum()

    rho_a, rho_b = (epsilon * tau / (1 - tau) for tau in (tau_a, tau_b))
    primal = (
        (plan * cost).sum()
        + epsilon * divergence(plan, a[:, None] * b)
        + rho_a * divergence(plan.sum(1), a)
        + rho_b * divergence(plan.sum(0), b)
    )
    torch.testing.assert_close(found.value, primal)
    torch.testing.assert_close(found.objective("sharp"), (plan * cost).sum())
    with pytest.raises(ValueError, match="convention"):
        found.objective("entropy")


def test_the_error_after_an_update_is_that_of_the_column_sums_before_it():
    # ops.sinkhorn measures for nothing; here against the plan that is written out.
    x, y, b = points(7), points(9), masses(9)
    found = sinkhorn(x, y, None, b, epsilon=0.3, max_iter=3, tol=0.0)
    column_error = (found.plan().sum(0) - b).abs().sum()
    torch.testing.assert_close(found.marginal_error, column_error)
    torch.testing.assert_close(found.plan().sum(1), torch.full((7,), 1 / 7, dtype=torch.float64))


@pytest.mark.parametrize("memory", ["dense", "streaming"])
@pytest.mark.parametrize("cost", STREAMING, ids=repr)
def test_epsilon_rules_take_mean_and_deviation_of_all_costs(cost, memory):
    x, y = points(8, batch=(2,)), points(9, shift=0.5, batch=(2,))
    costs = cost.pairwise(x, y).flatten(1)
    mean, std = costs.mean(1), costs.std(1, correction=0)
    for epsilon, relative, expected in (
        (None, None, 0.05 * std),
        (None, "mean", 0.05 * mean),
        (0.3, "mean", 0.3 * mean),
        (0.3, "std", 0.3 * std),
        (0.3, None, torch.tensor(0.3, dtype=torch.float64)),
    ):
        found = sinkhorn(x, y, cost=cost, epsilon=epsilon, relative_epsilon=relative, memory=memory)
        torch.testing.assert_close(found.epsilon, expected)


@pytest.mark.parametrize("statistic", ["mean", "median", "max"])
def test_scale_divides_costs_by_a_statistic_with_its_gradient(statistic):
    x, y = points(5).requires_grad_(), points(4)

    def by_hand(x):
        costs = SqEuclidean().pairwise(x, y)
        scale = {"mean": costs.mean, "median": costs.median, "max": costs.max}[statistic]()
        return regularizers.ops.sinkhorn(costs / scale, epsilon=0.2, **EXACT).value

    value = sinkhorn_cost(x, y, epsilon=0.2, scale_cost=statistic, **EXACT)
    torch.testing.assert_close(value, by_hand(x))
    (gradient,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(gradient, torch.autograd.grad(by_hand(x), x)[0])


def test_epsilon_is_a_constant_for_derivatives():
    x, y = points(5).requires_grad_(), points(4)
    found = sinkhorn(x, y, relative_epsilon="mean", **EXACT)
    frozen = sinkhorn(x, y, epsilon=found.epsilon, **EXACT)
    for left, right in zip(
        *(torch.autograd.grad(s.value, x) for s in (found, frozen)), strict=True
    ):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("memory", ["dense", "streaming"])
def test_gradients_of_all_values_are_finite_differences(convention, memory):
    x, y = points(3, 2), points(4, 2, shift=0.3)
    options = {"epsilon": 0.8, "convention": convention, "memory": memory, **EXACT}
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sinkhorn_cost(leaf, y, **options), leaf)
    expected = central_difference(lambda moved: sinkhorn_cost(moved, y, **options), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)


def test_gradient_is_that_through_constant_potentials():
    x, y = points(5).requires_grad_(), points(6).requires_grad_()
    found = sinkhorn(x, y, epsilon=0.5, **EXACT)
    costs = SqEuclidean().pairwise(x, y)
    exponent = (found.f[:, None] + found.g - costs) / 0.5
    dual = found.f.mean() + found.g.mean() - 0.5 * (exponent.exp().mean() - 1)
    gradients = torch.autograd.grad(found.value, (x, y))
    for have, want in zip(gradients, torch.autograd.grad(dual, (x, y)), strict=True):
        torch.testing.assert_close(have, want)
    # Moving everything together costs nothing.
    torch.testing.assert_close(gradients[0].sum(0), -gradients[1].sum(0))


def test_second_derivatives_of_the_value_are_right_under_envelope():
    x, y = points(3, 2).requires_grad_(), points(3, 2).requires_grad_()
    value = lambda x, y: sinkhorn_cost(x, y, epsilon=0.7, tol=1e-13, max_iter=5000)
    assert torch.autograd.gradgradcheck(value, (x, y), atol=1e-4)


@pytest.mark.parametrize("memory", ["dense", "streaming"])
def test_implicit_potentials_and_plan_agree_with_unrolled_ones(memory):
    x, y = points(4, 2).requires_grad_(), points(5, 2).requires_grad_()
    weight = torch.randn(4, 5, dtype=torch.float64)

    def gradients(**options):
        found = sinkhorn(x, y, epsilon=1.0, **options)
        loss = (found.plan() * weight).sum() + found.apply(y).square().sum()
        loss = loss + (found.f - found.f.mean()).square().sum()
        return torch.autograd.grad(loss, (x, y))

    implicit = gradients(differentiate="implicit", memory=memory, **EXACT)
    unrolled = gradients(differentiate="unroll", max_iter=300)
    for have, want in zip(implicit, unrolled, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-8)


def test_unrolled_value_has_the_derivative_of_its_iterations():
    x, y = points(3, 2), points(4, 2)
    options = {"epsilon": 0.3, "differentiate": "unroll", "max_iter": 3, "tol": 0.0}
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sinkhorn_cost(leaf, y, **options), leaf)
    expected = central_difference(lambda moved: sinkhorn_cost(moved, y, **options), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)


def test_potentials_plan_and_products_are_constants_under_envelope():
    x, y, a = points(4).requires_grad_(), points(5).requires_grad_(), masses(4).requires_grad_()
    found = sinkhorn(x, y, a, epsilon=1.0)
    for result in (found.f, found.g, found.plan(), found.apply(points(5, 1)), found.transport()):
        assert not result.requires_grad
    v = points(5, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(found.apply(v).sum(), v)
    torch.testing.assert_close(gradient, found.plan().sum(0)[:, None].expand(-1, 2))


@pytest.mark.parametrize("convention", ["kl", "sharp"])
def test_functorch_transforms_agree_with_autograd(convention):
    x, y = points(4, 2), points(5, 2)
    value = lambda x: sinkhorn_cost(
        x, y, epsilon=1.0, max_iter=100, tol=1e-12, convention=convention
    )
    leaf, tangent = x.clone().requires_grad_(), torch.randn_like(x)
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(value)(x), gradient)
    _, derivative = torch.func.jvp(value, (x,), (tangent,))
    torch.testing.assert_close(derivative, (gradient * tangent).sum())
    both = torch.func.vmap(value)(torch.stack((x, 2 * x)))
    torch.testing.assert_close(both[0], value(x))


def test_gradients_in_the_masses_are_centred_potentials():
    x, y = points(4), points(5)
    a, b = masses(4).requires_grad_(), masses(5).requires_grad_()
    found = sinkhorn(x, y, a, b, epsilon=0.5, **EXACT)
    by_a, by_b = torch.autograd.grad(found.value, (a, b))
    torch.testing.assert_close(by_a - by_a.mean(), found.f - found.f.mean())
    torch.testing.assert_close(by_b - by_b.mean(), found.g - found.g.mean())


@pytest.mark.parametrize("memory", ["dense", "streaming"])
def test_products_and_maps_are_those_of_the_plan(memory):
    x, y, a, b = points(6), points(7), masses(6), masses(7)
    found = sinkhorn(x, y, a, b, epsilon=0.5, memory=memory, **EXACT)
    plan, v, u = found.plan(), points(7, 2), points(6, 2)
    torch.testing.assert_close(found.apply(v), plan @ v)
    torch.testing.assert_close(found.apply_transposed(u), plan.mT @ u)
    torch.testing.assert_close(found.transport(), plan @ y / a[:, None])
    torch.testing.assert_close(found.potential(x), found.f)


@pytest.mark.parametrize("memory", ["dense", "streaming"])
def test_map_of_new_points_extends_the_one_of_old_points(memory):
    x, y = points(6), points(7)
    found = sinkhorn(x, y, epsilon=0.5, memory=memory, **EXACT)
    torch.testing.assert_close(found.transport(x), found.transport())
    z = points(4).requires_grad_()
    # For the squared distance the map is z - grad f / 2.
    (gradient,) = torch.autograd.grad(found.potential(z).sum(), z, create_graph=True)
    torch.testing.assert_close(found.transport(z), z - gradient / 2)
    assert torch.autograd.gradcheck(found.transport, (z,))


def test_map_of_a_soft_problem_is_an_average_of_targets():
    x, y = points(6), points(7)
    found = sinkhorn(x, y, epsilon=0.5, tau_a=0.8, **EXACT)
    plan = found.plan()
    torch.testing.assert_close(found.transport(), plan @ y / plan.sum(1, keepdim=True))


def test_map_recovers_an_affine_optimal_map():
    x = torch.randn(300, 2)
    # Scaling by 2 and moving is the gradient of a convex function, hence optimal.
    found = sinkhorn(x, 2 * x + 1, epsilon=0.05)
    inside = x[x.norm(dim=1) < 1] + 0.01
    assert (found.transport(inside) - (2 * inside + 1)).norm(dim=1).mean() < 0.15


@pytest.mark.parametrize("scale_cost", [2.0, "mean", "max"])
@pytest.mark.parametrize("cost", [SqEuclidean(0.5), Euclidean()], ids=repr)
def test_streaming_agrees_with_stored_costs_also_at_a_scale(cost, scale_cost):
    x, y = points(8, batch=(2,)), points(9, shift=0.5, batch=(2,))
    results = []
    for memory in ("dense", "streaming"):
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        found = sinkhorn(*leaves, cost=cost, scale_cost=scale_cost, memory=memory, **EXACT)
        sums = [found.value.sum(), found.objective("sharp").sum()]
        gradients = [torch.autograd.grad(s, leaves, retain_graph=True) for s in sums]
        results.append((found.value, found.plan(), found.transport(y), *gradients))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


def test_auto_streams_where_the_costs_would_be_too_many(monkeypatch):
    from regularizers.transport import _pairs

    x = points(20)
    kinds = []
    for limit, cost in ((400, SqEuclidean()), (399, SqEuclidean()), (399, Arccos())):
        monkeypatch.setattr(_pairs, "STORED_AT_MOST", limit)
        kinds.append(type(_pairs.make_pairs(cost, x, x, "auto")).__name__)
    assert kinds == ["StoredPairs", "StreamedPairs", "StoredPairs"]


def test_auto_stores_where_nothing_streams_but_a_reference(monkeypatch):
    from regularizers.ops.sinkhorn_points import SINKHORN_POINTS
    from regularizers.transport import _pairs

    monkeypatch.setattr(_pairs, "STORED_AT_MOST", 1)
    monkeypatch.setattr(SINKHORN_POINTS, "serving", lambda device: "reference")
    x = points(20)
    between = _pairs.make_pairs(SqEuclidean(), x, x, "auto")
    assert isinstance(between, _pairs.StoredPairs)
    assert isinstance(_pairs.own_pairs(between, 0, "auto"), _pairs.StoredPairs)


def test_streamed_statistics_by_blocks_are_those_of_all_costs(monkeypatch):
    from regularizers.transport import _pairs

    monkeypatch.setattr(_pairs, "_BLOCK", 25)  # two rows a block
    x, y = points(7), points(10)
    stored, streamed = (
        _pairs.make_pairs(Euclidean(), x, y, memory) for memory in ("dense", "streaming")
    )
    torch.testing.assert_close(streamed.mean(), stored.mean())
    torch.testing.assert_close(streamed.max(), stored.max())


@pytest.mark.parametrize("memory", ["dense", "streaming"])
def test_a_batch_is_its_problems_one_by_one(memory):
    x, y, a = points(6, batch=(2, 3)), points(5, batch=(2, 3)), masses(6)
    options = {"memory": memory, **EXACT}
    together = sinkhorn(x, y, a, **options)  # one a for all
    for place in ((0, 0), (1, 2)):
        alone = sinkhorn(x[place], y[place], a, **options)
        torch.testing.assert_close(together.plan()[place], alone.plan())
        torch.testing.assert_close(together.transport(x)[place], alone.transport(x[place]))
        for convention in CONVENTIONS:
            values = together.objective(convention), alone.objective(convention)
            torch.testing.assert_close(values[0][place], values[1])


def test_a_warm_start_is_taken():
    x, y = points(30), points(30, shift=1.0)
    cold = sinkhorn(x, y, epsilon=0.1, tol=1e-6)
    warm = sinkhorn(x, y, epsilon=0.1, tol=1e-6, f0=cold.f, g0=cold.g)
    assert warm.n_iter < cold.n_iter / 4


def test_symmetric_updates_solve_the_problem_of_points_with_themselves():
    x = points(30)
    fast = sinkhorn(x, x, epsilon=0.5, symmetric=True, **EXACT)
    slow = sinkhorn(x, x, epsilon=0.5, **EXACT)
    torch.testing.assert_close(fast.value, slow.value)
    assert fast.n_iter < slow.n_iter


def test_small_epsilon_neither_underflows_nor_overflows():
    x, y = torch.rand(20, 2), torch.rand(20, 2)
    found = sinkhorn(x, y, epsilon=1e-4, max_iter=20000)  # exp(-1e4) is 0 in float32
    assert found.converged
    assert found.plan().isfinite().all()


def test_points_without_mass_take_no_part_and_have_gradient_zero():
    x, y = points(5).requires_grad_(), points(4)
    a = torch.tensor([0.5, 0.25, 0.25, 0.0, 0.0], dtype=torch.float64)
    found = sinkhorn(x, y, a, epsilon=0.5, **EXACT)
    fewer = sinkhorn(x[:3], y, a[:3], epsilon=0.5, **EXACT)
    for convention in CONVENTIONS:
        torch.testing.assert_close(found.objective(convention), fewer.objective(convention))
    (gradient,) = torch.autograd.grad(found.objective("sharp"), x)
    assert gradient.isfinite().all()
    assert (gradient[3:] == 0).all()
    assert found.transport().isfinite().all()


def test_half_precision_points_are_computed_in_float32():
    x = torch.randn(20, 3).bfloat16().requires_grad_()
    y = torch.randn(20, 3).bfloat16()
    found = sinkhorn(x, y, epsilon=0.5)
    torch.testing.assert_close(found.value, sinkhorn(x.float(), y.float(), epsilon=0.5).value)
    (gradient,) = torch.autograd.grad(found.value, x)
    assert gradient.dtype == torch.bfloat16


def test_no_memory_of_the_iterations_is_kept():
    x, y = points(20).requires_grad_(), points(20)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, id):
        sinkhorn(x, y, epsilon=0.05, max_iter=500, tol=0.0)
    assert sum(kept) < 4 * 20 * 20


def test_a_warning_says_once_where_the_iteration_stopped_short():
    x, y = points(20), points(20)
    with pytest.warns(RuntimeWarning, match="not converged") as caught:
        assert not sinkhorn(x, y, epsilon=0.01, max_iter=2).converged
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkhorn(x, y, epsilon=0.01, max_iter=2, tol=0.0)  # as many as were asked for


def test_compiles_to_one_graph(fresh_dynamo):
    x, y = torch.randn(10, 2).requires_grad_(), torch.randn(12, 2)

    def losses(x, y):
        found = sinkhorn(x, y, relative_epsilon="mean")
        return found.value + found.objective("entropy"), found.transport(y)

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), losses(x, y))


def test_solutions_print_and_pickle():
    x = torch.randn(10, 2)
    found = sinkhorn(x, x + 1)
    assert "[10, 10]" in repr(found)
    again = pickle.loads(pickle.dumps(found))
    assert isinstance(again, SinkhornSolution)
    torch.testing.assert_close(again.plan(), found.plan())


def test_a_function_serves_as_cost():
    x, y = points(5), points(4)
    manhattan = sinkhorn_cost(x, y, cost=lambda x, y: torch.cdist(x, y, p=1), epsilon=0.5)
    norm = TICost(lambda z: z.abs().sum(-1))
    torch.testing.assert_close(manhattan, sinkhorn_cost(x, y, cost=norm, epsilon=0.5))


def test_potentials_and_plan_agree_with_pot():
    ot = pytest.importorskip("ot")
    x, y, a, b = points(12), points(15), masses(12), masses(15)
    found = sinkhorn(x, y, a, b, epsilon=0.4, **EXACT)
    costs = SqEuclidean().pairwise(x, y)
    plan, log = ot.bregman.sinkhorn_log(a, b, costs, 0.4, stopThr=1e-13, numItermax=5000, log=True)
    torch.testing.assert_close(found.plan(), plan, rtol=1e-8, atol=1e-10)
    ours, theirs = found.f + 0.4 * a.log(), 0.4 * log["log_u"]
    torch.testing.assert_close(ours - ours.mean(), theirs - theirs.mean(), rtol=1e-8, atol=1e-8)


def test_soft_plan_agrees_with_pot():
    ot = pytest.importorskip("ot")
    x, y, a, b = points(12), points(15), masses(12), 1.5 * masses(15)
    epsilon, tau = 0.5, 0.8
    found = sinkhorn(x, y, a, b, epsilon=epsilon, tau_a=tau, tau_b=tau, **EXACT)
    rho = epsilon * tau / (1 - tau)
    plan = ot.unbalanced.sinkhorn_unbalanced(
        a, b, SqEuclidean().pairwise(x, y), epsilon, rho,
        reg_type="kl", stopThr=1e-14, numItermax=10000,
    )  # fmt: skip
    torch.testing.assert_close(found.plan(), plan, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("exception", "name", "change"),
    [
        (ValueError, "y", {"y": torch.zeros(4, 2)}),
        (ValueError, "y", {"y": torch.zeros(2, 4, 3)}),
        (TypeError, "y", {"y": torch.zeros(4, 3, dtype=torch.float64)}),
        (TypeError, "x", {"x": torch.zeros(5, 3, dtype=torch.int64)}),
        (ValueError, "x", {"x": torch.zeros(0, 3)}),
        (ValueError, "x", {"x": torch.full((5, 3), math.nan)}),
        (ValueError, "y", {"y": torch.full((4, 3), math.inf)}),
        (ValueError, "a must", {"a": torch.tensor([1.0, 0.5, -0.5, 0.0, 0.0])}),
        (ValueError, "a must", {"a": torch.ones(4) / 4}),
        (TypeError, "a must", {"a": torch.ones(5, dtype=torch.int64)}),
        (ValueError, "equal sums", {"a": torch.ones(5)}),
        (ValueError, "epsilon", {"epsilon": 0.0}),
        (ValueError, "epsilon", {"epsilon": -1.0, "relative_epsilon": "mean"}),
        (ValueError, "epsilon", {"epsilon": torch.ones(3)}),
        (TypeError, "epsilon", {"epsilon": "small"}),
        (ValueError, "relative_epsilon", {"relative_epsilon": "median"}),
        (ValueError, "scale_cost", {"scale_cost": "std"}),
        (ValueError, "scale_cost", {"scale_cost": 0.0}),
        (TypeError, "scale_cost", {"scale_cost": None}),
        (ValueError, "scale_cost", {"scale_cost": "median", "memory": "streaming"}),
        (ValueError, "scale_cost", {"scale_cost": "mean", "memory": "streaming", "cost": Cosine()}),
        (ValueError, "tau_a", {"tau_a": 0.0}),
        (ValueError, "tau_b", {"tau_b": 1.5}),
        (ValueError, "memory", {"memory": "fused"}),
        (ValueError, "memory", {"memory": "streaming", "cost": Arccos()}),
        (ValueError, "memory", {"memory": "streaming", "differentiate": "unroll"}),
        (ValueError, "differentiate", {"differentiate": "danskin"}),
        (TypeError, "cost", {"cost": SqEuclidean}),
    ],
)
def test_bad_input_names_the_argument(exception, name, change):
    arguments = {"x": torch.randn(5, 3), "y": torch.randn(4, 3), **change}
    with pytest.raises(exception, match=name):
        sinkhorn(arguments.pop("x"), arguments.pop("y"), arguments.pop("a", None), **arguments)


def test_unknown_convention_is_refused_before_work():
    with pytest.raises(ValueError, match="convention"):
        sinkhorn_cost(torch.zeros(2, 1), torch.ones(2, 1), convention="primal")
    with pytest.raises(ValueError, match="points"):
        sinkhorn(torch.randn(3, 2), torch.randn(3, 2)).transport(torch.randn(3, 5))


def test_equal_costs_have_no_relative_epsilon():
    with pytest.raises(ValueError, match="epsilon"):
        sinkhorn(torch.zeros(3, 2), torch.zeros(3, 2))
