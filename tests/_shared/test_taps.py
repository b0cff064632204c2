"""Taps: what named submodules return, and when they are listened to."""

import copy

import pytest
import torch
from torch import nn

from regularizers._shared.taps import ActivationTap, StandingTap


def _model():
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))


def test_an_activation_tap_listens_inside_its_block_alone():
    model, x = _model(), torch.randn(4, 2)
    with ActivationTap(model, ["1"]) as tap:
        model(x)
    expected = model[:2](x)
    model(2 * x)
    assert torch.equal(tap["1"], expected)
    assert not model[1]._forward_hooks


def test_a_standing_tap_returns_the_outputs_in_the_order_of_its_names():
    model, x = _model(), torch.randn(4, 2)
    tap = StandingTap(model, ["2", "0"])
    result, outputs = tap.run(model, x)
    assert torch.equal(result, model(x))
    assert torch.equal(outputs[0], model(x))
    assert torch.equal(outputs[1], model[0](x))


def test_a_standing_tap_forgets_also_after_an_error():
    model = _model()
    tap = StandingTap(model, ["0"])
    with pytest.raises(RuntimeError):
        tap.run(lambda x: model(model(x)), torch.randn(4, 2))
    assert tap._outputs == {}
    model(torch.randn(4, 2))
    assert tap._outputs == {}


def test_a_copy_of_a_model_and_its_standing_tap_are_on_their_own():
    model, x = _model(), torch.randn(4, 2)
    tap = StandingTap(model, ["0"])
    twin, twin_tap = copy.deepcopy((model, tap))
    with torch.no_grad():
        twin[0].weight.add_(1)
    assert torch.equal(twin_tap.run(twin, x)[1][0], twin[0](x))
    assert torch.equal(tap.run(model, x)[1][0], model[0](x))


@pytest.mark.parametrize("kind", [ActivationTap, StandingTap])
def test_an_unknown_name_is_refused(kind):
    with pytest.raises(ValueError, match="tap names no submodule of the model, got 'head'"):
        kind(_model(), ["0", "head"])


def test_a_submodule_that_did_not_run_is_named():
    model = _model()
    with pytest.raises(ValueError, match="tap '2' did not run"):
        StandingTap(model, ["2"]).run(model[:2], torch.randn(4, 2))
