"""Flow matching: the path, its velocity, and the loss between velocities."""

import math

import pytest
import torch
from torch import nn

from regularizers.generative import flow_matching_loss


def _seen(path, t):
    """What the model is shown, and the velocity that costs nothing."""
    data = torch.randn(4, 3, 2, dtype=torch.float64)
    noise = torch.randn(4, 3, 2, dtype=torch.float64)
    times = torch.full((4,), t, dtype=torch.float64)
    seen = {}

    def velocity(x, at):
        seen["x"] = x
        return torch.zeros_like(x)

    squares = flow_matching_loss(velocity, data, noise=noise, t=times, path=path, reduction="none")
    return data, noise, seen["x"], squares


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_data_stand_at_zero_and_noise_at_one(path):
    data, _, x, _ = _seen(path, 0.0)
    assert torch.equal(x, data)
    _, noise, x, _ = _seen(path, 1.0)
    torch.testing.assert_close(x, noise, rtol=0, atol=1e-15)


def test_linear_velocity_is_noise_less_data():
    data, noise, x, squares = _seen("linear", 0.3)
    torch.testing.assert_close(x, 0.7 * data + 0.3 * noise)
    torch.testing.assert_close(squares, (noise - data).square())


def test_cosine_velocity_is_the_derivative_of_the_path():
    data, noise, x, squares = _seen("cosine", 0.3)
    at = lambda t: math.cos(math.pi * t / 2) * data + math.sin(math.pi * t / 2) * noise
    torch.testing.assert_close(x, at(0.3))
    derivative = (at(0.3 + 1e-6) - at(0.3 - 1e-6)) / 2e-6
    torch.testing.assert_close(squares, derivative.square(), rtol=1e-7, atol=1e-9)


def test_the_exact_velocity_costs_nothing():
    data, noise = torch.randn(5, 2), torch.randn(5, 2)
    assert flow_matching_loss(lambda x, t: noise - data, data, noise=noise) == 0


def test_reductions_agree():
    data, noise, t = torch.randn(5, 2, 3), torch.randn(5, 2, 3), torch.rand(5)
    loss = lambda reduction: flow_matching_loss(
        lambda x, t: x, data, noise=noise, t=t, reduction=reduction
    )
    torch.testing.assert_close(loss("none").mean(), loss("mean"))
    torch.testing.assert_close(loss("none").sum(), loss("sum"))
    assert loss("none").shape == data.shape


def test_condition_is_handed_on():
    cond = {"state": 3}

    def velocity(x, t, given):
        assert given is cond
        assert t.shape == (5,)
        return x

    flow_matching_loss(velocity, torch.randn(5, 2), cond)


def test_a_generator_decides_noise_and_times():
    data = torch.randn(5, 2)
    draw = lambda seed: flow_matching_loss(
        lambda x, t: x * t[:, None], data, generator=torch.Generator().manual_seed(seed)
    )
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_gradient_reaches_the_model_and_the_data():
    model, data = nn.Linear(2, 2), torch.randn(5, 2, requires_grad=True)
    flow_matching_loss(lambda x, t: model(x), data).backward()
    assert model.weight.grad.abs().sum() > 0
    assert data.grad.abs().sum() > 0


def test_learned_velocity_carries_noise_to_the_data():
    # Data 2 e + 1 in one dimension: integrating from 1 to 0 must give their mean and deviation.
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    velocity = lambda x, t: model(torch.cat([x, t[:, None]], 1))
    for _ in range(400):
        loss = flow_matching_loss(velocity, 2 * torch.randn(256, 1) + 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(2000, 1)
    with torch.no_grad():
        for step in range(50):
            x = x - velocity(x, torch.full((2000,), 1 - step / 50)) / 50
    assert abs(x.mean() - 1) < 0.25
    assert abs(x.std() - 2) < 0.25


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtype_is_kept(dtype):
    data = torch.randn(5, 2).to(dtype)
    assert flow_matching_loss(lambda x, t: x, data).dtype == dtype


def test_loss_is_float32_under_autocast():
    model = nn.Linear(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert flow_matching_loss(lambda x, t: model(x), torch.randn(5, 2)).dtype == torch.float32


def test_compiles_to_one_graph(fresh_dynamo):
    model, data = nn.Linear(2, 2), torch.randn(5, 2)
    step = lambda data, noise, t: flow_matching_loss(lambda x, t: model(x), data, noise=noise, t=t)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    noise, t = torch.randn(5, 2), torch.rand(5)
    torch.testing.assert_close(compiled(data, noise, t), step(data, noise, t))


def test_bad_input_names_the_argument():
    x = torch.randn(5, 2)
    loss = lambda data=x, function=lambda x, t: x, **options: flow_matching_loss(
        function, data, **options
    )
    for exception, name, call in [
        (TypeError, "data must", lambda: loss(x.long())),
        (ValueError, "data must", lambda: loss(torch.tensor(1.0))),
        (ValueError, "noise must", lambda: loss(noise=x[:3])),
        (TypeError, "noise must", lambda: loss(noise=x.double())),
        (ValueError, "t must", lambda: loss(t=torch.rand(5, 1))),
        (ValueError, "t must", lambda: loss(t=torch.full((5,), 1.5))),
        (ValueError, "t must", lambda: loss(t=torch.full((5,), torch.nan))),
        (ValueError, "path must", lambda: loss(path="sine")),
        (ValueError, "reduction must", lambda: loss(reduction="average")),
        (ValueError, "velocity_fn must", lambda: loss(function=lambda x, t: x[:, :1])),
    ]:
        with pytest.raises(exception, match=name):
            call()
