"""MeanFlow: its objective, its sampler, and the direction of time."""

import math

import pytest
import torch
from torch import nn

from regularizers.generative import flow_matching_loss, meanflow_loss, meanflow_sample
from regularizers.representation import DispersiveRegularizer, dispersive_loss

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64, sums in another order


class _Net(nn.Module):
    """A small field u(z, r, t) that is far from linear."""

    def __init__(self, dim=2, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(dim + 2, width)
        self.out = nn.Linear(width, dim)

    def forward(self, z, r, t):
        times = torch.stack([r, t], 1).to(z.dtype)
        return self.out(self.hidden(torch.cat([z, times], 1)).tanh())


def _batch(n=5, dim=2):
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, n, dim, generator=generator, dtype=torch.float64)
    early, late = torch.rand(2, n, generator=generator, dtype=torch.float64).aminmax(dim=0)
    return data, {"noise": noise, "r": early, "t": late}


def test_equal_times_are_flow_matching():
    net = _Net().double()
    data, given = _batch()
    given["r"] = given["t"]
    for reduction in ("mean", "sum", "none"):
        found = meanflow_loss(net, data, **given, reduction=reduction)
        expected = flow_matching_loss(
            lambda x, t: net(x, t, t), data, noise=given["noise"], t=given["t"], reduction=reduction
        )
        assert torch.equal(found, expected)


def test_the_target_is_the_identity_of_meanflow():
    net = _Net().double()
    data, given = _batch()
    noise, r, t = given.values()
    at = lambda time: (1 - time)[:, None] * data + time[:, None] * noise
    step = 1e-6  # along the path z, r and t move by (v, 0, 1)
    slope = (net(at(t + step), r, t + step) - net(at(t - step), r, t - step)) / (2 * step)
    target = noise - data - (t - r)[:, None] * slope
    expected = (net(at(t), r, t) - target.detach()).square()
    found = meanflow_loss(net, data, **given, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_the_target_is_a_constant():
    net = _Net().double()
    data, given = _batch()
    noise, r, t = given.values()
    z = (1 - t)[:, None] * data + t[:, None] * noise
    predicted = net(z, r, t)
    squares = meanflow_loss(net, data, **given, reduction="none")
    residual = squares.detach().sqrt()
    parameters = list(net.parameters())
    # d/dtheta of the square is 2 residual du/dtheta: the residual's sign is that of the gradient.
    sign = torch.autograd.grad(squares.sum(), squares, retain_graph=True)[0]
    assert (sign == 1).all()
    found = torch.autograd.grad(squares.sum(), parameters)
    with torch.no_grad():
        _, slope = torch.func.jvp(
            net, (z, r, t), (noise - data, torch.zeros_like(r), torch.ones_like(t))
        )
        target = noise - data - (t - r)[:, None] * slope
    torch.testing.assert_close((predicted - target).abs().detach(), residual, **EXACT)
    expected = torch.autograd.grad((predicted - target).square().sum(), parameters)
    torch.testing.assert_close(found, expected)


def test_a_constant_field_costs_nothing_where_noise_less_data_is_constant():
    data, given = _batch()
    shift = torch.tensor([1.5, -0.5], dtype=torch.float64)
    given["noise"] = data + shift
    found = meanflow_loss(lambda z, r, t: shift.expand_as(z), data, **given)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-30)


def test_time_runs_from_data_at_zero_to_noise_at_one():
    # data = 2 noise + 1: the lines never cross, and z_t, t tell the noise.
    noise = torch.randn(64, 1, dtype=torch.float64)
    exact = lambda z, r, t: -(z + 1) / (2 - t)[:, None]
    assert meanflow_loss(exact, 2 * noise + 1, noise=noise, r=None, t=None) < 1e-28
    start = torch.tensor([[0.7]], dtype=torch.float64)
    for steps in (1, 2, 5):
        found = meanflow_sample(exact, (1, 1), steps=steps, noise=start)
        torch.testing.assert_close(found, torch.full_like(found, 2.4))
    # The exact field of the other direction (noise at 0), with the rule z_0 + u(z_0, 0, 1).
    exchanged = lambda z, r, t: (z + 1) / (1 + t)[:, None]
    zero, one = torch.zeros(1).double(), torch.ones(1).double()
    assert (start + exchanged(start, zero, one)).item() == pytest.approx(1.55)
    assert meanflow_loss(exchanged, 2 * noise + 1, noise=noise) > 1


