"""Structured maps and the conservative penalty: paper 42's parts without a solver."""

import pytest
import torch
from torch import nn

from regularizers.transport.cost import TICost
from regularizers.transport.structured_map import StructuredMap, conservative_penalty
from tests.harness import MethodContract

A = torch.tensor([[1.0, 2.0, 0.0], [-1.0, 0.5, 3.0], [0.3, -2.0, 1.0]], dtype=torch.float64)


def network(*sizes, dtype=torch.float64):
    torch.manual_seed(0)
    hidden, d, out = sizes
    return nn.Sequential(
        nn.Linear(d, hidden, dtype=dtype), nn.Tanh(), nn.Linear(hidden, out, dtype=dtype)
    )


def linear(x):
    return x @ A.mT


def points(n=6, d=3):
    return torch.randn(n, d, dtype=torch.float64)


class TestStructuredMap(MethodContract):
    def build(self, dtype):
        return StructuredMap(network(8, 3, 3, dtype=dtype), 1.5)

    def call(self, module, dtype):
        return module(torch.linspace(-1, 1, 12, dtype=dtype).reshape(4, 3))

    def bad_inputs(self):
        x = torch.ones(4, 3)
        penalty = conservative_penalty
        return [
            (TypeError, "field must", lambda: StructuredMap(3)),
            (ValueError, "cost must", lambda: StructuredMap(linear, 1.0)),
            (ValueError, "cost must", lambda: StructuredMap(linear, float("nan"))),
            (TypeError, "cost must", lambda: StructuredMap(linear, "p")),
            (ValueError, "cost must", lambda: StructuredMap(linear, TICost(torch.sum))),
            (ValueError, "field must", lambda: StructuredMap(lambda x: x[:, :2])(x)),
            (ValueError, "field must", lambda: StructuredMap(linear, potential=True)(points())),
            (
                ValueError,
                "grad_h_conj must",
                lambda: StructuredMap(lambda x: x, TICost(torch.sum, torch.sum))(x),
            ),
            (TypeError, "x must", lambda: StructuredMap(lambda x: x)(x.long())),
            (TypeError, "F must", lambda: penalty(3, x)),
            (ValueError, "F must", lambda: penalty(lambda x: x[:, :2], x)),
            (TypeError, "x must", lambda: penalty(linear, x.long())),
            (ValueError, "x must", lambda: penalty(linear, x[0])),
            (ValueError, "num_probes must", lambda: penalty(linear, x, num_probes=0)),
            (ValueError, "reduction must", lambda: penalty(linear, x, reduction="max")),
            (
                ValueError,
                "seed and generator",
                lambda: penalty(linear, x, seed=1, generator=torch.Generator()),
            ),
        ]


class TestStructuredMapOfAPotential(TestStructuredMap):
    def build(self, dtype):
        # The last bias of a potential has no part in its gradient.
        field = network(8, 3, 1, dtype=dtype)
        field[-1].bias = None
        return StructuredMap(field, potential=True)


def test_penalty_of_a_gradient_field_is_0():
    potential = network(16, 3, 1)
    field = torch.func.grad(lambda x: potential(x).sum())
    assert conservative_penalty(field, points(), num_probes=5) < 1e-25


def test_penalty_is_unbiased_for_the_squared_asymmetry_of_the_jacobian():
    exact = (A - A.mT).square().sum()
    penalties = conservative_penalty(linear, points(20_000), reduction="none", seed=0)
    # Four standard errors.
    error = 4 * penalties.std() / 20_000**0.5
    assert error < 0.02 * exact
    assert (penalties.mean() - exact).abs() < error


def test_penalty_of_a_network_agrees_with_its_jacobian():
    field, x = network(16, 3, 3), points(3)
    jacobian = torch.func.vmap(torch.func.jacrev(field))(x)
    exact = (jacobian - jacobian.mT).square().sum((1, 2))
    found = conservative_penalty(field, x, num_probes=20_000, reduction="none", seed=1)
    # Relative standard deviation of one probe is at most sqrt(2): 0.04 is four standard errors.
    torch.testing.assert_close(found, exact, rtol=0.04, atol=0.0)


def test_one_probe_is_exact_in_the_plane():
    # In two dimensions |(J - J') v|^2 = (J12 - J21)^2 |v|^2, and |v|^2 = 2.
    field, x = network(16, 2, 2), points(6, 2)
    jacobian = torch.func.vmap(torch.func.jacrev(field))(x)
    exact = (jacobian - jacobian.mT).square().sum((1, 2))
    torch.testing.assert_close(conservative_penalty(field, x, reduction="none"), exact)


def test_more_probes_have_a_lower_variance():
    x = torch.zeros(2000, 3, dtype=torch.float64)
    one, sixteen = (
        conservative_penalty(linear, x, num_probes=k, reduction="none", seed=2).var()
        for k in (1, 16)
    )
    # Ratio 16 with a standard error of about 5 %.
    assert 12 < one / sixteen < 20


