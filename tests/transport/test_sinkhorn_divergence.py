"""The Sinkhorn divergence: what makes it a divergence, its gradient, GeomLoss's front end."""

import copy

import pytest
import torch
from torch import nn

from regularizers.transport import (
    Cosine,
    Euclidean,
    SinkhornDivergence,
    SqEuclidean,
    sinkhorn_cost,
    sinkhorn_divergence,
)
from tests.harness import MethodContract
from tests.transport.test_sinkhorn import central_difference, masses, points

EXACT = {"tol": 1e-9, "max_iter": 20000}


@pytest.mark.parametrize("epsilon", [0.5, 5.0])
def test_of_shifted_points_is_the_squared_shift_at_every_epsilon(epsilon):
    x = points(40, 2)
    shift = torch.tensor([5**0.5, 0.5], dtype=torch.float64)
    value = sinkhorn_divergence(x + shift, x, epsilon=epsilon, **EXACT)
    assert value.item() == pytest.approx(5.25, abs=1e-9)


@pytest.mark.parametrize("cost", [SqEuclidean(0.5), Euclidean(), Cosine()], ids=repr)
def test_is_zero_on_equal_points_symmetric_and_positive_otherwise(cost):
    x, y, a, b = points(20), points(30), masses(20), masses(30)
    options = {"cost": cost, "epsilon": 0.2, "tol": 1e-7}
    # Off by the error of the marginals times differences of potentials, which are about 1.
    assert abs(sinkhorn_divergence(x, x, a, a, **options).item()) < 1e-6
    value = sinkhorn_divergence(x, y, a, b, **options)
    torch.testing.assert_close(value, sinkhorn_divergence(y, x, b, a, **options))
    assert value > 0.01


def test_becomes_the_squared_distance_of_means_as_epsilon_grows():
    x, y = points(20), points(30, shift=1.0)
    value = sinkhorn_divergence(x, y, epsilon=1e5, **EXACT)
    means = (x.mean(0) - y.mean(0)).square().sum()
    torch.testing.assert_close(value, means, rtol=1e-4, atol=0)  # the next term is O(1/epsilon)


def test_is_made_of_three_costs():
    x, y, a, b = points(9), points(8), masses(9), masses(8)
    cost = lambda *args: sinkhorn_cost(*args, epsilon=0.3, **EXACT)
    expected = cost(x, y, a, b) - cost(x, x, a, a) / 2 - cost(y, y, b, b) / 2
    torch.testing.assert_close(sinkhorn_divergence(x, y, a, b, epsilon=0.3, **EXACT), expected)


@pytest.mark.parametrize("memory", ["dense", "streaming"])
@pytest.mark.parametrize("tau", [1.0, 0.8])
def test_gradients_are_finite_differences(tau, memory):
    x, y, a, b = points(4, 2), points(5, 2), masses(4), masses(5)
    options = {"epsilon": 0.5, "tau_a": tau, "tau_b": tau, "memory": memory, **EXACT}
    leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
    gradients = torch.autograd.grad(sinkhorn_divergence(*leaves, a, b, **options), leaves)
    by_x = central_difference(lambda x: sinkhorn_divergence(x, y, a, b, **options), x)
    by_y = central_difference(lambda y: sinkhorn_divergence(x, y, a, b, **options), y)
    torch.testing.assert_close(gradients, (by_x, by_y), rtol=1e-6, atol=1e-7)


def test_gradient_vanishes_where_the_points_coincide():
    x = points(10).requires_grad_()
    value = sinkhorn_divergence(x, x.detach().flip(0), epsilon=0.3, **EXACT)
    (gradient,) = torch.autograd.grad(value, x)
    assert gradient.abs().max() < 1e-8