def test_adaptive_weight_is_a_constant_power_of_the_error_of_a_sample():
    net = _Net().double()
    data, given = _batch()
    squares = meanflow_loss(net, data, **given, reduction="none")
    weight = (squares.sum(1, keepdim=True) + 0.1).pow(-0.7).detach()
    found = meanflow_loss(net, data, **given, adaptive_power=0.7, eps=0.1)
    expected = (weight * squares).mean()
    torch.testing.assert_close(found, expected, **EXACT)
    gradients = [torch.autograd.grad(loss, net.out.weight) for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_drawn_times_are_sorted_logistic_normal_and_share_a_part():
    seen = {}

    def field(z, r, t):
        seen.update(r=r, t=t)
        return z

    generator = torch.Generator().manual_seed(0)
    meanflow_loss(field, torch.zeros(20_000, 1), flow_ratio=0.25, generator=generator)
    r, t = seen["r"], seen["t"]
    assert (r <= t).all()
    assert (t < 1).all()
    equal = r == t
    assert abs(equal.float().mean() - 0.25) < 0.013  # four standard errors
    both = torch.cat([r[~equal], t[~equal]]).logit()
    assert abs(both.mean() + 0.4) < 0.03
    assert abs(both.std() - 1) < 0.03


def test_flow_ratios_of_zero_and_one():
    seen = {}

    def field(z, r, t):
        seen["equal"] = (r == t).sum().item()
        return z

    for ratio, count in ((0.0, 0), (1.0, 50)):
        meanflow_loss(field, torch.zeros(50, 1), flow_ratio=ratio)
        assert seen["equal"] == count


def test_nothing_is_left_of_the_slope_where_times_are_equal():
    data, given = _batch()
    given["r"] = given["t"]
    steep = lambda z, r, t: z + (t - r)[:, None].abs().sqrt()  # infinite slope in t at t = r
    assert meanflow_loss(steep, data, **given).isfinite()


def test_condition_is_handed_on():
    cond = {"state": 3}

    def field(z, r, t, given):
        assert given is cond
        return z

    data = torch.randn(5, 2)
    meanflow_loss(field, data, cond)
    meanflow_sample(field, (5, 2), cond)


def test_the_penalty_of_a_policy_comes_out_with_its_gradient():
    net = _Net().double()
    data, given = _batch()
    regularized = DispersiveRegularizer(net, ["hidden"], weight=0.5)
    loss, penalty = meanflow_loss(regularized, data, **given, has_aux=True)
    assert torch.equal(loss, meanflow_loss(net, data, **given))
    z = (1 - given["t"])[:, None] * data + given["t"][:, None] * given["noise"]
    features = net.hidden(torch.cat([z, torch.stack([given["r"], given["t"]], 1)], 1))
    expected = 0.5 * dispersive_loss(features)
    torch.testing.assert_close(penalty, expected, **EXACT)
    gradients = [torch.autograd.grad(one, net.hidden.weight) for one in (penalty, expected)]
    torch.testing.assert_close(*gradients)


def test_a_generator_decides_noise_and_times():
    data = torch.randn(5, 2)
    draw = lambda seed: meanflow_loss(
        lambda z, r, t: z * t[:, None], data, generator=torch.Generator().manual_seed(seed)
    )
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    sample = lambda seed: meanflow_sample(
        lambda z, r, t: z / 2, (3, 2), generator=torch.Generator().manual_seed(seed)
    )
    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_give_a_float32_loss(dtype):
    data, given = _batch()
    net = _Net().to(dtype)
    loss = meanflow_loss(net, data.to(dtype), **{k: v.to(dtype) for k, v in given.items()})
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    expected = meanflow_loss(net.double(), data, **given)
    torch.testing.assert_close(loss.double(), expected, rtol=5e-2, atol=5e-2)


def test_nan_gives_nan():
    data, given = _batch()
    data[0, 0] = math.nan
    assert meanflow_loss(_Net().double(), data, **given).isnan()


def test_compiles_to_one_graph(fresh_dynamo):
    regularized = DispersiveRegularizer(_Net().double(), ["hidden"])
    data, given = _batch()

    def total(data):
        loss, penalty = meanflow_loss(regularized, data, **given, has_aux=True)
        return loss + penalty

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(data), total(data))
    gradients = [
        torch.autograd.grad(f(data), list(regularized.parameters())) for f in (compiled, total)
    ]
    torch.testing.assert_close(*gradients)


