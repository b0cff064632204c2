"""The Monge gap: its figures, its gradient, and that it turns a map into an optimal one."""

import math

import pytest
import torch
from torch import nn

from regularizers.transport import (
    Arccos,
    Euclidean,
    MongeGap,
    SinkhornDivergence,
    SinkhornSolution,
    SqEuclidean,
    monge_gap,
    sinkhorn_cost,
    sinkhorn_divergence,
)
from tests.harness import MethodContract
from tests.transport.test_sinkhorn import central_difference, points

EXACT = {"tol": 1e-11, "max_iter": 20000}
CONVENTIONS = ("entropy", "kl", "sharp", "debiased")
PAIR = torch.tensor([[0.0], [1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("epsilon", "gap"), [(1.0, 1.006409), (0.1, 0.0693193), (0.01, 0.00693147)]
)
def test_gap_of_identity_and_swap_of_two_points(epsilon, gap):
    identity = monge_gap(PAIR, PAIR, epsilon=epsilon, **EXACT).item()
    assert identity == pytest.approx(gap, abs=1e-6)
    swap = monge_gap(PAIR, PAIR.flip(0), epsilon=epsilon, **EXACT).item()
    assert swap - identity == pytest.approx(1.0, abs=1e-9)


def test_kl_convention_may_be_negative_and_differs_by_a_constant():
    gaps = [
        monge_gap(PAIR, image, epsilon=1.0, convention="kl", **EXACT).item()
        for image in (PAIR, PAIR.flip(0))
    ]
    assert gaps == pytest.approx([-0.379885, 0.620115], abs=1e-6)
    x, Tx = points(6), points(6)
    entropy, kl = (monge_gap(x, Tx, epsilon=0.5, convention=c, **EXACT) for c in CONVENTIONS[:2])
    assert (entropy - kl).item() == pytest.approx(2 * 0.5 * math.log(6))


def test_on_the_circle_scaling_is_optimal_and_the_antipode_is_not():
    angle = torch.arange(64, dtype=torch.float64) * (2 * math.pi / 64)
    x = torch.stack((angle.cos(), angle.sin()), 1)
    antipode = monge_gap(x, -x, epsilon=0.01, **EXACT).item()
    scaling = monge_gap(x, 2 * x, epsilon=0.01, **EXACT).item()
    assert (antipode, scaling) == pytest.approx((4.0475, 0.04415), abs=1e-4)
    assert scaling >= 0.01 * math.log(64)


@pytest.mark.parametrize("cost", [SqEuclidean(), Euclidean(), Arccos()], ids=repr)
def test_entropy_gap_is_at_least_epsilon_log_n(cost):
    x, Tx = points(10), points(10)
    for image in (x, Tx, x + 3):
        gap = monge_gap(x, image, cost=cost, epsilon=0.05, tol=1e-4).item()
        assert gap > 0.05 * math.log(10) - 1e-4


def test_gap_is_zero_for_gradient_of_convex_potential_as_epsilon_vanishes():
    x = points(12, 2)
    convex = x @ torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64) + 1
    rotated = x @ torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    options = {"epsilon": 1e-3, "tol": 1e-6, "max_iter": 20000}
    assert monge_gap(x, convex, **options) < 1e-3 * math.log(12) + 1e-3
    assert monge_gap(x, rotated, **options) > 0.1


def test_conventions_subtract_what_they_name():
    x, Tx = points(7), points(7)
    displacement = (x - Tx).square().sum(1).mean()
    for convention in CONVENTIONS:
        gap = monge_gap(x, Tx, epsilon=0.3, convention=convention, **EXACT)
        if convention == "debiased":
            transport = sinkhorn_divergence(x, Tx, epsilon=0.3, **EXACT)
        else:
            transport = sinkhorn_cost(x, Tx, epsilon=0.3, convention=convention, **EXACT)
        torch.testing.assert_close(gap, displacement - transport)


@pytest.mark.parametrize("memory", ["dense", "streaming"])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_gradients_are_finite_differences(convention, memory):
    x, Tx = points(4, 2), points(4, 2)
    options = {"epsilon": 0.5, "convention": convention, "memory": memory, **EXACT}
    leaves = [x.clone().requires_grad_(), Tx.clone().requires_grad_()]
    gradients = torch.autograd.grad(monge_gap(*leaves, **options), leaves)
    by_x = central_difference(lambda x: monge_gap(x, Tx, **options), x)
    by_image = central_difference(lambda Tx: monge_gap(x, Tx, **options), Tx)
    torch.testing.assert_close(gradients, (by_x, by_image), rtol=1e-6, atol=1e-7)


def test_gradient_on_the_image_has_its_closed_form():
    x, Tx = points(5, 2), points(5, 2).requires_grad_()
    gap, solution = monge_gap(x, Tx, epsilon=0.5, return_output=True, **EXACT)
    assert isinstance(solution, SinkhornSolution)
    (gradient,) = torch.autograd.grad(gap, Tx)
    pull = solution.plan().sum(0)[:, None] * Tx - solution.plan().mT @ x
    torch.testing.assert_close(gradient, 2 * (Tx - x) / 5 - 2 * pull)


def test_relative_epsilon_is_a_constant_for_derivatives():
    x, Tx = points(5), points(5).requires_grad_()
    gap, solution = monge_gap(x, Tx, relative_epsilon="mean", return_output=True, **EXACT)
    frozen = monge_gap(x, Tx, epsilon=solution.epsilon, **EXACT)
    torch.testing.assert_close(*(torch.autograd.grad(value, Tx)[0] for value in (gap, frozen)))


def test_scale_divides_both_terms_or_the_transport_alone():
    x, Tx = points(6), points(6)
    scale = SqEuclidean().pairwise(x, Tx).mean()
    both = monge_gap(x, Tx, epsilon=0.2, scale_cost="mean", **EXACT)
    unscaled = monge_gap(x, Tx, epsilon=0.2 * scale.item(), **EXACT)
    torch.testing.assert_close(both, unscaled / scale)
    released = monge_gap(x, Tx, epsilon=0.2, scale_cost="mean", scale_transport_only=True, **EXACT)
    displacement = (x - Tx).square().sum(1).mean()
    torch.testing.assert_close(released - both, displacement - displacement / scale)


def test_batches_are_solved_at_once_and_reduced():
    x, Tx = points(6, batch=(3,)), points(6, batch=(3,))
    each = torch.stack([monge_gap(*p, epsilon=0.3, **EXACT) for p in zip(x, Tx, strict=True)])
    for reduction, expected in (("none", each), ("mean", each.mean()), ("sum", each.sum())):
        gap = monge_gap(x, Tx, epsilon=0.3, reduction=reduction, **EXACT)
        torch.testing.assert_close(gap, expected)


class Regularized(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.map = nn.Linear(3, 3, dtype=dtype)
        self.gap = MongeGap(epsilon=0.2)

    def forward(self, x):
        return self.gap(self.map, x).to(x.dtype)  # float32 for half types


class TestMongeGap(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return Regularized(dtype)

    def call(self, module, dtype):
        return module(torch.randn(12, 3).to(dtype))

    def bad_inputs(self):
        x = torch.randn(5, 3)
        return [
            (ValueError, "Tx", lambda: monge_gap(x, x[:4])),
            (ValueError, "Tx", lambda: monge_gap(x, x[:, :2])),
            (TypeError, "Tx", lambda: monge_gap(x, x.double())),
            (TypeError, "x must", lambda: monge_gap(x.long(), x)),
            (ValueError, "Tx must be finite", lambda: monge_gap(x, x / 0)),
            (ValueError, "convention", lambda: monge_gap(x, x, convention="dual")),
            (ValueError, "reduction", lambda: monge_gap(x, x, reduction="max")),
            (ValueError, "epsilon", lambda: monge_gap(x, x, epsilon=-1.0)),
            (TypeError, "threshold", lambda: monge_gap(x, x, threshold=1e-3)),
            (ValueError, "tol", lambda: MongeGap(tol=-1.0)),
            (ValueError, "epsilon", lambda: MongeGap(epsilon=0.0)),
            (ValueError, "convention", lambda: MongeGap(convention="primal")),
            (TypeError, "source", lambda: MongeGap()("identity", x)),
        ]


def test_module_takes_a_map_or_its_images_and_a_new_epsilon():
    gap, x, linear = MongeGap(epsilon=1.0), points(6), nn.Linear(3, 3, dtype=torch.float64)
    assert torch.equal(gap(linear, x), gap(x, linear(x)))
    gap.epsilon = 0.1
    torch.testing.assert_close(gap(linear, x), monge_gap(x, linear(x), epsilon=0.1))
    assert "epsilon=0.1" in repr(gap)


def test_gap_turns_a_rotation_into_the_optimal_map():
    # The fitting loss alone cannot see that a map rotates: N(0, I) is N(0, I) rotated.
    torch.set_num_threads(1)  # problems this small only wait for a second one
    angle = math.radians(120)
    rotation = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    distances = []
    for strength in (0.0, 1.0):
        generator = torch.Generator().manual_seed(0)
        A = torch.tensor(rotation).requires_grad_()
        fit, gap = SinkhornDivergence(epsilon=0.1), MongeGap(epsilon=0.05)
        optimizer = torch.optim.Adam([A], lr=0.03)
        for _ in range(300):
            x, y = torch.randn(2, 128, 2, generator=generator)
            loss = fit(x @ A.mT, y)
            if strength:
                loss = loss + strength * gap(x, x @ A.mT)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        distances.append((A.detach() - torch.eye(2)).norm().item())
    assert distances[0] > 1.5
    assert distances[1] < 0.15
