"""ALLoRA: the scale's values, the backward pass it makes, and what it does to training."""

import pytest
import torch
from torch import nn

from regularizers.optim import (
    ALLoRALinear,
    LowRankLinear,
    inject_allora,
    scale_gradient,
    scale_updates,
)
from tests.harness import MethodContract

MODES = ("row", "matrix", "output")


def grown(dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = ALLoRALinear(nn.Linear(6, 4, dtype=dtype), rank=2, **options)
    nn.init.normal_(layer.lora_B)
    return layer


class TestALLoRALinear(MethodContract):
    def build(self, dtype):
        return grown(dtype, train_bias=True)

    def call(self, module, dtype):
        torch.manual_seed(2)
        return module(torch.randn(5, 6).to(dtype))

    def bad_inputs(self):
        def made(**options):
            return lambda: ALLoRALinear(nn.Linear(6, 4), **{"rank": 2, **options})

        x = torch.ones(2, 3)
        return [
            (ValueError, "eta", made(eta=0.0)),
            (ValueError, "eta", made(eta=-1.0)),
            (ValueError, "rank", made(rank=0)),
            (ValueError, "rank", made(rank=5)),
            (ValueError, "mode", made(mode="column")),
            (ValueError, "apply_to", made(apply_to="step")),
            (ValueError, "apply_to must be 'gradient'", made(mode="output", apply_to="update")),
            (TypeError, "x must", lambda: scale_gradient(torch.ones(2, dtype=torch.long), 1.0)),
            (ValueError, "scale", lambda: scale_gradient(x, torch.ones(2))),
            (ValueError, "scale", lambda: scale_gradient(x, torch.ones(1, 2, 3))),
            (ValueError, "target", lambda: inject_allora(nn.Sequential(nn.Linear(2, 2)), "fc")),
            (ValueError, "output", lambda: grown(mode="output").gradient_scale()),
        ]


def test_scale_at_given_norms():
    layer = ALLoRALinear(nn.Linear(6, 5), rank=2, eta=2.0)
    norms = torch.tensor([0.0, 1e-4, 0.01, 1.0, 4.0])
    with torch.no_grad():
        layer.lora_B.copy_(norms[:, None] * torch.tensor([0.6, 0.8]))
    want = torch.tensor([2.0, 1.9996, 1.96116, 0.894427, 0.485071])
    torch.testing.assert_close(layer.gradient_scale().flatten(), want, rtol=1e-5, atol=0)


def test_scale_falls_as_a_row_grows_and_starts_at_eta():
    layer = ALLoRALinear(nn.Linear(6, 6), rank=1, eta=3.0)
    with torch.no_grad():
        layer.lora_B.copy_(torch.arange(6.0)[:, None])
    scale = layer.gradient_scale().flatten()
    assert scale[0] == pytest.approx(3.0)
    assert (scale.diff() < 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_forward_is_that_of_lora_bit_for_bit(mode):
    layer, x = grown(torch.float32, mode=mode), torch.randn(3, 6)
    plain = LowRankLinear(nn.Linear(6, 4), rank=2, alpha=2.0)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("mode", MODES)
def test_backward_is_that_of_a_scaled_branch_and_its_detached_rest(mode):
    layer = grown(mode=mode, eta=1.5)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    leaves = (x, layer.lora_A, layer.lora_B)
    weights = torch.randn(3, 4, dtype=torch.float64)
    have = torch.autograd.grad((layer(x).sin() * weights).sum(), leaves)
    branch = x @ layer.lora_A.T @ layer.lora_B.T
    s = layer.gradient_scale(branch)
    s = s.T if mode == "row" else s
    y = x @ layer.weight.T + layer.bias + branch * s + (branch * (1 - s)).detach()
    want = torch.autograd.grad((y.sin() * weights).sum(), leaves)
    torch.testing.assert_close(have, want)


def test_gradients_are_those_of_the_formula_row_by_row():
    layer, x = grown(), torch.randn(1, 6, dtype=torch.float64)
    delta = torch.randn(1, 4, dtype=torch.float64)
    (layer(x) * delta).sum().backward()
    s = layer.gradient_scale()
    torch.testing.assert_close(layer.lora_B.grad, s * delta.T @ (x @ layer.lora_A.T))
    torch.testing.assert_close(layer.lora_A.grad, layer.lora_B.T @ (s * delta.T) @ x)


def test_rows_are_scaled_independently():
    layer, x = grown(), torch.randn(3, 6, dtype=torch.float64)
    (before,) = torch.autograd.grad(layer(x).sum(), layer.lora_B)
    with torch.no_grad():
        layer.lora_B[0] *= 5
    (after,) = torch.autograd.grad(layer(x).sum(), layer.lora_B)
    assert torch.equal(before[1:], after[1:])
    assert (after[0].abs() < before[0].abs()).all()


def test_gradient_through_the_frozen_weight_is_not_scaled():
    layer = ALLoRALinear(nn.Linear(6, 4), rank=2)  # B = 0: no other way
    x = torch.randn(3, 6, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 6))


def test_merged_weight_is_the_sum():
    layer = grown()
    want = layer.weight + layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.to_linear().weight, want)


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5), torch.tensor([0.5, 1.0, 2.0])], ids=str)
def test_scaled_gradient_of_an_unchanged_value(scale):
    x = torch.randn(2, 3, requires_grad=True)
    y = scale_gradient(x, scale)
    assert torch.equal(y, x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(2, 3) * scale)