def test_reductions_agree():
    x = points()
    none, mean, total = (
        conservative_penalty(linear, x, reduction=r, seed=4) for r in ("none", "mean", "sum")
    )
    assert none.shape == (6,)
    torch.testing.assert_close(none.mean(), mean)
    torch.testing.assert_close(none.sum(), total)


def test_seed_and_generator_reproduce_the_probes():
    x = points()
    call = lambda **source: conservative_penalty(linear, x, **source)
    assert torch.equal(call(seed=3), call(seed=3))
    assert not torch.equal(call(seed=3), call(seed=4))
    state = torch.get_rng_state()
    made = [call(generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*made)
    assert torch.equal(torch.get_rng_state(), state)


def test_penalty_differentiates_to_second_order():
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    call = lambda x, w: conservative_penalty(lambda z: (z @ w).tanh(), x, num_probes=2, seed=0)
    x = points(2).requires_grad_()
    torch.autograd.gradcheck(call, (x, weight))
    torch.autograd.gradgradcheck(call, (x, weight))


def test_penalty_compiles_with_the_same_gradients(fresh_dynamo):
    field, x = network(8, 3, 3), points()
    call = lambda x: conservative_penalty(field, x, num_probes=2, seed=0)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    weights = [field[0].weight, field[2].weight]
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x), weights), torch.autograd.grad(call(x), weights)
    )


def test_training_on_the_penalty_makes_a_field_conservative():
    field, x = network(16, 3, 3), points(64)
    optimizer = torch.optim.Adam(field.parameters(), lr=1e-2)
    losses = []
    for step in range(150):
        optimizer.zero_grad()
        # The second term keeps the field from vanishing, which would be conservative, too.
        losses.append(conservative_penalty(field, x, seed=step))
        (losses[-1] + (field(x) - linear(x)).square().mean()).backward()
        optimizer.step()
    jacobian = torch.func.vmap(torch.func.jacrev(field))(x)
    skew, symmetric = (jacobian - jacobian.mT) / 2, (jacobian + jacobian.mT) / 2
    assert skew.square().sum() < 0.05 * symmetric.square().sum()
    assert (A - A.mT).square().sum() > 0.5 * (A + A.mT).square().sum()  # it had to give way


def test_map_for_half_the_squared_distance_subtracts_the_field():
    x = points()
    torch.testing.assert_close(StructuredMap(linear)(x), x - linear(x))


@pytest.mark.parametrize("p", [1.5, 3.0])
def test_map_for_a_power_takes_the_signed_power_of_the_field(p):
    x, q = points(), p / (p - 1)
    field = linear(x)
    expected = x - field.sign() * field.abs() ** (q - 1)
    torch.testing.assert_close(StructuredMap(linear, p)(x), expected)


def test_map_takes_a_cost_of_the_user():
    # h(z) = sum cosh(z), so grad h* = asinh.
    cost = TICost(lambda z: z.cosh().sum(-1), torch.asinh)
    x = points()
    torch.testing.assert_close(StructuredMap(linear, cost)(x), x - linear(x).asinh())


@pytest.mark.parametrize("cost", [1.5, 2.0, 3.0])
def test_field_is_the_gradient_of_the_cost_at_the_displacement(cost):
    # The first-order condition of optimal maps: grad h(x - T(x)) = F(x).
    transport, x = StructuredMap(linear, cost), points()
    displacement = (x - transport(x)).requires_grad_()
    (gradient,) = torch.autograd.grad(transport.cost.h(displacement).sum(), displacement)
    torch.testing.assert_close(gradient, linear(x))


@pytest.mark.parametrize("p", [1.5, 3.0, 4.0])
def test_gradients_are_finite_where_the_field_is_0(p):
    weight = torch.zeros(3, 3, requires_grad=True)
    StructuredMap(lambda x: x @ weight, p)(torch.ones(4, 3)).sum().backward()
    assert weight.grad.isfinite().all()


def test_map_of_a_potential_uses_its_gradient_and_has_no_penalty():
    bowl = StructuredMap(lambda x: x.square().sum(-1) / 2, potential=True)
    x = points()
    torch.testing.assert_close(bowl(x), torch.zeros_like(x))
    learnt = StructuredMap(network(8, 3, 1), potential=True)
    assert learnt.penalty(x, seed=1) < 1e-25


def test_map_keeps_leading_dimensions():
    transport = StructuredMap(network(8, 3, 3))
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(transport(x)[1], transport(x[1]))


def test_penalty_of_a_map_is_that_of_its_field():
    field, x = network(8, 3, 3), points()
    expected = conservative_penalty(field, x, num_probes=3, seed=2)
    torch.testing.assert_close(StructuredMap(field).penalty(x, num_probes=3, seed=2), expected)


def test_parameters_of_the_field_are_those_of_the_map():
    transport = StructuredMap(network(8, 3, 3), 1.5)
    assert set(transport.state_dict()) == {
        f"field.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")
    }