def test_bad_input_names_the_argument():
    data, given = _batch()
    field = lambda z, r, t: z
    late = {**given, "r": given["t"] + 0.1}
    for exception, name, call in [
        (TypeError, "data must", lambda: meanflow_loss(field, data.long())),
        (ValueError, "data must", lambda: meanflow_loss(field, data[:0])),
        (ValueError, "r must not be above t", lambda: meanflow_loss(field, data, **late)),
        (ValueError, "r and t must", lambda: meanflow_loss(field, data, t=given["t"])),
        (ValueError, "r must", lambda: meanflow_loss(field, data, **{**given, "r": -given["r"]})),
        (
            ValueError,
            "t must",
            lambda: meanflow_loss(field, data, **{**given, "t": given["t"] + 1}),
        ),
        (
            ValueError,
            "r must",
            lambda: meanflow_loss(field, data, **{**given, "r": given["r"][:2]}),
        ),
        (ValueError, "noise must", lambda: meanflow_loss(field, data, noise=data[:2])),
        (ValueError, "flow_ratio must", lambda: meanflow_loss(field, data, flow_ratio=1.5)),
        (ValueError, "adaptive_power must", lambda: meanflow_loss(field, data, adaptive_power=-1)),
        (ValueError, "eps must", lambda: meanflow_loss(field, data, eps=-1.0)),
        (ValueError, "reduction must", lambda: meanflow_loss(field, data, reduction="max")),
        (ValueError, "u must return", lambda: meanflow_loss(lambda z, r, t: z[:, :1], data)),
        (ValueError, "steps must", lambda: meanflow_sample(field, (2, 2), steps=0)),
        (ValueError, "shape must", lambda: meanflow_sample(field, ())),
        (ValueError, "noise must", lambda: meanflow_sample(field, (2, 2), noise=data)),
    ]:
        with pytest.raises(exception, match=name):
            call()


@pytest.mark.slow
def test_one_step_finds_both_modes_where_one_step_of_flow_matching_finds_their_mean():
    def train(loss_of, field_of):
        net = _Net(dim=1, width=64)
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-2)
        generator = torch.Generator().manual_seed(0)
        for _ in range(300):
            sign = torch.randint(2, (128, 1), generator=generator) * 2.0 - 1
            data = 2 * sign + 0.2 * torch.randn(128, 1, generator=generator)
            loss = loss_of(net, data, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        noise = torch.randn(2000, 1, generator=generator)
        with torch.no_grad():
            return meanflow_sample(field_of(net), (2000, 1), noise=noise)

    torch.set_num_threads(1)
    average = train(lambda net, data, g: meanflow_loss(net, data, generator=g), lambda net: net)
    plain = train(
        lambda net, data, g: flow_matching_loss(lambda x, t: net(x, t, t), data, generator=g),
        lambda net: lambda z, r, t: net(z, t, t),
    )
    assert average.std() > 1.5  # two modes at -2 and 2
    assert plain.std() < 0.7
