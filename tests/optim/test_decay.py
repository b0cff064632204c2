"""Decays as functions, and the schedule of their strength."""

import math

import pytest
import torch
from torch import nn

from regularizers.optim import (
    AdamHD,
    WeightDecayScheduler,
    delta_decay_,
    huber_decay_,
    l1_decay_,
    l2_decay_,
)

X = torch.tensor([0.5, 0.05, 0.11, -0.5, 0.0], dtype=torch.float64)
DECAYS = {
    "l2": lambda p, tau: l2_decay_(p, tau, mode="prox"),
    "l1": lambda p, tau: l1_decay_(p, tau),
    "huber": lambda p, tau: huber_decay_(p, tau, 0.3),
}


@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
def test_prox_is_odd_keeps_signs_and_does_not_expand(decay):
    x = torch.randn(1000, dtype=torch.float64)
    for tau in (0.1, 3.0):
        new = decay(x.clone(), tau)
        torch.testing.assert_close(decay(-x, tau), -new)
        assert (new * x >= 0).all()
        pairs = (new[:, None] - new).abs() <= (x[:, None] - x).abs() + 1e-15
        assert pairs.all()


@pytest.mark.parametrize("mode", ["prox", "gradient"])
def test_huber_moves_nothing_by_more_than_tau_delta(mode):
    x = 10 * torch.randn(1000, dtype=torch.float64)
    new = huber_decay_(x.clone(), 0.2, 0.3, mode=mode)
    assert (new - x).abs().max() <= 0.2 * 0.3 + 1e-15


def test_gradient_form_overshoots_zero_where_tau_is_above_one():
    assert huber_decay_(torch.tensor([0.1]), 1.5, 1.0, mode="gradient") < 0


def test_both_forms_agree_beyond_the_kink_and_to_second_order_below():
    tau, delta = 0.01, 0.2
    prox = huber_decay_(X.clone(), tau, delta)
    gradient = huber_decay_(X.clone(), tau, delta, mode="gradient")
    large = X.abs() > (1 + tau) * delta
    torch.testing.assert_close(prox[large], gradient[large], rtol=0, atol=1e-16)
    assert (prox - gradient).abs().max() <= tau**2 * delta * (1 + tau)


def test_functions_write_in_place_and_return_their_argument():
    p = nn.Parameter(X.clone())
    assert l2_decay_(p, 0.1) is p
    torch.testing.assert_close(p.detach(), 0.9 * X)
    assert p.requires_grad


def test_half_types_compute_in_float32_and_round_once():
    p = torch.randn(100).bfloat16()
    expected = (p.float() - (0.3 * p.float() / 1.3).clamp(-0.09, 0.09)).bfloat16()
    assert torch.equal(huber_decay_(p, torch.tensor(0.3), torch.tensor(0.3)), expected)


def test_delta_decay_pulls_towards_the_reference_where_the_mask_holds():
    reference = torch.ones_like(X)
    torch.testing.assert_close(delta_decay_(X.clone(), reference, 0.1), X - 0.1 * (X - 1))
    mask = torch.tensor([True, False, True, False, True])
    found = delta_decay_(X.clone(), reference, 0.1, penalty="l1", mode="prox", mask=mask)
    torch.testing.assert_close(found, torch.where(mask, X - (X - 1).clamp(-0.1, 0.1), X))
    zero = torch.zeros_like(X)
    same = delta_decay_(X.clone(), zero, 0.1, penalty="huber", delta=0.1, mode="prox")
    torch.testing.assert_close(same, huber_decay_(X.clone(), 0.1, 0.1))


def test_reference_and_mask_in_the_state_steer_the_optimizer():
    for fused in (None, False):
        p = nn.Parameter(X.clone())
        optimizer = AdamHD([p], lr=1.0, weight_decay=0.1, delta=math.inf, fused=fused)
        mask = torch.tensor([True, False, True, False, True])
        optimizer.state[p].update(reference=torch.ones_like(X), mask=mask)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        expected = torch.where(mask, X - (X - 1) / 11, X)
        torch.testing.assert_close(p.detach(), expected)