def test_soft_marginals_make_mass_a_matter_of_price():
    x = points(10)
    a = torch.full((10,), 0.1, dtype=torch.float64)
    options = {"epsilon": 0.3, "tau_a": 0.9, "tau_b": 0.9, **EXACT}
    assert abs(sinkhorn_divergence(x, x, a, a, **options).item()) < 1e-9
    assert sinkhorn_divergence(x, x, a, 2 * a, **options) > 1e-3


def test_fixed_y_leaves_out_its_own_term_or_takes_it_as_a_number():
    x, y = points(9).requires_grad_(), points(8)
    whole = sinkhorn_divergence(x, y, epsilon=0.3, **EXACT)
    own = sinkhorn_cost(y, y, epsilon=0.3, symmetric=True, **EXACT)
    short = sinkhorn_divergence(x, y, epsilon=0.3, static_y=True, **EXACT)
    offset = sinkhorn_divergence(x, y, epsilon=0.3, static_y=True, offset_yy=own, **EXACT)
    torch.testing.assert_close(short, whole + own / 2)
    torch.testing.assert_close(offset, whole)
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (short, whole)))


def test_one_epsilon_and_one_scale_serve_all_terms():
    x, y = points(9), points(8, shift=2.0)
    costs = SqEuclidean().pairwise(x, y)
    shared = sinkhorn_divergence(x, y, relative_epsilon="mean", scale_cost="max", **EXACT)
    by_hand = sinkhorn_divergence(
        x, y, epsilon=0.05 * costs.mean().item() / costs.max().item(),
        scale_cost=costs.max().item(), **EXACT,
    )  # fmt: skip
    torch.testing.assert_close(shared, by_hand)
    apart = sinkhorn_divergence(
        x, y, relative_epsilon="mean", scale_cost="max", share_epsilon=False, **EXACT
    )
    assert (apart - shared).abs() > 1e-4


@pytest.mark.parametrize("cost", [SqEuclidean(0.5), Euclidean(), Cosine()], ids=repr)
@pytest.mark.parametrize("scale_cost", [2.0, "mean"])
def test_the_choice_of_memory_changes_no_value(cost, scale_cost):
    x, y = points(9), points(8)
    memories = ["auto", "dense"]
    if not (isinstance(cost, Cosine) and scale_cost == "mean"):
        memories.append("streaming")
    values = [
        sinkhorn_divergence(x, y, cost=cost, scale_cost=scale_cost, memory=memory, **EXACT)
        for memory in memories
    ]
    torch.testing.assert_close(torch.stack(values), values[0].expand(len(values)))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_batch_is_reduced(reduction):
    x, y = points(6, batch=(3,)), points(5, batch=(3,))
    each = torch.stack(
        [sinkhorn_divergence(*pair, epsilon=0.4, **EXACT) for pair in zip(x, y, strict=True)]
    )
    expected = each if reduction == "none" else getattr(each, reduction)()
    value = sinkhorn_divergence(x, y, epsilon=0.4, reduction=reduction, **EXACT)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"blur": 0.5},
        {"blur": 0.5, "debias": False},
        {"blur": 0.4, "p": 1},
        {"blur": 0.5, "reach": 1.0},
    ],
    ids=str,
)
def test_agrees_with_geomloss_near_its_convergence(arguments):
    geomloss = pytest.importorskip("geomloss")
    torch.set_num_threads(1)  # problems this small only wait for a second one
    x, y = points(30), points(25, shift=0.5)
    theirs = geomloss.SamplesLoss(scaling=0.998, backend="tensorized", **arguments)
    ours = SinkhornDivergence(tol=1e-9, max_iter=20000, **arguments)
    # Its annealing ends before convergence, by 1e-4 at this scaling.
    assert ours(x, y).item() == pytest.approx(theirs(x, y).item(), rel=2e-4)


@pytest.mark.parametrize("diameter", [None, 8.0])
def test_annealing_ends_at_the_same_value(diameter):
    x, y = points(30), points(25)
    plain = SinkhornDivergence(blur=0.3, tol=1e-10, max_iter=5000)
    annealed = SinkhornDivergence(
        blur=0.3, scaling=0.8, diameter=diameter, tol=1e-10, max_iter=5000
    )
    torch.testing.assert_close(annealed(x, y), plain(x, y))