def test_scale_gets_no_gradient():
    x, scale = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    scale_gradient(x, scale).sum().backward()
    assert scale.grad is None


def test_second_derivatives_forward_mode_and_functorch_scale_too():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    f = lambda z: scale_gradient(z, scale).pow(3).sum()
    (grad,) = torch.autograd.grad(f(x), x, create_graph=True)
    torch.testing.assert_close(grad, 3 * x * x * scale)
    # The factor z of the gradient went through the scale too.
    (second,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(second, 6 * x * scale * scale)
    z = x.detach()
    torch.testing.assert_close(torch.func.grad(f)(z), 3 * z * z * scale)
    _, tangent = torch.func.jvp(f, (z,), (torch.ones_like(z),))
    torch.testing.assert_close(tangent, (3 * z * z * scale).sum())
    batch = torch.stack((z, 2 * z))
    want = torch.stack([3 * row * row * scale for row in batch])
    torch.testing.assert_close(torch.vmap(torch.func.grad(f))(batch), want)


def rank_one_loss(make, steps=60, lr=0.02):
    """Loss of a layer that learns a rank-1 change of its weight."""
    torch.manual_seed(3)
    base = nn.Linear(16, 12, bias=False)
    change = torch.randn(12, 1) @ torch.randn(1, 16) / 4
    x = torch.randn(256, 16)
    target = x @ (base.weight.detach() + change).T
    torch.manual_seed(4)
    layer = make(base)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().sum(1).mean() / 2
        loss.backward()
        optimizer.step()
    return loss.item()


def test_rank_one_change_is_learned_faster_than_by_lora():
    losses = [
        rank_one_loss(lambda base: LowRankLinear(base, 4)),
        *(rank_one_loss(lambda base, e=eta: ALLoRALinear(base, 4, eta=e)) for eta in (2.0, 4.0)),
    ]
    assert losses[1] < 0.8 * losses[0]
    assert losses[2] < 0.8 * losses[1]


def test_adam_cancels_a_constant_scale_of_the_gradient():
    ends = []
    for eta in (1.0, 4.0):
        layer = grown(torch.float32, eta=eta)
        nn.init.zeros_(layer.lora_B)
        optimizer = torch.optim.Adam([layer.lora_B], lr=0.01, eps=0.0)
        layer(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
        ends.append(layer.lora_B.detach())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("mode", ["row", "matrix"])
def test_scaled_updates_are_steps_times_the_scale(mode):
    layers = [grown(mode=mode, apply_to="update", eta=3.0) for _ in range(2)]
    optimizers = [torch.optim.Adam([m.lora_A, m.lora_B], lr=0.1) for m in layers]
    handle = scale_updates(optimizers[0], layers[0])
    start = [layers[1].lora_A.detach().clone(), layers[1].lora_B.detach().clone()]
    scale = layers[1].gradient_scale()
    for layer, optimizer in zip(layers, optimizers, strict=True):
        layer(torch.ones(2, 6, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    plain = [layers[1].lora_A, layers[1].lora_B]
    scales = (scale if mode == "matrix" else 1.0, scale)
    want = [a + s * (b - a) for a, b, s in zip(start, plain, scales, strict=True)]
    torch.testing.assert_close([layers[0].lora_A, layers[0].lora_B], want, check_layout=False)
    handle.remove()
    before = layers[0].lora_B.detach().clone()
    optimizers[0].step()
    assert ((layers[0].lora_B - before).abs() > 0.05).all()  # Adam's own step is near 0.1


def test_scaled_updates_need_a_layer():
    layer = grown()
    with pytest.raises(ValueError, match="apply_to='update'"):
        scale_updates(torch.optim.SGD([layer.lora_B], lr=0.1), layer)


def test_injected_model_has_the_layers_and_options():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    model = inject_allora(model, "0", rank=3, eta=1.5, mode="matrix", trainable="2")
    assert isinstance(model[0], ALLoRALinear)
    assert (model[0].rank, model[0].eta, model[0].mode) == (3, 1.5, "matrix")
    assert model[2].weight.requires_grad
