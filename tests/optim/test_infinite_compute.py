"""Tuning, ensembling and distilling with little data (sheet of paper 18)."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.optim import (
    LogitEnsemble,
    distill_loss,
    ensemble_nll,
    locally_optimal,
    member_setting,
)

GRID = {"lr": [0, 1, 2, 3, 4], "epochs": [0, 1, 2, 3, 4], "weight_decay": [0, 1, 2, 3, 4]}
CORNER = {"lr": 0, "epochs": 4, "weight_decay": 0}


def _bowl(setting):
    lr, epochs, decay = (setting[name] - 2 for name in GRID)
    return lr * lr + epochs * epochs + decay * decay + 0.5 * lr * decay


@pytest.mark.parametrize("order", [None, ("lr", "epochs", "weight_decay")])
def test_bowl_is_descended_to_its_certified_minimum(order):
    found = locally_optimal(_bowl, GRID, CORNER, order=order)
    assert found == ({"lr": 2, "epochs": 2, "weight_decay": 2}, 0, True)


def test_certified_settings_had_every_neighbour_evaluated_and_none_twice():
    seen = []

    def evaluate(setting):
        seen.append(tuple(setting.values()))
        return _bowl(setting)

    best = tuple(locally_optimal(evaluate, GRID, CORNER).setting.values())
    assert len(seen) == len(set(seen)) < 125
    for c in range(3):
        for step in (-1, 1):
            assert (*best[:c], best[c] + step, *best[c + 1 :]) in seen


def test_best_neighbour_of_all_is_accepted_without_an_order():
    seen = []

    def evaluate(setting):
        seen.append(dict(setting))
        return -setting["a"] - 3 * setting["b"]

    locally_optimal(evaluate, {"a": [0, 1], "b": [0, 1]}, {"a": 0, "b": 0})
    assert seen == [{"a": 0, "b": 0}, {"a": 1, "b": 0}, {"a": 0, "b": 1}, {"a": 1, "b": 1}]


def test_optimum_on_an_edge_is_not_certified():
    found = locally_optimal(lambda s: s["lr"], {"lr": [1, 2, 4]}, {"lr": 4})
    assert found == ({"lr": 1}, 1, False)


def test_coordinate_of_one_value_is_fixed_and_no_edge():
    grid = {"lr": [1, 2, 4], "epochs": [8]}
    found = locally_optimal(lambda s: abs(s["lr"] - 2), grid, {"lr": 1, "epochs": 8})
    assert found == ({"lr": 2, "epochs": 8}, 0, True)


def test_diverged_runs_are_the_worst():
    found = locally_optimal(
        lambda s: math.nan if s["lr"] > 2 else -s["lr"], {"lr": [1, 2, 4]}, {"lr": 4}
    )
    assert found == ({"lr": 2}, -2, True)


def test_flat_losses_end_where_they_began():
    found = locally_optimal(lambda s: 1.0, GRID, {"lr": 1, "epochs": 1, "weight_decay": 1})
    assert found.setting == {"lr": 1, "epochs": 1, "weight_decay": 1}


@pytest.mark.parametrize(
    ("exception", "match", "grid", "start", "order"),
    [
        (ValueError, "grid must have", {}, {}, None),
        (ValueError, "grid must have", {"a": []}, {"a": 1}, None),
        (ValueError, "grid must list", {"a": [1, 1]}, {"a": 1}, None),
        (ValueError, "start must have", {"a": [1]}, {"b": 1}, None),
        (ValueError, "start must lie", {"a": [1]}, {"a": 2}, None),
        (ValueError, "order must", {"a": [1]}, {"a": 1}, ("b",)),
        (ValueError, "order must", {"a": [1]}, {"a": 1}, ("a", "a")),
        (TypeError, "grid must", [1], {"a": 1}, None),
        (TypeError, "start must", {"a": [1]}, [1], None),
    ],
)
def test_bad_grids_are_named_before_anything_is_evaluated(exception, match, grid, start, order):
    with pytest.raises(exception, match=match):
        locally_optimal(lambda s: pytest.fail("evaluated"), grid, start, order=order)


def test_members_train_twice_as_long_at_half_the_decay():
    single = {"lr": 1.0, "wd": 0.8, "epochs": 3}
    assert member_setting(single, weight_decay="wd") == {"lr": 1.0, "wd": 0.4, "epochs": 6}
    assert single["wd"] == 0.8
    with pytest.raises(ValueError, match="single must have 'weight_decay'"):
        member_setting(single)


@pytest.mark.parametrize("average", ["logits", "probs"])
def test_ensemble_is_never_worse_than_its_mean_member(average):
    torch.manual_seed(0)
    for scale in (0.1, 1.0, 10.0):
        logits, target = scale * torch.randn(5, 40, 7), torch.randint(7, (40,))
        members = torch.stack(
            [F.cross_entropy(member, target, reduction="none") for member in logits]
        ).mean(0)
        nll = ensemble_nll(logits, target, average=average, reduction="none")
        assert torch.all(nll < members)


def test_ensemble_equals_its_mean_member_where_members_agree_up_to_a_constant():
    logits, target = torch.randn(1, 8, 5, dtype=torch.float64), torch.arange(8) % 5
    shifted = logits + torch.randn(4, 8, 1, dtype=torch.float64)
    expected = F.cross_entropy(logits[0], target)
    torch.testing.assert_close(ensemble_nll(shifted, target), expected)


def test_averages_are_those_of_their_names():
    logits, target = torch.randn(3, 6, 4, dtype=torch.float64), torch.arange(6) % 4
    torch.testing.assert_close(
        ensemble_nll(logits, target), F.cross_entropy(logits.mean(0), target)
    )
    probs = logits.softmax(-1).mean(0)
    torch.testing.assert_close(
        ensemble_nll(logits, target, average="probs"), F.nll_loss(probs.log(), target)
    )


def test_reductions_sequences_and_ignored_targets_are_those_of_cross_entropy():
    logits, target = torch.randn(3, 2, 5, 4), torch.randint(4, (2, 5))
    target[0, 0] = -100
    each = ensemble_nll(logits, target, reduction="none")
    assert each.shape == (2, 5)
    assert each[0, 0] == 0
    torch.testing.assert_close(ensemble_nll(logits, target, reduction="sum"), each.sum())
    torch.testing.assert_close(ensemble_nll(logits, target), each.sum() / 9)


def test_distillation_mixes_cross_entropy_and_divergence():
    student = torch.randn(6, 4, dtype=torch.float64)
    teacher, target = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 4
    T, alpha = 2.0, 0.3
    q, p = (teacher / T).softmax(-1), (student / T).softmax(-1)
    divergence = (q * (q.log() - p.log())).sum(-1).mean()
    expected = (1 - alpha) * F.cross_entropy(student, target) + alpha * T * T * divergence
    torch.testing.assert_close(
        distill_loss(student, teacher, target, alpha=alpha, temperature=T), expected
    )


def test_distillation_ignores_positions_and_reduces_as_cross_entropy():
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    target = torch.tensor([[0, 1, -100], [2, -100, 3]])
    each = distill_loss(student, teacher, target, alpha=0.5, reduction="none")
    assert each.shape == (2, 3)
    assert (each[target == -100] == 0).all()
    torch.testing.assert_close(distill_loss(student, teacher, target, alpha=0.5), each.sum() / 4)
    torch.testing.assert_close(
        distill_loss(student, teacher, target, alpha=0.0),
        F.cross_entropy(student.reshape(-1, 4), target.reshape(-1)),
    )


def test_distillation_sends_no_gradient_to_the_teacher():
    student, teacher = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    distill_loss(student, teacher, torch.tensor([0, 1, 2]), alpha=0.5).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize(
    "function",
    [
        lambda z, y: ensemble_nll(z, y),
        lambda z, y: distill_loss(z[0], z[1], y, alpha=0.4, temperature=2.0),
    ],
)
def test_losses_compile_and_compute_half_precision_in_float32(function, fresh_dynamo):
    logits, target = torch.randn(2, 5, 3), torch.arange(5) % 3
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target), function(logits, target))
    half = logits.bfloat16()
    assert torch.equal(function(half, target), function(half.float(), target))


@pytest.mark.parametrize(
    ("exception", "match", "call"),
    [
        (ValueError, "member_logits must", lambda z, y: ensemble_nll(z[0, 0], y)),
        (ValueError, "target must", lambda z, y: ensemble_nll(z, y[:1])),
        (ValueError, "average must", lambda z, y: ensemble_nll(z, y, average="mean")),
        (ValueError, "reduction must", lambda z, y: ensemble_nll(z, y, reduction="max")),
        (TypeError, "member_logits must", lambda z, y: ensemble_nll(z.long(), y)),
        (ValueError, "alpha must", lambda z, y: distill_loss(z[0], z[0], y, alpha=1.5)),
        (
            ValueError,
            "temperature must",
            lambda z, y: distill_loss(z[0], z[0], y, alpha=0.5, temperature=0.0),
        ),
        (ValueError, "one shape", lambda z, y: distill_loss(z[0], z[0, :1], y, alpha=0.5)),
        (ValueError, "target must", lambda z, y: distill_loss(z[0], z[0], y[:1], alpha=0.5)),
    ],
)
def test_bad_input_of_losses_names_the_argument(exception, match, call):
    with pytest.raises(exception, match=match):
        call(torch.ones(2, 3, 4), torch.zeros(3, dtype=torch.long))


def _member(seed, width=16):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 3)
    )


def _members(count=3):
    return [_member(seed) for seed in range(count)]


def test_mean_is_that_of_the_members():
    members, x = [member.eval() for member in _members()], torch.randn(5, 6)
    ensemble = LogitEnsemble(members)
    each = torch.stack([member(x) for member in members])
    assert torch.equal(ensemble.member_logits(x), each)
    assert torch.equal(ensemble(x), each.mean(0))


def test_stacked_members_give_what_each_gives_alone():
    members, x = _members(), torch.randn(5, 6)
    with torch.no_grad():
        members[1][1].running_mean.fill_(3.0)
    ensemble = LogitEnsemble(members, stack=True).eval()
    each = torch.stack([member.eval()(x) for member in members])
    torch.testing.assert_close(ensemble.member_logits(x), each)
    torch.testing.assert_close(ensemble(x), each.mean(0))


def test_stacked_members_train_as_each_would_alone():
    members = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(3)]
    x, y = torch.randn(5, 6), torch.arange(5) % 3
    ensemble = LogitEnsemble(members, stack=True)
    sum(F.cross_entropy(z, y) for z in ensemble.member_logits(x)).backward()
    sum(F.cross_entropy(member(x), y) for member in members).backward()
    for name, stacked in ensemble.stacked.named_parameters():
        expected = torch.stack([member.get_parameter(name).grad for member in members])
        torch.testing.assert_close(stacked.grad, expected)


def test_stacked_members_draw_their_own_dropout():
    member = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5))
    ensemble = LogitEnsemble([member, copy.deepcopy(member)], stack=True)
    one, two = ensemble.member_logits(torch.randn(4, 6))
    assert not torch.equal(one == 0, two == 0)


def test_stacked_copies_are_apart_from_the_members():
    members, x = [nn.Linear(6, 3) for _ in range(2)], torch.randn(5, 6)
    ensemble = LogitEnsemble(members, stack=True)
    before = ensemble(x)
    with torch.no_grad():
        members[0].weight.zero_()
    assert torch.equal(ensemble(x), before)


def test_shared_parameters_of_stacked_members_stay_shared():
    members = []
    for _ in range(2):
        member = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        member[1].weight = member[0].weight
        members.append(member)
    ensemble, x = LogitEnsemble(members, stack=True), torch.randn(3, 4)
    assert ensemble.stacked[0].weight is ensemble.stacked[1].weight
    torch.testing.assert_close(ensemble(x), sum(member(x) for member in members) / 2)


class _Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.scale = scale

    def forward(self, x):
        return self.scale * self.layer(x)


def _hooked():
    module = _Scaled(1.0)
    module.layer.register_forward_hook(lambda module, args, out: out * 0)
    return module


@pytest.mark.parametrize(
    "members",
    [
        lambda: [_member(0, 16), _member(1, 8)],
        lambda: [_Scaled(1.0), _Scaled(2.0)],
        lambda: [nn.Linear(6, 3), _Scaled(2.0)],
        lambda: [nn.Linear(6, 3), nn.Linear(6, 3, bias=False)],
        lambda: [_Scaled(1.0), _hooked()],
    ],
)
def test_members_that_differ_are_not_stacked_but_run_one_after_another(members):
    listed, x = members(), torch.randn(5, 6)
    with pytest.raises(ValueError, match="members must differ"):
        LogitEnsemble(listed, stack=True)
    ensemble = LogitEnsemble(listed).eval()
    expected = torch.stack([member(x) for member in listed])
    assert torch.equal(ensemble.member_logits(x), expected)


def test_training_sends_gradients_to_every_member():
    ensemble = LogitEnsemble([_member(seed) for seed in range(2)])
    ensemble(torch.randn(5, 6)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in ensemble.parameters())


@pytest.mark.parametrize("stack", [False, True])
def test_copies_pickles_and_state_dicts_give_equal_results(stack):
    ensemble, x = LogitEnsemble(_members(2), stack=stack).eval(), torch.randn(5, 6)
    fresh = LogitEnsemble([_member(seed) for seed in (7, 8)], stack=stack).eval()
    fresh.load_state_dict(ensemble.state_dict())
    for twin in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble)), fresh):
        assert torch.equal(twin(x), ensemble(x))


@pytest.mark.parametrize("stack", [False, True])
def test_ensemble_compiles_to_one_graph(stack, fresh_dynamo):
    ensemble, x = LogitEnsemble(_members(2), stack=stack).eval(), torch.randn(5, 6)
    compiled = torch.compile(ensemble, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ensemble(x))


def test_bad_members_are_named():
    with pytest.raises(ValueError, match="members must hold"):
        LogitEnsemble([])
    with pytest.raises(TypeError, match="members must"):
        LogitEnsemble([lambda x: x])
    with pytest.raises(ValueError, match="members must give"):
        LogitEnsemble([nn.Linear(6, 3), nn.Linear(6, 4)])(torch.randn(2, 6))


def _train(weight_decay, data_seed, member):
    torch.manual_seed(data_seed)
    x, truth = torch.randn(1150, 20), torch.randn(20, 3)
    clean = (x @ truth).argmax(1)
    y = torch.where(torch.rand(1150) < 0.2, torch.randint(3, (1150,)), clean)
    torch.manual_seed(100 * data_seed + member)
    model = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=weight_decay)
    for _ in range(400):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:150]), y[:150]).backward()
        optimizer.step()
    with torch.no_grad():
        return model(x[150:]), y[150:]


@pytest.mark.slow
def test_heavy_decay_wins_with_little_data_and_ensembles_beat_their_mean_member():
    single = {}
    for decay in (0.1, 1.0, 3.0, 10.0):
        runs = [[_train(decay, seed, member) for member in range(4)] for seed in range(2)]
        losses = []
        for members in runs:
            logits, target = torch.stack([z for z, _ in members]), members[0][1]
            mean_member = sum(F.cross_entropy(z, target).item() for z in logits) / 4
            losses.append(mean_member)
            assert ensemble_nll(logits, target).item() < mean_member
        single[decay] = sum(losses) / 2
    assert single[0.1] > single[1.0] > single[3.0] > single[10.0]
    assert single[0.1] > single[10.0] + 0.3
