"""Replacing modules of a model."""

import pytest
import torch
from torch import nn

from regularizers._shared.modules import replace_modules, run_after


def _to_identity(name, module):
    return nn.Identity() if isinstance(module, nn.ReLU) else None


def test_modules_are_replaced_at_every_depth():
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert replace_modules(model, _to_identity) is model
    assert isinstance(model[0], nn.Identity)
    assert isinstance(model[1][1], nn.Identity)
    assert isinstance(model[1][0], nn.Linear)


def test_the_model_itself_may_be_replaced():
    assert isinstance(replace_modules(nn.ReLU(), _to_identity), nn.Identity)


def test_a_shared_module_stays_shared():
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Linear(2, 2), shared)
    replace_modules(model, _to_identity)
    assert model[0] is model[2]


def test_a_wrapper_may_hold_what_it_replaces():
    seen = []

    def wrap(name, module):
        seen.append(name)
        return nn.Sequential(module) if isinstance(module, nn.ReLU) else None

    model = replace_modules(nn.Sequential(nn.ReLU()), wrap)
    assert seen == ["", "0"]
    assert isinstance(model[0][0], nn.ReLU)


class _Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize(
    "module", [nn.Identity(), nn.Sequential(nn.Identity(), nn.ReLU())], ids=["plain", "sequence"]
)
def test_a_follower_runs_once_on_what_the_module_returns(module):
    run_after(module, _Doubling(), "doubling")
    assert torch.equal(module(torch.ones(3)), torch.full((3,), 2.0))


def test_a_follower_changes_mode_with_its_module():
    module = nn.Linear(2, 2)
    run_after(module, nn.Dropout(), "drop")
    assert not module.eval().drop.training
    assert set(module.state_dict()) == {"weight", "bias"}


def test_a_sequence_with_a_forward_of_its_own_is_not_appended_to():
    class Skipping(nn.Sequential):
        def forward(self, x):
            return x + self[0](x)

    module = Skipping(nn.Identity())
    run_after(module, _Doubling(), "doubling")
    assert torch.equal(module(torch.ones(3)), torch.full((3,), 4.0))


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="weight"):
        run_after(nn.Linear(2, 2), _Doubling(), "weight")
