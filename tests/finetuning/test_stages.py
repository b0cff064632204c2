"""Staged training: who learns when, with any optimizer, and everything as it was afterwards."""

import pytest
import torch
from torch import nn

from regularizers.finetuning import StagedTraining


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def _flags(model):
    return [parameter.requires_grad for parameter in model.parameters()]


def _train_step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(5, 3)).square().sum().backward()
    optimizer.step()


def test_stages_begin_where_the_fractions_say():
    stages = StagedTraining(_model(), [(0.1, ["2.*"]), (0.2, ["0.*"]), (0.7, ["*"])])
    seen = []
    for step in range(101):
        stages.step(step / 100)
        seen.append(stages.stage)
    assert seen == [0] * 10 + [1] * 20 + [2] * 71


@pytest.mark.parametrize("total", [3, 7, 30, 1000])
def test_rounding_delays_no_stage(total):
    stages = StagedTraining(_model(), [(1 / 3, ["2.*"]), (1 / 3, ["0.*"]), (1 / 3, ["*"])])
    begins = [step for step in range(total) if stages.step(step / total)]
    assert begins == [0, -(-total // 3), -(-2 * total // 3)]


def test_patterns_choose_by_name():
    model = _model()
    stages = StagedTraining(model, [(0.5, ["*.bias"]), (0.5, ["0.weight", "2.*"])])
    stages.step(0)
    assert _flags(model) == [False, True, False, True]
    stages.step(0.5)
    assert _flags(model) == [True, False, True, True]


def test_step_tells_whether_the_stage_changed():
    stages = StagedTraining(_model(), [(0.5, ["2.*"]), (0.5, ["*"])])
    assert [stages.step(t) for t in (0.0, 0.1, 0.5, 1.0, 0.2)] == [True, False, True, False, True]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
        lambda p: torch.optim.RMSprop(p, lr=0.1, weight_decay=0.1, momentum=0.5),
    ],
    ids=["SGD", "AdamW", "AdamW foreach", "RMSprop"],
)
def test_one_optimizer_over_everything_leaves_frozen_parameters_alone(make):
    model = _model()
    optimizer = make([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    stages = StagedTraining(model, [(0.5, ["*"]), (0.5, ["2.*"])])
    stages.step(0)
    for _ in range(3):
        _train_step(model, optimizer)
    frozen = [parameter.detach().clone() for parameter in model[0].parameters()]
    moments = [
        {key: value.clone() for key, value in optimizer.state[p].items() if torch.is_tensor(value)}
        for p in model[0].parameters()
    ]
    learning = model[2].weight.detach().clone()
    stages.step(0.5)
    for _ in range(3):
        _train_step(model, optimizer)
    for parameter, before, state in zip(model[0].parameters(), frozen, moments, strict=True):
        assert torch.equal(parameter, before)
        for key, value in state.items():
            assert torch.equal(optimizer.state[parameter][key], value)
    assert not torch.equal(model[2].weight, learning)


def test_gradients_from_before_a_stage_move_nothing():
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stages = StagedTraining(model, [(0.5, ["*"]), (0.5, ["2.*"])])
    stages.step(0)
    model(torch.ones(5, 3)).sum().backward()
    before = model[0].weight.detach().clone()
    stages.step(0.5)
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert model[2].weight.grad is not None


def test_trainable_parameters_are_those_of_the_stage():
    model = _model()
    stages = StagedTraining(model, [(0.5, ["2.*"]), (0.5, ["*"])])
    stages.step(0)
    assert [id(p) for p in stages.trainable_parameters()] == [id(p) for p in model[2].parameters()]


def test_flags_are_restored():
    model = _model()
    model[0].bias.requires_grad_(False)
    before = _flags(model)
    with StagedTraining(model, [(1.0, ["*"])]) as stages:
        stages.step(0.3)
        assert all(_flags(model))
    assert _flags(model) == before
    assert stages.stage is None


def test_flags_are_restored_after_an_error():
    model = _model()

    def fail():
        with StagedTraining(model, [(1.0, ["2.*"])]) as stages:
            stages.step(0.0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(_flags(model))


def test_restoring_keeps_gradients_of_what_learns():
    model = _model()
    with StagedTraining(model, [(1.0, ["*"])]) as stages:
        stages.step(0.0)
        model(torch.ones(5, 3)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_tied_parameter_learns_under_any_of_its_names():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    stages = StagedTraining(model, [(1.0, ["1.weight"])])
    stages.step(0)
    assert _flags(model) == [True, False, False]


def test_integer_parameters_are_left_alone():
    model = _model()
    model.codes = nn.Parameter(torch.arange(3), requires_grad=False)
    StagedTraining(model, [(1.0, ["*"])]).step(0)
    assert not model.codes.requires_grad


def test_compiled_model_follows_the_stages(fresh_dynamo):
    model = _model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with StagedTraining(model, [(0.5, ["2.*"]), (0.5, ["*"])]) as stages:
        for progress, learns in ((0.0, False), (0.5, True)):
            stages.step(progress)
            compiled(torch.ones(5, 3)).sum().backward()
            assert (model[0].weight.grad is not None) == learns


def test_bad_input_names_the_argument():
    model = _model()
    for exception, name, call in [
        (TypeError, "model must", lambda: StagedTraining(lambda x: x, [(1.0, ["*"])])),
        (ValueError, "stages must", lambda: StagedTraining(model, [])),
        (ValueError, "stages must", lambda: StagedTraining(model, [(0.5, ["*"]), (0.4, ["*"])])),
        (ValueError, r"stages\[0\] must", lambda: StagedTraining(model, [(0.0, ["*"])])),
        (ValueError, r"stages\[0\] must", lambda: StagedTraining(model, [(1.0, [])])),
        (ValueError, "'head.*'", lambda: StagedTraining(model, [(1.0, ["head.*"])])),
        (TypeError, r"stages\[0\] must", lambda: StagedTraining(model, [(1.0, "*")])),
        (ValueError, "progress must", lambda: StagedTraining(model, [(1.0, ["*"])]).step(1.5)),
    ]:  # fmt: skip
        with pytest.raises(exception, match=name):
            call()
    assert all(_flags(model))