def test_agrees_with_ott():
    jax = pytest.importorskip("jax")
    divergence = pytest.importorskip("ott.tools.sinkhorn_divergence").sinkhorn_divergence
    pointcloud = pytest.importorskip("ott.geometry.pointcloud")
    x, y = torch.randn(20, 2), torch.randn(25, 2) + 1
    value, _ = divergence(
        pointcloud.PointCloud, jax.numpy.asarray(x.numpy()), jax.numpy.asarray(y.numpy()),
        solve_kwargs={"threshold": 1e-5},
    )  # fmt: skip
    ours = sinkhorn_divergence(x, y, tol=1e-5)  # epsilon by the same rule
    assert ours.item() == pytest.approx(float(value), rel=1e-4)


class Shifted(nn.Module):
    """A map to learn, and the loss to learn it with."""

    def __init__(self, dtype):
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=dtype)
        self.loss = SinkhornDivergence(epsilon=0.3)

    def forward(self, x, y):
        return self.loss(self.layer(x), y).to(x.dtype)  # float32 for half types


class TestSinkhornDivergence(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return Shifted(dtype)

    def call(self, module, dtype):
        return module(torch.randn(12, 3).to(dtype), torch.randn(10, 3).to(dtype))

    def bad_inputs(self):
        x = torch.randn(5, 3)
        return [
            (ValueError, "epsilon", lambda: SinkhornDivergence(epsilon=0.0)),
            (ValueError, "epsilon", lambda: SinkhornDivergence(blur=0.1, epsilon=0.1)),
            (ValueError, "cost", lambda: SinkhornDivergence(blur=0.1, cost=Euclidean())),
            (ValueError, "reach", lambda: SinkhornDivergence(reach=1.0)),
            (ValueError, "scaling", lambda: SinkhornDivergence(blur=0.1, scaling=1.0)),
            (ValueError, "blur", lambda: SinkhornDivergence(blur=-0.1)),
            (ValueError, "p must", lambda: SinkhornDivergence(blur=0.1, p=3)),
            (ValueError, "reduction", lambda: SinkhornDivergence(reduction="max")),
            (ValueError, "y must", lambda: SinkhornDivergence()(x, x[:, :2])),
            (ValueError, "tau_b", lambda: sinkhorn_divergence(x, x + 1, tau_a=0.5)),
            (TypeError, "symmetric", lambda: sinkhorn_divergence(x, x, symmetric=True)),
            (TypeError, "iterations", lambda: SinkhornDivergence(iterations=5)),
            (ValueError, "max_iter", lambda: SinkhornDivergence(max_iter=0)),
            (ValueError, "offset_yy", lambda: sinkhorn_divergence(x, x, offset_yy=0.0)),
            (ValueError, "reduction", lambda: sinkhorn_divergence(x, x, reduction="max")),
        ]


def test_epsilon_can_be_scheduled():
    loss, x, y = SinkhornDivergence(epsilon=1.0), points(9), points(8)
    loss.epsilon = 0.2
    torch.testing.assert_close(loss(x, y), sinkhorn_divergence(x, y, epsilon=0.2))
    assert "epsilon=0.2" in repr(copy.deepcopy(loss))


def test_a_schedule_of_epsilon_compiles_one_graph(fresh_dynamo):
    loss, x, y = SinkhornDivergence(epsilon=1.0), points(9), points(8)
    graphs = []
    compiled = torch.compile(
        loss, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph
    )
    for epsilon in (1.0, 0.7, 0.5, 0.3):
        loss.epsilon = epsilon
        torch.testing.assert_close(compiled(x, y), sinkhorn_divergence(x, y, epsilon=epsilon))
    assert len(graphs) == 1
