"""Weight compander (paper 45)."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from regularizers.weights import (
    WeightCompander,
    apply_compander,
    compand,
    compand_inverse,
    compander_params,
)

F64 = torch.float64
KINDS = pytest.mark.parametrize("kind", ["arctan", "tanh"])
PER = pytest.mark.parametrize("per", ["layer", "channel"])


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5))


@pytest.mark.parametrize(
    ("a", "b", "v", "w"),
    [
        (1.0, 1.0, [0.05, 0.2, -2.0, 10.0], [0.0499584, 0.197396, -1.107149, 1.471128]),
        (0.5, 0.2, [0.05, 0.2, 10.0], [0.122489, 0.392699, 0.775399]),
    ],
)
def test_known_values_of_the_arctangent(a, b, v, w):
    found = compand(torch.tensor(v, dtype=F64), a, b)
    torch.testing.assert_close(found, torch.tensor(w, dtype=F64), rtol=0, atol=1e-6)
    assert found.abs().max() < a * math.pi / 2


@KINDS
def test_curve_is_odd_increasing_and_inverted(kind):
    v = torch.linspace(-2, 2, 401, dtype=F64)
    w = compand(v, 0.7, 0.4, kind=kind)
    torch.testing.assert_close(compand(-v, 0.7, 0.4, kind=kind), -w)
    assert (w.diff() > 0).all()
    back = compand_inverse(w, 0.7, 0.4, kind=kind)
    torch.testing.assert_close(back, v, rtol=0, atol=1e-6)


@KINDS
def test_wide_curves_approach_the_identity(kind):
    v = torch.linspace(-2, 2, 41, dtype=F64)
    torch.testing.assert_close(compand(v, 1e5, 1e5, kind=kind), v, rtol=0, atol=1e-9)


def test_slope_is_that_of_the_formula():
    v = torch.tensor([0.0, 0.3, -2.0], dtype=F64, requires_grad=True)
    a = torch.tensor(0.5, dtype=F64, requires_grad=True)
    b = torch.tensor(0.2, dtype=F64, requires_grad=True)
    w = compand(v, a, b)
    slope, in_a, in_b = torch.autograd.grad(w.sum(), (v, a, b))
    torch.testing.assert_close(slope, (a / b * (w / a).cos() ** 2).detach())
    torch.testing.assert_close(in_a, (w / a).sum().detach())
    torch.testing.assert_close(in_b, (-a * v / (b**2 + v**2)).sum().detach())


@KINDS
def test_gradients_agree_with_finite_differences(kind):
    torch.manual_seed(0)
    v = torch.randn(3, 2, dtype=F64, requires_grad=True)
    a = torch.tensor([[0.5], [1.0], [2.0]], dtype=F64, requires_grad=True)
    b = torch.tensor(0.3, dtype=F64, requires_grad=True)
    torch.autograd.gradcheck(lambda *x: compand(*x, kind=kind), (v, a, b))
    torch.autograd.gradgradcheck(lambda *x: compand(*x, kind=kind), (v, a, b))


def test_half_types_are_computed_in_float32():
    v = torch.randn(100).bfloat16()
    assert torch.equal(compand(v, 0.5, 0.2), compand(v.float(), 0.5, 0.2).bfloat16())


@KINDS
@PER
@pytest.mark.parametrize("options", [{}, {"a": 0.01, "b": 0.05}])
def test_layers_start_as_they_were(kind, per, options):
    plain = model().eval()
    companded = apply_compander(copy.deepcopy(plain), kind=kind, per=per, **options)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(companded(x), plain(x), rtol=1e-5, atol=1e-5)


def test_defaults_are_twice_the_deviation_with_the_height_raised_to_the_largest_weight():
    w = torch.randn(50, 40, dtype=F64)
    compander = WeightCompander(w)
    torch.testing.assert_close(compander.log_b.exp(), 2 * w.std(correction=0))
    least = 1.01 * 2 / math.pi * w.abs().max()
    expected = torch.maximum(2 * w.std(correction=0), least)
    torch.testing.assert_close(compander.log_a.exp().detach(), expected)
    rows = WeightCompander(w, per="channel")
    torch.testing.assert_close(rows.log_b.exp().flatten(), 2 * w.std(1, correction=0))


@PER
def test_bound_survives_any_step(per):
    layer = apply_compander(nn.Linear(6, 4), per=per)
    optimizer = torch.optim.SGD(compander_params(layer, lr=1e-3), lr=1e4)
    compander = layer.parametrizations.weight[0]
    for _ in range(5):
        optimizer.zero_grad()
        (-layer.weight.square().sum()).backward()
        optimizer.step()
        assert (layer.weight.abs() <= compander.bound).all()
    assert layer.parametrizations.weight.original.abs().max() > 10 * compander.bound.max()


def test_weights_are_companded_at_every_forward():
    layer = apply_compander(nn.Linear(6, 4))
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(3)
    compander = layer.parametrizations.weight[0]
    v = layer.parametrizations.weight.original
    torch.testing.assert_close(
        layer.weight, compand(v, compander.log_a.exp(), compander.log_b.exp())
    )


@pytest.mark.parametrize("learn", [True, False])
def test_shape_is_learned_on_request(learn):
    layer = apply_compander(nn.Linear(6, 4), learn=learn)
    layer(torch.randn(3, 6)).square().sum().backward()
    for parameter in layer.parametrizations.weight[0].parameters():
        assert parameter.requires_grad is learn
        assert (parameter.grad is not None) is learn


def test_removal_leaves_the_effective_weight():
    layer = apply_compander(nn.Linear(6, 4))
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(1)
    effective = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, effective)


def test_assigned_weights_raise_the_bound_if_they_must():
    layer = apply_compander(nn.Linear(6, 4))
    new = 100 * torch.randn(4, 6)
    layer.weight = new
    torch.testing.assert_close(layer.weight, new, rtol=1e-4, atol=1e-3)


def test_only_weights_of_the_types_change_and_the_rest_is_left():
    companded = apply_compander(model(), types=(nn.Linear,))
    assert parametrize.is_parametrized(companded[3], "weight")
    assert not parametrize.is_parametrized(companded[3], "bias")
    assert not any(parametrize.is_parametrized(companded[i]) for i in range(3))
    again = apply_compander(companded)
    assert len(again[3].parametrizations.weight) == 1
    assert parametrize.is_parametrized(again[0], "weight")


def test_groups_hold_every_parameter_once_and_shapes_do_not_decay():
    companded = apply_compander(model())
    others, shapes = compander_params(companded, lr=0.3)
    assert len(shapes["params"]) == 4
    assert shapes["weight_decay"] == 0
    assert shapes["lr"] == 0.3
    both = [id(p) for group in (others, shapes) for p in group["params"]]
    assert sorted(both) == sorted(id(p) for p in companded.parameters())


def test_zero_and_constant_weights_start_as_they_were():
    for value in (0.0, 0.3):
        layer = nn.Linear(4, 3)
        nn.init.constant_(layer.weight, value)
        apply_compander(layer, per="channel")
        torch.testing.assert_close(layer.weight, torch.full((3, 4), value))


def test_state_dict_round_trip_and_copies_give_equal_weights():
    first, second = apply_compander(model(), per="channel"), apply_compander(model(), per="channel")
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second[3].weight, first[3].weight)
    assert torch.equal(copy.deepcopy(first)[0].weight, first[0].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F64])
def test_companded_layers_move_to_other_types(dtype):
    layer = apply_compander(nn.Linear(6, 4)).to(dtype)
    x = torch.randn(3, 6, dtype=dtype)
    out = layer(x)
    out.sum().backward()
    assert out.dtype == dtype
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_companded_layer_compiles_to_one_graph():
    layer = apply_compander(nn.Linear(6, 4))
    x = torch.randn(3, 6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_training_on_noise_leaves_smaller_largest_weights_than_the_plain_layer():
    def run(compander):
        torch.manual_seed(0)
        x, y = torch.randn(100, 20), torch.randint(0, 2, (100,))
        net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
        if compander:
            apply_compander(net, a=0.2, b=0.2, learn=False)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        return max(net[i].weight.abs().max().item() for i in (0, 2)), net

    plain, _ = run(False)
    held, net = run(True)
    bounds = [net[i].parametrizations.weight[0].bound.item() for i in (0, 2)]
    assert held <= max(bounds)
    assert held < 0.6 * plain


def test_bad_input_names_the_argument():
    v, layer = torch.ones(3), nn.Linear(3, 3)
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    tied[1].weight = tied[0].weight
    for exception, name, call in (
        (TypeError, "v must", lambda: compand(torch.ones(3, dtype=torch.int32), 1.0, 1.0)),
        (ValueError, "a must", lambda: compand(v, 0.0, 1.0)),
        (ValueError, "a must", lambda: compand(v, torch.tensor([1.0, -1.0, 1.0]), 1.0)),
        (ValueError, "b must", lambda: compand(v, 1.0, -1.0)),
        (TypeError, "a must", lambda: compand(v, "1", 1.0)),
        (ValueError, "kind must", lambda: compand(v, 1.0, 1.0, kind="erf")),
        (ValueError, "w must", lambda: compand_inverse(v, 0.6, 1.0)),
        (ValueError, "w must", lambda: compand_inverse(v, 1.0, 1.0, kind="tanh")),
        (ValueError, "w must", lambda: compand_inverse(v * math.nan, 1.0, 1.0)),
        (TypeError, "weight must", lambda: WeightCompander(torch.ones(3, dtype=torch.int8))),
        (ValueError, "weight must", lambda: WeightCompander(torch.ones(0, 3))),
        (ValueError, "weight must", lambda: WeightCompander(v * math.inf)),
        (ValueError, "a must", lambda: WeightCompander(v, a=0.0)),
        (ValueError, "b must", lambda: WeightCompander(v, b=0.0)),
        (ValueError, "per must", lambda: WeightCompander(v, per="row")),
        (ValueError, "kind must", lambda: WeightCompander(v, kind="erf")),
        (TypeError, "model must", lambda: apply_compander(v)),
        (ValueError, "model must", lambda: apply_compander(nn.ReLU())),
        (ValueError, "skip must", lambda: apply_compander(layer, skip=["head"])),
        (ValueError, "skip must", lambda: apply_compander(tied)),
        (ValueError, "b must", lambda: apply_compander(layer, b=-1.0)),
        (ValueError, "model must", lambda: compander_params(layer)),
        (ValueError, "lr must", lambda: compander_params(layer, lr=-1.0)),
    ):
        with pytest.raises(exception, match=name):
            call()
    assert not parametrize.is_parametrized(layer)
