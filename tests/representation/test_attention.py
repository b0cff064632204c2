"""Coordinate attention, squeeze-and-excitation and their blend (sheet of paper 57)."""

import pytest
import torch
from torch import nn

from regularizers.representation import (
    BalancedAttention2d,
    CoordinateAttention2d,
    SqueezeExcitation2d,
)
from tests.harness import MethodContract


class TestBalancedAttention2d(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        module = BalancedAttention2d(16).to(dtype)
        for parameter in module.parameters():
            parameter.data.abs_()  # keeps every ReLU open, so that every parameter has a gradient
        return module

    def call(self, module, dtype):
        x = torch.linspace(0, 3, 2 * 16 * 6 * 5, dtype=torch.float64).sin().add(1)
        return module(x.to(dtype).reshape(2, 16, 6, 5))

    def bad_inputs(self):
        x = torch.ones(1, 8, 4, 4)
        return [
            (ValueError, "reduction must", lambda: CoordinateAttention2d(4)),
            (ValueError, "reduction must", lambda: SqueezeExcitation2d(8)),
            (ValueError, "reduction must", lambda: BalancedAttention2d(8)),
            (ValueError, "channels must", lambda: CoordinateAttention2d(0)),
            (TypeError, "reduction must", lambda: SqueezeExcitation2d(8, 2.0)),
            (ValueError, "init must", lambda: BalancedAttention2d(16, init=float("nan"))),
            (ValueError, "x must", lambda: CoordinateAttention2d(16)(x)),
            (ValueError, "x must", lambda: SqueezeExcitation2d(16)(x)),
            (TypeError, "x must", lambda: SqueezeExcitation2d(16)(x.long())),
        ]


def test_blend_starts_at_the_paper_weight():
    assert BalancedAttention2d(16).alpha.item() == pytest.approx(0.6225, abs=1e-4)
    assert BalancedAttention2d(16, init=0.2819).alpha.item() == pytest.approx(0.57, abs=1e-4)


def test_extreme_weights_leave_one_attention():
    x = torch.randn(2, 16, 5, 7)
    layer = BalancedAttention2d(16).eval()
    for raw, part in ((100.0, layer.coordinate), (-100.0, layer.excitation)):
        nn.init.constant_(layer.raw, raw)
        torch.testing.assert_close(layer(x), part(x))


def test_gradient_of_the_blend_is_that_of_the_formula():
    layer = BalancedAttention2d(16).double().eval()
    x, g = torch.randn(2, 2, 16, 5, 7, dtype=torch.float64)
    layer(x).backward(g)
    alpha = layer.alpha
    expected = (g * (layer.coordinate(x) - layer.excitation(x))).sum() * alpha * (1 - alpha)
    torch.testing.assert_close(layer.raw.grad, expected)


@pytest.mark.parametrize("build", [CoordinateAttention2d, SqueezeExcitation2d, BalancedAttention2d])
def test_every_element_is_scaled_by_a_number_between_zero_and_one(build):
    x = torch.randn(2, 32, 9, 6)
    ratio = build(32)(x) / x
    assert ratio.min() > 0
    assert ratio.max() < 1


def test_no_layer_has_a_bias():
    names = [n for n, _ in BalancedAttention2d(16).named_parameters() if n.endswith("bias")]
    assert names == ["coordinate.norm.bias"]  # the batch norm's shift is no bias of a layer


def test_coordinate_gates_are_a_product_of_rows_and_columns():
    x = torch.rand(1, 16, 6, 5, dtype=torch.float64) + 0.5
    gates = CoordinateAttention2d(16).double().eval()(x) / x
    rows, columns = gates[..., :1], gates[:, :, :1]
    torch.testing.assert_close(gates, rows * columns / gates[:, :, :1, :1])


def test_rows_see_means_over_the_width_and_columns_over_the_height():
    layer = CoordinateAttention2d(16).eval()
    x = torch.rand(1, 16, 6, 5)
    by_hand = torch.cat([x.mean(3), x.mean(2)], 2)[..., None]
    hidden = layer.norm(layer.squeeze(by_hand)).relu()
    rows = layer.rows(hidden[:, :, :6]).sigmoid()
    columns = layer.columns(hidden[:, :, 6:]).sigmoid()
    torch.testing.assert_close(layer(x), x * rows * columns.reshape(1, 16, 1, 5))


def test_excitation_is_one_gate_a_channel():
    x = torch.rand(2, 16, 6, 5) + 0.5
    layer = SqueezeExcitation2d(16)
    hidden = (x.mean((2, 3)) @ layer.squeeze.weight.T).relu()
    gates = (hidden @ layer.excite.weight.T).sigmoid()
    torch.testing.assert_close(layer(x), x * gates[:, :, None, None])
