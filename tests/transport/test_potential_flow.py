"""Potential flows: the method contract and the facts of the sheet of paper 8."""

import math

import pytest
import torch
from torch import nn

from regularizers.transport import PotentialFlow, PotentialNet, wave_residual
from tests.harness import MethodContract

W = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
SPEED = 0.7


def standing_wave(z, t):
    return (z @ W).sin() * (SPEED * W.norm() * t).cos()


def cooling_wave(z, t):
    return (z @ W).sin() * (-((SPEED * W.norm()) ** 2) * t).exp()


def travelling_wave(z, t):
    return (z @ W - SPEED * W.sum() * t).sin()


def bowl(z, t):
    return z.square().sum(-1) / 2


def slope(z, t):
    return z @ W


class Fixed(nn.Module):
    """A potential given by a formula."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, z, t):
        return self.function(z, t)


def fixed_flow(function, dim=3, num_steps=6, **options):
    flow = PotentialFlow(dim, 1, num_steps, net=lambda _: Fixed(function), **options)
    return flow.double()


def places(n=5, d=3):
    return torch.randn(n, d, dtype=torch.float64)


class TestPotentialFlow(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return PotentialFlow(4, num_potentials=1, num_steps=4).to(dtype)

    def call(self, module, dtype):
        return module(torch.linspace(-1, 1, 20, dtype=dtype).reshape(5, 4), index=0).total

    def bad_inputs(self):
        flow, z = PotentialFlow(4, 2, num_steps=8), torch.ones(3, 4)
        u = bowl
        return [
            (ValueError, "dim must", lambda: PotentialFlow(0, 1, 4)),
            (ValueError, "num_potentials must", lambda: PotentialFlow(4, 0, 4)),
            (ValueError, "num_steps must", lambda: PotentialFlow(4, 1, 1)),
            (TypeError, "num_steps must", lambda: PotentialFlow(4, 1, 4.0)),
            (ValueError, "pde must", lambda: PotentialFlow(4, 1, 4, pde="poisson")),
            (ValueError, "laplacian must", lambda: PotentialFlow(4, 1, 4, laplacian="row")),
            (ValueError, "num_probes must", lambda: PotentialFlow(4, 1, 4, num_probes=0)),
            (TypeError, "net must", lambda: PotentialFlow(4, 1, 4, net=3)),
            (ValueError, "index must", lambda: flow.loss(z, 2)),
            (ValueError, "index must", lambda: flow.loss(z, -1)),
            (ValueError, "index must", lambda: flow.velocity(z, 0, 2)),
            (TypeError, "index must", lambda: flow.traverse(z, 0.5)),
            (ValueError, "steps must", lambda: flow.traverse(z, 0, -1)),
            (ValueError, "t must", lambda: flow.velocity(z, -1.0, 0)),
            (ValueError, "t must", lambda: flow.velocity(z, torch.tensor([0.0, 1.0, -1.0]), 0)),
            (ValueError, "t must", lambda: flow.velocity(z, torch.zeros(2), 0)),
            (TypeError, "t must", lambda: flow.velocity(z, "now", 0)),
            (ValueError, "z must", lambda: flow.loss(torch.ones(3, 5), 0)),
            (ValueError, "z must", lambda: flow.loss(torch.ones(4), 0)),
            (TypeError, "z must", lambda: flow.loss(z.long(), 0)),
            (ValueError, "t_sel must", lambda: flow.loss(z, 0, 3)),
            (ValueError, "t_sel must", lambda: flow.loss(z, 0, -1)),
            (ValueError, "t_sel must", lambda: flow.loss(z, 0, torch.tensor([0, 1, 3]))),
            (ValueError, "t_sel must", lambda: flow.loss(z, 0, torch.tensor([0, 1]))),
            (TypeError, "t_sel must", lambda: flow.loss(z, 0, torch.zeros(3))),
            (ValueError, "c must", lambda: wave_residual(u, z, 0.0, torch.ones(3))),
            (ValueError, "u must", lambda: wave_residual(lambda z, t: z, z, 0.0, 1.0)),
            (ValueError, "dim must", lambda: PotentialNet(0)),
            (ValueError, "t must", lambda: PotentialNet(4)(z, torch.zeros(2))),
        ]


@pytest.mark.parametrize(
    ("u", "pde"),
    [(standing_wave, "wave"), (cooling_wave, "heat"), (travelling_wave, "transport")],
)
def test_residual_of_an_exact_solution_is_0(u, pde):
    t = torch.rand(5, dtype=torch.float64)
    assert wave_residual(u, places(), t, SPEED, pde=pde).abs().max() < 1e-12


def test_row_sums_of_the_hessian_do_not_see_an_exact_solution():
    # What the authors' code computes: about 2.5 at a crest, instead of 0.
    crest = (W / W.square().sum() * math.pi / 2)[None]
    rows = wave_residual(standing_wave, crest, 0.0, SPEED, laplacian="hessian_sum")
    torch.testing.assert_close(rows[0], -(SPEED**2) * (W.square().sum() - W * W.sum()))
    assert rows.abs().min() > 2


def test_laplacian_of_a_bowl_is_the_dimension():
    residual = wave_residual(bowl, places(4, 7), 0.0, 1.0)
    torch.testing.assert_close(residual, torch.full((4,), -7.0, dtype=torch.float64))


def test_hutchinson_is_exact_for_a_diagonal_hessian():
    # v'v = d for signs, so one probe is enough for a bowl.
    residual = wave_residual(bowl, places(4, 7), 0.0, 1.0, laplacian="hutchinson", seed=3)
    torch.testing.assert_close(residual, torch.full((4,), -7.0, dtype=torch.float64))


def test_hutchinson_is_unbiased():
    A = torch.tensor([[2.0, 1.0, -0.5], [1.0, 1.3, 0.7], [-0.5, 0.7, 1.0]], dtype=torch.float64)
    saddle = lambda z, t: ((z @ A) * z).sum(-1) / 2
    residual = wave_residual(
        saddle, places(1), 0.0, 1.0, laplacian="hutchinson", num_probes=2000, seed=0
    )
    # Trace 4.3; variance of one probe 2 * 2 * (1 + .25 + .49) = 7, so 0.2 is 3.4 standard errors.
    assert abs(-residual.item() - 4.3) < 0.2


def test_hutchinson_signs_come_from_the_seed():
    z = places()
    first, again, other = (
        wave_residual(standing_wave, z, 0.5, 1.0, laplacian="hutchinson", seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_sample_has_its_own_time():
    z, t = places(2), torch.tensor([0.2, 0.9], dtype=torch.float64)
    together = wave_residual(standing_wave, z, t, 1.3)
    apart = [wave_residual(standing_wave, z[i : i + 1], t[i], 1.3) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(apart))


def test_residual_differentiates_to_second_order():
    net = PotentialNet(3).double()
    c = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    z, t = places(2).requires_grad_(), torch.rand(2, dtype=torch.float64, requires_grad=True)
    for laplacian in ("exact", "hutchinson", "hessian_sum"):
        call = lambda z, t, c, name=laplacian: wave_residual(net, z, t, c, laplacian=name, seed=1)
        torch.autograd.gradcheck(call, (z, t, c))
        torch.autograd.gradgradcheck(call, (z, t, c))


def test_velocity_of_a_bowl_is_the_position():
    z = places()
    torch.testing.assert_close(fixed_flow(bowl).velocity(z, 2.0, 0), z)


def test_walk_along_a_slope_is_a_straight_line():
    z = places()
    walk = fixed_flow(slope).traverse(z, 0, 5)
    steps = torch.arange(6, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(walk, z + steps * W)


def test_walk_covers_the_trained_steps_by_default():
    flow, z = PotentialFlow(3, 1, num_steps=9), torch.randn(2, 3)
    walk = flow.traverse(z, 0)
    assert walk.shape == (5, 2, 3)
    assert torch.equal(walk[0], z)
    assert flow.traverse(z, 0, 0).shape == (1, 2, 3)


def test_walk_uses_the_potential_of_each_time():
    flow, z = PotentialFlow(4, 2, num_steps=6), torch.randn(3, 4)
    walk = flow.traverse(z, 1)
    for i in range(3):
        torch.testing.assert_close(walk[i + 1], walk[i] + flow.velocity(walk[i], i, 1))


def test_walk_without_grad_holds_no_graph():
    with torch.no_grad():
        assert not PotentialFlow(4, 1, 6).traverse(torch.randn(3, 4), 0).requires_grad


@pytest.mark.parametrize("num_steps", [2, 3, 8])
def test_pair_is_two_steps_of_the_walk(num_steps):
    flow, z = PotentialFlow(4, 1, num_steps), torch.randn(3, 4)
    last = max(num_steps // 2 - 2, 0)
    output, walk = flow.loss(z, 0, last), flow.traverse(z, 0, last + 2)
    torch.testing.assert_close(output.z1, walk[last + 1])
    torch.testing.assert_close(output.z2, walk[last + 2])
    torch.testing.assert_close(
        output.energy, flow.nets[0](walk[last], torch.full((3,), last))[:, 0]
    )


def test_selected_step_may_differ_between_samples():
    flow, z = PotentialFlow(4, 1, 8), torch.randn(3, 4)
    step = torch.tensor([2, 0, 1])
    output = flow.loss(z, 0, step)
    for row, i in enumerate(step.tolist()):
        alone = flow.loss(z, 0, i)
        for name in ("z1", "z2", "energy"):
            torch.testing.assert_close(getattr(output, name)[row], getattr(alone, name)[row])


def test_drawn_steps_are_uniform_over_all_but_the_last():
    flow = fixed_flow(lambda z, t: t, num_steps=8)  # its energy is the drawn step
    drawn = flow.loss(places(6000), 0, seed=5).energy.long()
    counts = torch.bincount(drawn, minlength=3)
    # Chi-squared with two degrees of freedom: above 13.8 with probability 1e-3.
    assert ((counts - 2000) ** 2 / 2000).sum() < 13.8
    assert len(counts) == 3
    assert torch.equal(drawn, flow.loss(places(6000), 0, seed=5).energy.long())


def test_generator_draws_the_step_and_leaves_the_default_one_alone():
    flow, z = PotentialFlow(4, 1, 40), torch.randn(50, 4)
    state = torch.get_rng_state()
    energies = [
        flow.loss(z, 0, generator=torch.Generator().manual_seed(s)).energy for s in (1, 1, 2)
    ]
    assert torch.equal(energies[0], energies[1])
    assert not torch.equal(energies[0], energies[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_parts_of_the_loss_are_their_formulas():
    flow, z = PotentialFlow(4, 1, 6).double(), places(5, 4)
    output = flow.loss(z, 0, 1, jvp_weight=0.5)
    walk = flow.traverse(z, 0)
    velocities = walk.diff(dim=0)
    residuals = [
        wave_residual(flow.nets[0], walk[i], float(i), flow.wave_speed[0]) for i in range(3)
    ]
    torch.testing.assert_close(output.ic, velocities[0].square().mean())
    torch.testing.assert_close(output.pde, torch.stack(residuals).square().mean())
    torch.testing.assert_close(output.velocity, velocities.square().sum(-1).mean())
    torch.testing.assert_close(output.total, output.ic + output.pde - 0.5 * output.jvp)


def test_jvp_of_the_identity_is_the_next_velocity():
    flow, z = PotentialFlow(4, 1, 6), torch.randn(5, 4)
    expected = flow.velocity(flow.traverse(z, 0, 2)[2], 2.0, 0).square().mean()
    for decoder in (None, nn.Identity()):
        torch.testing.assert_close(flow.loss(z, 0, 1, decoder).jvp, expected)


def test_jvp_of_a_linear_decoder_is_its_product_with_the_velocity():
    flow, z = PotentialFlow(4, 1, 6), torch.randn(5, 4)
    decoder = nn.Linear(4, 7)
    velocity = flow.velocity(flow.traverse(z, 0, 1)[1], 1.0, 0)
    expected = (velocity @ decoder.weight.mT).square().mean()
    torch.testing.assert_close(flow.loss(z, 0, 0, decoder).jvp, expected)


def test_gradient_reaches_potential_speed_codes_and_decoder():
    flow, z = PotentialFlow(4, 2, 6), torch.randn(5, 4, requires_grad=True)
    decoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
    flow.loss(z, 1, 1, decoder).total.backward()
    weights = [layer.weight for layer in decoder if isinstance(layer, nn.Linear)]
    for tensor in (z, *weights, *flow.nets[1].parameters()):
        assert tensor.grad.abs().sum() > 0
    assert flow.wave_speed.grad[0] == 0
    assert flow.wave_speed.grad[1] != 0


def test_frozen_generator_gets_no_gradient():
    flow, generator = PotentialFlow(4, 1, 6), nn.Linear(4, 8).requires_grad_(False)
    flow.loss(torch.randn(5, 4), 0, 1, generator).total.backward()
    assert generator.weight.grad is None
    assert flow.nets[0].space.weight.grad.abs().sum() > 0


def test_points_of_the_walk_keep_their_graph():
    # Detached points would hide how an early step moves later residuals.
    flow = PotentialFlow(4, 1, 8).double()
    z = places(5, 4)
    walk = flow.traverse(z, 0)
    kept = flow.loss(z, 0, 0, jvp_weight=0.0).pde
    cut = torch.stack(
        [
            wave_residual(flow.nets[0], walk[i].detach(), float(i), flow.wave_speed[0])
            for i in range(4)
        ]
    )
    weight = flow.nets[0].space.weight
    gradients = [torch.autograd.grad(loss, weight)[0] for loss in (kept, cut.square().mean())]
    torch.testing.assert_close(kept, cut.square().mean())
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3 * gradients[0].abs().max()


def test_row_sum_loss_is_the_released_one():
    # The released computation: one time for the batch, so the second time derivative is a sum over
    # it; derivative of the summed gradient; mean over B d elements; one step for all.
    flow = PotentialFlow(4, 1, 6, laplacian="hessian_sum").double()
    net, z, decoder = flow.nets[0], places(5, 4), nn.Linear(4, 3).double()

    def derivative(value, at):
        return torch.autograd.grad(value.sum(), at, create_graph=True)[0]

    def released(z, step):
        pde, start = 0.0, z.clone().requires_grad_()
        ic = derivative(net(start, torch.zeros(5)), start).square().mean()
        for i in range(3):
            z = z.clone().requires_grad_()
            time = torch.tensor(float(i), dtype=z.dtype, requires_grad=True)
            u = net(z, time.expand(5))
            velocity = derivative(u, z)
            acceleration = derivative(derivative(u, time), time)
            speed = flow.wave_speed[0]
            pde = pde + (acceleration - speed**2 * derivative(velocity, z)).square().mean()
            z = z + velocity
            if i == step:
                v = derivative(net(z, torch.full((5,), i + 1.0)), z)
                jvp = torch.func.jvp(decoder, (z,), (v,))[1].square().mean()
        return ic + pde / 3 - jvp

    expected, found = released(z, 1), flow.loss(z, 0, 1, decoder).total
    torch.testing.assert_close(found, expected)
    parameters = [*net.parameters(), *decoder.parameters()][:-1]  # its bias has no part
    torch.testing.assert_close(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters)
    )


def test_compiled_loss_has_the_same_gradients(fresh_dynamo):
    flow, z, decoder = PotentialFlow(4, 1, 2), torch.randn(5, 4), nn.Linear(4, 3)
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    weights = list(flow.parameters())
    expected, found = flow(z, 0, 0, decoder), compiled(z, 0, 0, decoder)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.total, weights), torch.autograd.grad(expected.total, weights)
    )


@pytest.mark.parametrize("dim", [1, 2, 3, 5])
def test_small_and_odd_dimensions_have_a_time_embedding(dim):
    net, z = PotentialNet(dim), torch.randn(3, dim)
    early, late = net(z, torch.zeros(3)), net(z, torch.full((3,), 2.0))
    assert early.isfinite().all()
    assert not torch.equal(early, late)


def test_frequencies_span_four_decades():
    frequencies = PotentialNet(8).frequencies
    expected = torch.tensor([math.exp(-math.log(1e4) * k / 3) for k in range(4)])
    torch.testing.assert_close(frequencies, expected)


def train(jvp_weight, steps=100):
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tensors of 128 elements
    flow = PotentialFlow(4, 1, num_steps=4)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs.append(flow.loss(torch.randn(32, 4), 0, jvp_weight=jvp_weight))
        outputs[-1].total.backward()
        optimizer.step()
    return outputs[0], outputs[-1]


def test_jvp_term_keeps_the_potential_from_becoming_constant():
    first, without = train(jvp_weight=0.0)
    assert first.ic + first.pde > 1e-3
    assert without.ic + without.pde < 1e-5
    _, with_it = train(jvp_weight=1.0)
    assert with_it.velocity > 3 * without.velocity
