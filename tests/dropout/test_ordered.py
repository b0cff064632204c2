"""Ordered low-rank layers: the method contract and the layers' facts of the sheet of paper 71."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.dropout import OrderedLowRankConv2d, OrderedLowRankLinear
from tests.harness import MethodContract


class TestOrderedLowRankLinear(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return OrderedLowRankLinear(7, 5, dtype=dtype)

    def call(self, module, dtype):
        return module(torch.linspace(-1, 1, 42, dtype=dtype).reshape(3, 2, 7))

    def inert(self, module):
        x = torch.randn(4, 7)
        return module(x), F.linear(x, module.factor_out @ module.factor_in, module.bias)

    def bad_inputs(self):
        layer = OrderedLowRankLinear(4, 3)
        return [
            (ValueError, "in_features must", lambda: OrderedLowRankLinear(0, 3)),
            (ValueError, "out_features must", lambda: OrderedLowRankLinear(3, 0)),
            (ValueError, "rank must", lambda: OrderedLowRankLinear(4, 3, rank=4)),
            (ValueError, "rank must", lambda: OrderedLowRankLinear(4, 3, rank=-1)),
            (TypeError, "rank must", lambda: OrderedLowRankLinear(4, 3, rank=0.5)),
            (ValueError, "rank must", lambda: layer(torch.ones(2, 4), rank=4)),
            (ValueError, "rank must", lambda: layer(torch.ones(2, 4), rank=-1)),
            (TypeError, "x must", lambda: layer(torch.ones(2, 4).int())),
            (ValueError, "threshold must", lambda: layer.shrink_(-1.0)),
            (
                TypeError,
                "linear must",
                lambda: OrderedLowRankLinear.from_linear(nn.Conv2d(1, 1, 1)),
            ),
        ]


class TestOrderedLowRankConv2d(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return OrderedLowRankConv2d(2, 5, (3, 2), stride=2, padding=(1, 0), dtype=dtype)

    def call(self, module, dtype):
        return module(torch.linspace(-1, 1, 60, dtype=dtype).reshape(1, 2, 6, 5))

    def inert(self, module):
        x = torch.randn(2, 2, 6, 5)
        return module(x), F.conv2d(x, module.weight, module.bias, 2, (1, 0))

    def bad_inputs(self):
        build = OrderedLowRankConv2d
        reflecting = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
        return [
            (ValueError, "groups must", lambda: build(4, 4, 3, groups=2)),
            (ValueError, "groups must", lambda: build.from_conv2d(nn.Conv2d(4, 4, 3, groups=4))),
            (ValueError, "conv must", lambda: build.from_conv2d(reflecting)),
            (TypeError, "conv must", lambda: build.from_conv2d(nn.Linear(2, 2))),
            (ValueError, "rank must", lambda: build(1, 20, 3, rank=10)),
            (ValueError, "rank must", lambda: build(1, 4, 3)(torch.ones(1, 1, 4, 4), rank=5)),
        ]


CONVOLUTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"padding": "valid", "stride": (2, 1), "bias": False},
    {"padding": (2, 0), "dilation": (1, 2)},
]


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_full_rank_of_a_factorised_linear_layer_computes_what_it_computed(shape):
    dense = nn.Linear(*shape)
    x = torch.randn(4, shape[0])
    layer = OrderedLowRankLinear.from_linear(dense)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.to_linear()(x), dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_full_rank_of_a_factorised_convolution_computes_what_it_computed(options):
    dense = nn.Conv2d(3, 6, (3, 2), **options)
    x = torch.randn(2, 3, 9, 8)
    layer = OrderedLowRankConv2d.from_conv2d(dense)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.to_conv2d()(x), dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", range(6))
def test_rank_b_is_the_best_approximation_of_that_rank(rank):
    # Eckart-Young: the residual is the norm of the singular values left out.
    dense = nn.Linear(8, 5, bias=False, dtype=torch.float64)
    layer = OrderedLowRankLinear.from_linear(dense)
    approximation = layer(torch.eye(8, dtype=torch.float64), rank=rank).T
    residual = (dense.weight - approximation).norm()
    torch.testing.assert_close(residual, torch.linalg.svdvals(dense.weight)[rank:].norm())


def test_rank_b_of_a_convolution_is_the_best_approximation_of_its_kernel_matrix():
    dense = nn.Conv2d(2, 7, 3, bias=False, dtype=torch.float64)
    layer = OrderedLowRankConv2d.from_conv2d(dense)
    layer.sampled_rank = 3
    residual = (dense.weight - layer.weight).norm()
    values = torch.linalg.svdvals(dense.weight.flatten(1))
    torch.testing.assert_close(residual, values[3:].norm())


@pytest.mark.parametrize("bias", [True, False])
def test_rank_zero_of_a_linear_layer_is_the_bias(bias):
    layer = OrderedLowRankLinear(4, 3, bias=bias)
    expected = layer.bias.expand(2, 5, 3) if bias else torch.zeros(2, 5, 3)
    assert torch.equal(layer(torch.randn(2, 5, 4), rank=0), expected)


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_rank_zero_of_a_convolution_is_the_bias_at_every_place(options):
    layer = OrderedLowRankConv2d.from_conv2d(nn.Conv2d(3, 6, (3, 2), **options))
    for x in (torch.randn(2, 3, 9, 8), torch.randn(3, 9, 8)):
        result = layer(x, rank=0)
        assert result.shape == layer(x).shape
        value = torch.zeros(6) if layer.bias is None else layer.bias
        assert torch.equal(result, value[:, None, None].expand_as(result))


def test_rank_below_the_stored_one_truncates_at_construction():
    dense = nn.Linear(8, 6)
    layer = OrderedLowRankLinear.from_linear(dense, rank=2)
    x = torch.randn(3, 8)
    assert layer.factor_in.shape == (2, 8)
    torch.testing.assert_close(layer(x), OrderedLowRankLinear.from_linear(dense)(x, rank=2))


def test_columns_beyond_the_rank_get_zero_gradient_and_the_first_gets_some():
    for layer, x in (
        (OrderedLowRankLinear(7, 5), torch.randn(3, 7)),
        (OrderedLowRankConv2d(2, 5, 3), torch.randn(2, 2, 6, 6)),
    ):
        for rank in range(1, 6):
            layer.zero_grad()
            layer(x, rank=rank).square().sum().backward()
            assert (layer.factor_in.grad[rank:] == 0).all()
            assert (layer.factor_out.grad[:, rank:] == 0).all()
            assert (layer.factor_in.grad[0] != 0).any()
            assert (layer.factor_out.grad[:, 0] != 0).any()


def tiny():
    layer = OrderedLowRankLinear(2, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.factor_in.copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        layer.factor_out.zero_()
    return layer


def test_suffix_norms_and_plain_norms():
    layer = tiny()
    suffix, plain = layer.group_lasso(), layer.group_lasso(hierarchical=False)
    expected = torch.tensor([5.385165, 2.0], dtype=torch.float64)
    torch.testing.assert_close(suffix.detach(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(plain.detach(), torch.tensor([5.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("hierarchical", [True, False])
def test_lasso_of_zero_columns_has_zero_gradient(hierarchical):
    layer = tiny()
    layer.group_lasso(hierarchical=hierarchical).sum().backward()
    assert layer.factor_in.grad.isfinite().all()
    assert (layer.factor_out.grad == 0).all()


def test_gradient_of_the_suffix_norms_is_a_scan_of_their_reciprocals():
    # d/dV_j sum_b |V_b:| = V_j sum_{b <= j} 1 / |V_b:|
    layer = OrderedLowRankConv2d(2, 5, 3, dtype=torch.float64)
    layer.group_lasso().sum().backward()
    rows = layer.factor_in.detach().flatten(1)
    suffix = torch.stack([rows[b:].norm() for b in range(5)])
    expected = rows * (1 / suffix).cumsum(0)[:, None]
    torch.testing.assert_close(layer.factor_in.grad.flatten(1), expected)


def test_lasso_passes_first_and_second_derivative_checks():
    layer = OrderedLowRankLinear(3, 4, bias=False, dtype=torch.float64)

    def lasso(factor_in, factor_out):
        factors = {"layer.factor_in": factor_in, "layer.factor_out": factor_out}
        return torch.func.functional_call(_Lasso(layer), factors)

    leaves = tuple(p.detach().clone().requires_grad_() for p in (layer.factor_in, layer.factor_out))
    assert torch.autograd.gradcheck(lasso, leaves)
    assert torch.autograd.gradgradcheck(lasso, leaves)


class _Lasso(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self):
        return self.layer.group_lasso()


def test_importance_is_the_product_of_suffix_norms_and_does_not_increase():
    layer = OrderedLowRankLinear(9, 8)
    nn.init.normal_(layer.factor_in)
    importance = layer.importance()
    assert (importance.diff() <= 0).all()
    expected = [layer.factor_in[b:].norm() * layer.factor_out[:, b:].norm() for b in range(8)]
    torch.testing.assert_close(importance, torch.stack(expected))
    alone = layer.importance(hierarchical=False)
    torch.testing.assert_close(alone, layer.factor_in.norm(dim=1) * layer.factor_out.norm(dim=0))


def test_norms_of_half_factors_are_taken_in_float32():
    layer = OrderedLowRankLinear(64, 64).half()
    nn.init.constant_(layer.factor_in, 30.0)  # 64 * 64 * 900 is beyond float16
    assert layer.importance().dtype == torch.float32
    assert layer.group_lasso().isfinite().all()


@pytest.mark.parametrize("prune", [False, True])
def test_shrinking_keeps_the_prefix_whose_importance_reaches_the_threshold(prune):
    dense = nn.Linear(8, 6)
    layer = OrderedLowRankLinear.from_linear(dense)
    x = torch.randn(3, 8)
    expected = layer(x, rank=4)
    threshold = layer.importance()[3].item()
    assert layer.shrink_(threshold, prune=prune) == 4
    assert layer.active_rank == 4
    assert layer.rank == (4 if prune else 6)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.to_linear()(x), expected)


def test_threshold_of_zero_keeps_everything_and_infinity_nothing():
    layer = OrderedLowRankConv2d(2, 5, 3)
    nn.init.zeros_(layer.factor_out)
    assert layer.shrink_(0.0) == 5
    assert layer.shrink_(1.0, prune=True) == 0
    assert torch.equal(layer(torch.randn(1, 2, 3, 3)).flatten(), layer.bias)


def test_optimizer_state_survives_shrinking_without_pruning():
    layer = OrderedLowRankLinear(8, 6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    before = {name: id(parameter) for name, parameter in layer.named_parameters()}
    layer.shrink_(layer.importance()[2].item())
    assert {name: id(parameter) for name, parameter in layer.named_parameters()} == before
    assert optimizer.state[layer.factor_in]["momentum_buffer"].shape == (6, 8)
    layer(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    assert layer.active_rank == 3


def test_factors_that_are_not_finite_are_not_shrunk():
    layer = OrderedLowRankLinear(3, 3)
    nn.init.constant_(layer.factor_in, float("nan"))
    with pytest.raises(ValueError, match="factors must"):
        layer.shrink_(0.1)
    assert layer.active_rank == 3


def test_active_rank_is_in_the_state_dict():
    layer, other = OrderedLowRankLinear(8, 6), OrderedLowRankLinear(8, 6)
    layer.shrink_(layer.importance()[2].item())
    other.load_state_dict(layer.state_dict())
    assert other.active_rank == 3
    x = torch.randn(2, 8)
    assert torch.equal(other(x), layer(x))


def test_factorisation_pays_up_to_the_rank_of_equal_size():
    # in out = 8 * 8 = 64; (in + out) r = 16 r.
    for rank, pays in ((4, True), (5, False)):
        assert OrderedLowRankLinear(8, 8, rank=rank).is_beneficial() == pays
    # 2 * 9 * 6 = 108 against (18 + 6) r = 24 r.
    for rank, pays in ((4, True), (5, False)):
        assert OrderedLowRankConv2d(2, 6, 3, rank=rank).is_beneficial() == pays


def test_weight_is_the_dense_weight_at_the_current_rank():
    layer = OrderedLowRankLinear(7, 5)
    x = torch.randn(3, 7)
    layer.shrink_(layer.importance()[2].item())
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), layer(x))


def test_frozen_layers_stay_frozen():
    dense = nn.Linear(4, 4)
    dense.weight.requires_grad_(False)
    layer = OrderedLowRankLinear.from_linear(dense.eval())
    assert not layer.factor_in.requires_grad
    assert not layer.factor_out.requires_grad
    assert layer.bias.requires_grad
    assert not layer.training
    again = layer.to_linear()
    assert not again.weight.requires_grad
    assert again.bias.requires_grad


def test_a_new_layer_is_initialised_as_a_dense_one():
    torch.manual_seed(0)
    layer = OrderedLowRankLinear(60, 40)
    bound = (1 / 60) ** 0.5  # torch's uniform bound; the product is that dense weight
    assert layer.weight.abs().max() <= bound + 1e-6
    assert abs(layer.weight.std() - bound / 3**0.5) < 0.05 * bound
    assert layer.bias.abs().max() <= bound


def test_channels_last_inputs_stay_so():
    layer = OrderedLowRankConv2d(4, 8, 3, padding=1)
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    assert layer(x, rank=3).is_contiguous(memory_format=torch.channels_last)
