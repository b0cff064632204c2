"""The hooks of the base optimizer: their order, what they see, when the fused pass serves."""

import pytest
import torch
from torch import nn

from regularizers.optim import DecoupledOptimizer

DEFAULTS = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


class Recorder(DecoupledOptimizer):
    """Writes down which hook was called, and with which dtype."""

    def __init__(self, params):
        self.calls = []
        super().__init__(params, dict(DEFAULTS))

    def transform_grad(self, p, grad, group):
        self.calls.append(("transform_grad", grad.dtype))
        return grad

    def update_moments(self, p, grad, state, group):
        self.calls.append(("update_moments", p.dtype))
        super().update_moments(p, grad, state, group)

    def direction(self, p, grad, state, group):
        self.calls.append(("direction", p.dtype))
        return super().direction(p, grad, state, group)

    def apply(self, p, direction, lr):
        self.calls.append(("apply", direction.dtype))
        super().apply(p, direction, lr)

    def decay(self, p, reference, lr, state, group):
        self.calls.append(("decay", reference.dtype))
        super().decay(p, reference, lr, state, group)


class Doubled(DecoupledOptimizer):
    """Overrides the gradient alone, and stays fused."""

    def transform_grad(self, p, grad, group):
        return 2 * grad


def _trained(make, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (5,))
    draw = lambda: [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    params = [nn.Parameter(x.to(dtype)) for x in draw()]
    optimizer = make(params)
    for _ in range(5):
        for p, grad in zip(params, draw(), strict=True):
            p.grad = grad.to(dtype)
        optimizer.step()
    return params, optimizer


def test_base_is_adamw():
    have, _ = _trained(lambda p: DecoupledOptimizer(p, dict(DEFAULTS)))
    want, _ = _trained(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1))
    torch.testing.assert_close(have, want, rtol=0, atol=1e-14)


def test_hooks_are_called_in_order_in_full_precision():
    params, optimizer = _trained(Recorder, torch.bfloat16)
    names = ["transform_grad", "update_moments", "direction", "apply", "decay"]
    assert [name for name, _ in optimizer.calls[:5]] == names
    assert len(optimizer.calls) == 5 * 5 * len(params)
    assert {dtype for _, dtype in optimizer.calls} == {torch.float32}


def test_overridden_hooks_do_what_the_fused_pass_does():
    have, _ = _trained(Recorder)
    want, _ = _trained(lambda p: DecoupledOptimizer(p, dict(DEFAULTS)))
    torch.testing.assert_close(have, want, rtol=0, atol=1e-14)


def test_a_transformed_gradient_stays_in_the_fused_pass():
    params, optimizer = _trained(lambda p: Doubled(p, {**DEFAULTS, "eps": 0.0}))
    want, _ = _trained(lambda p: DecoupledOptimizer(p, {**DEFAULTS, "eps": 0.0}))
    assert optimizer._is_fused(optimizer.param_groups[0])
    torch.testing.assert_close(params, want)  # Adam forgets the scale
    torch.testing.assert_close(
        optimizer.state[params[0]]["exp_avg"].abs().sum() > 0, torch.tensor(True)
    )


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({}, True),
        ({"fused": True}, True),
        ({"foreach": True}, True),
        ({"fused": False}, False),
        ({"foreach": False}, False),
        ({"foreach": False, "fused": True}, True),
    ],
    ids=str,
)
def test_arguments_of_adamw_choose_the_path(options, fused):
    optimizer = DecoupledOptimizer([nn.Parameter(torch.ones(1))], {**DEFAULTS, **options})
    assert optimizer._is_fused(optimizer.param_groups[0]) == fused


def test_a_bad_group_is_not_added():
    optimizer = DecoupledOptimizer([nn.Parameter(torch.ones(1))], dict(DEFAULTS))
    with pytest.raises(ValueError, match="eps"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "eps": -1.0})
    assert len(optimizer.param_groups) == 1


class Signed(DecoupledOptimizer):
    """Moments of signs: a transform that is not linear, and not odd for its last entry."""

    def transform_grad(self, p, grad, group):
        return torch.where(grad > 2, 2, grad.sign())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("fused", [None, False])
def test_a_transform_sees_the_gradient_unscaled_and_turned_around(fused, maximize, dtype):
    param = nn.Parameter(torch.ones(3, dtype=dtype))
    options = {**DEFAULTS, "weight_decay": 0.0, "fused": fused, "maximize": maximize}
    optimizer = Signed([param], options)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    param.grad = torch.tensor([1.0, -1.5, 3.0], dtype=dtype) * 1024
    optimizer.step()
    seen = torch.tensor([-1.0, 1.0, -1.0] if maximize else [1.0, -1.0, 2.0])
    rest = 1 - DEFAULTS["betas"][0]
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], rest * seen)


def test_a_checkpoint_with_steps_in_float64_loads():
    # torch.optim counts steps in float64 where that is the default dtype.
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(2))
    options = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    adamw = torch.optim.AdamW([theirs], **options)
    theirs.grad = torch.randn(5, dtype=torch.float64)
    adamw.step()
    adamw.state[theirs]["step"] = adamw.state[theirs]["step"].double()
    optimizer = DecoupledOptimizer([ours], dict(options))
    optimizer.load_state_dict(adamw.state_dict())
    ours.data.copy_(theirs.data)
    ours.grad = torch.randn(5, dtype=torch.float64)
    theirs.grad = ours.grad.clone()
    for each in (optimizer, adamw):
        each.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
