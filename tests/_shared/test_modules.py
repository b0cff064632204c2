"""Replacing modules of a model."""

from torch import nn

from regularizers._shared.modules import replace_modules


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