@pytest.mark.parametrize(
    ("exception", "name", "call"),
    [
        (ValueError, "lr_times_wd", lambda: l2_decay_(X.clone(), -0.1)),
        (ValueError, "mode", lambda: l1_decay_(X.clone(), 0.1, mode="soft")),
        (ValueError, "delta", lambda: huber_decay_(X.clone(), 0.1, 0.0)),
        (TypeError, "p must", lambda: l2_decay_(torch.ones(2, dtype=torch.int64), 0.1)),
        (TypeError, "p must", lambda: l2_decay_(torch.ones(2, dtype=torch.complex64), 0.1)),
        (ValueError, "reference", lambda: delta_decay_(X.clone(), torch.ones(2), 0.1)),
        (ValueError, "delta must be given", lambda: delta_decay_(X, X, 0.1, penalty="huber")),
        (ValueError, "delta must be given", lambda: delta_decay_(X, X, 0.1, delta=1.0)),
        (TypeError, "mask", lambda: delta_decay_(X, X, 0.1, mask=X)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_names_the_argument(exception, name, call):
    with pytest.raises(exception, match=name):
        call()


def _optimizer(decay=0.05):
    groups = [
        {"params": [nn.Parameter(torch.ones(1))], "weight_decay": value} for value in (decay, 0.0)
    ]
    return torch.optim.AdamW(groups)


@pytest.mark.parametrize(
    ("kind", "middle"),
    [("cosine", 0.5), ("linear", 0.5), ("poly", 0.5**0.9)],
)
def test_schedule_begins_at_the_given_decay_and_ends_at_the_final_one(kind, middle):
    optimizer = _optimizer()
    scheduler = WeightDecayScheduler(optimizer, 10, final=1e-5, kind=kind)
    found = [optimizer.param_groups[0]["weight_decay"]]
    for _ in range(12):
        scheduler.step()
        found.append(optimizer.param_groups[0]["weight_decay"])
    assert found[0] == 0.05
    assert found[5] == pytest.approx(1e-5 + (0.05 - 1e-5) * middle)
    assert found[10] == found[11] == found[12] == pytest.approx(1e-5)
    assert found[:11] == sorted(found[:11], reverse=True)


def test_groups_without_decay_keep_none():
    optimizer = _optimizer()
    scheduler = WeightDecayScheduler(optimizer, 2, final=0.01)
    scheduler.step()
    assert optimizer.param_groups[1]["weight_decay"] == 0.0


def test_schedule_goes_on_from_its_state():
    optimizer = _optimizer()
    scheduler = WeightDecayScheduler(optimizer, 10)
    for _ in range(3):
        scheduler.step()
    other = _optimizer()
    resumed = WeightDecayScheduler(other, 5)
    resumed.load_state_dict(scheduler.state_dict())
    assert other.param_groups[0]["weight_decay"] == optimizer.param_groups[0]["weight_decay"]
    assert resumed.get_last_decay() == scheduler.get_last_decay()


def test_a_decay_in_a_tensor_is_written_in_place():
    decay = torch.tensor(0.1)
    p = nn.Parameter(torch.ones(1))
    optimizer = AdamHD([p], weight_decay=decay)
    WeightDecayScheduler(optimizer, 2, kind="linear").step()
    assert decay.item() == pytest.approx(0.05)
    p.grad = torch.zeros(1)
    optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] is decay


def test_bad_schedules_are_named():
    with pytest.raises(TypeError, match="optimizer"):
        WeightDecayScheduler(None, 10)
    with pytest.raises(ValueError, match="total_steps"):
        WeightDecayScheduler(_optimizer(), 0)
    with pytest.raises(ValueError, match="kind"):
        WeightDecayScheduler(_optimizer(), 10, kind="step")
    with pytest.raises(ValueError, match="final"):
        WeightDecayScheduler(_optimizer(), 10, final=-1.0)
    adagrad = torch.optim.Rprop([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="weight_decay"):
        WeightDecayScheduler(adagrad, 10)
