"""Repeated data: the measure, the matched sparse model and its layer (sheet of paper 50)."""

import torch
from torch import nn

from regularizers.scaling import (
    SwitchFeedForward,
    match_sparse_experts,
    multi_epoch_degradation,
    switch_balance_loss,
)
from tests.harness import MethodContract


class TestSwitchFeedForward(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return SwitchFeedForward(4, 6, 3).to(dtype)

    def call(self, module, dtype):
        x = torch.linspace(-1, 1, 80, dtype=torch.float64).sin().to(dtype).reshape(4, 5, 4)
        return module(x)

    def bad_inputs(self):
        build = SwitchFeedForward
        match = match_sparse_experts
        return [
            (ValueError, "d_model must", lambda: build(0, 4, 2)),
            (ValueError, "d_ff must", lambda: build(4, 0, 2)),
            (ValueError, "num_experts must", lambda: build(4, 4, 0)),
            (TypeError, "num_experts must", lambda: build(4, 4, 2.0)),
            (ValueError, "capacity_factor must", lambda: build(4, 4, 2, capacity_factor=0.0)),
            (ValueError, "balance_weight must", lambda: build(4, 4, 2, balance_weight=-1.0)),
            (ValueError, "x must", lambda: build(4, 4, 2)(torch.ones(2, 3))),
            (TypeError, "x must", lambda: build(4, 4, 2)([1.0])),
            (ValueError, "dense_params must", lambda: match(100, 8, 16, 4)),
            (ValueError, "dense_params must", lambda: match(0, 8, 16, 4)),
            (ValueError, "moe_every must", lambda: match(10**6, 8, 16, 4, 5)),
            (TypeError, "d_model must", lambda: match(10**6, 8.0, 16, 4)),
            (
                ValueError,
                "probabilities must",
                lambda: switch_balance_loss(torch.ones(2), torch.ones(2)),
            ),
        ]


def test_equal_losses_show_no_degradation_and_harm_is_positive():
    assert multi_epoch_degradation(torch.tensor(2.0), torch.tensor(2.0)) == 0
    assert multi_epoch_degradation(2.5, 2.0) == 0.5


def test_uniform_routing_costs_one_and_a_single_expert_costs_all():
    probabilities = torch.full((8, 4), 0.25)
    assert switch_balance_loss(probabilities, torch.arange(8) % 4) == 1
    sure = torch.eye(4)[torch.zeros(8, dtype=torch.long)]
    assert switch_balance_loss(sure, torch.zeros(8, dtype=torch.long)) == 4


def test_balance_loss_sends_its_gradient_through_the_probabilities():
    logits = torch.randn(16, 3, dtype=torch.float64, requires_grad=True)
    expert = logits.argmax(1)
    call = lambda logits: switch_balance_loss(logits.softmax(-1), expert)
    assert torch.autograd.gradcheck(call, (logits,))


def test_one_expert_is_a_dense_layer():
    layer = SwitchFeedForward(4, 6, 1).double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    dense = (x @ layer.weight_in[0].T).relu() @ layer.weight_out[0].T
    torch.testing.assert_close(layer(x), dense)
    torch.testing.assert_close(layer.balance_loss.item(), 0.01)


def test_a_token_gets_its_likeliest_expert_times_its_probability():
    layer = SwitchFeedForward(4, 6, 3, capacity_factor=3.0).double()
    x = torch.randn(10, 4, dtype=torch.float64)
    gate, expert = layer.router(x).softmax(-1).max(-1)
    rows = [
        g * (layer.weight_out[e] @ (layer.weight_in[e] @ t).relu())
        for t, g, e in zip(x, gate, expert.tolist(), strict=True)
    ]
    torch.testing.assert_close(layer(x), torch.stack(rows))


def test_tokens_beyond_the_capacity_get_nothing_in_order_of_arrival():
    layer = SwitchFeedForward(2, 4, 2, capacity_factor=1.0)
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        layer.weight_in.abs_()  # a ReLU that stays closed would look like no place
    x = torch.rand(6, 2) + 0.1  # all choose expert 0, which has room for three
    found = layer(x).abs().sum(1) > 0
    assert found.tolist() == [True, True, True, False, False, False]


def test_parameters_are_those_of_the_count():
    layer = SwitchFeedForward(8, 16, 5)
    assert sum(p.numel() for p in layer.parameters()) == 5 * (2 * 8 * 16 + 8)


def test_experts_match_the_parameters_of_the_dense_model():
    shared = 8 * 4 * 512**2 + 4 * 2 * 512 * 2048
    for experts in (1, 2, 7, 64):
        dense = shared + 4 * experts * (2 * 512 * 2048 + 512)
        for off in (-1000, 0, 1000):  # far less than half an expert
            assert match_sparse_experts(dense + off, 512, 2048, 8) == experts
    assert match_sparse_experts(shared, 512, 2048, 8) == 1
    assert match_sparse_experts(10_000, 8, 16, 2, 1, shared_params=4720) == 10


def test_the_loss_of_the_last_call_carries_a_gradient():
    layer = SwitchFeedForward(4, 8, 3, balance_weight=0.5)
    layer(torch.randn(20, 4))
    layer.balance_loss.backward()
    assert layer.router.weight.grad.abs().sum() > 0


def test_an_empty_batch_gives_an_empty_result():
    assert SwitchFeedForward(4, 8, 3)(torch.empty(0, 4)).shape == (0, 4)


def test_half_of_a_model_may_be_wrapped():
    model = nn.Sequential(nn.Linear(4, 4), SwitchFeedForward(4, 8, 3))
    assert model(torch.randn(2, 7, 4)).shape == (2, 7, 4)
