"""Drop path and its schedule: the method contract and the facts of the sheet of paper 63."""

import copy
import pickle

import pytest
import torch
from torch import nn

from regularizers.dropout import (
    ScheduledDropPath,
    apply_scheduled_drop_path,
    drop_path,
    drop_path_compact,
    set_drop_path_progress,
)
from tests.harness import MethodContract


class _Residual(nn.Module):
    """A residual layer, so that the module under the contract has parameters."""

    def __init__(self, dtype):
        super().__init__()
        self.branch = nn.Linear(6, 6, dtype=dtype)
        self.gate = ScheduledDropPath(0.4, 1, 2)
        self.gate.set_progress(1.0)

    def forward(self, x):
        return self.gate(self.branch(x), residual=x)


class TestScheduledDropPath(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return _Residual(dtype)

    def call(self, module, dtype):
        return module(torch.linspace(-1, 1, 60, dtype=dtype).reshape(10, 6))

    def inert(self, module):
        x = torch.randn(5, 6)
        return module(x), x + module.branch(x)

    def bad_inputs(self):
        build = ScheduledDropPath
        x = torch.ones(3, 2)
        shrink = lambda t: t[:, :1]
        return [
            (ValueError, "p must", lambda: build(1.5, 0, 1)),
            (ValueError, "p must", lambda: build(float("nan"), 0, 1)),
            (ValueError, "layer_index must", lambda: build(0.1, 2, 2)),
            (ValueError, "layer_index must", lambda: build(0.1, -1, 2)),
            (ValueError, "num_layers must", lambda: build(0.1, 0, 0)),
            (TypeError, "layer_index must", lambda: build(0.1, 0.5, 2)),
            (ValueError, "progress must", lambda: build(0.1, 0, 1).set_progress(-0.1)),
            (ValueError, "progress must", lambda: build(0.1, 0, 1).set_progress(float("nan"))),
            (
                ValueError,
                "total_steps must",
                lambda: set_drop_path_progress(build(0.1, 0, 1), 1, 0),
            ),
            (ValueError, "step", lambda: set_drop_path_progress(build(0.1, 0, 1), -1, 5)),
            (ValueError, "p must", lambda: drop_path(x, 1.5)),
            (TypeError, "x must", lambda: drop_path([1.0], 0.0)),
            (ValueError, "residual must", lambda: drop_path(x, 0.5, residual=x[:1])),
            (ValueError, "p must", lambda: drop_path_compact(nn.Identity(), x, 1.5)),
            (ValueError, "function must", lambda: drop_path_compact(shrink, x, 0.2, seed=0)),
            (ValueError, "p must", lambda: apply_scheduled_drop_path(nn.Linear(1, 1), 2.0)),
            (ValueError, "order must", lambda: apply_scheduled_drop_path(nn.Linear(1, 1), 0.1)),
            (
                ValueError,
                "order must",
                lambda: apply_scheduled_drop_path(nn.Linear(1, 1), 0.1, order=["branch"]),
            ),
            (
                ValueError,
                "order must",
                lambda: apply_scheduled_drop_path(
                    nn.Sequential(nn.Linear(1, 1)), 0.1, order=["0", "0"]
                ),
            ),
        ]


@pytest.mark.parametrize(
    ("layer", "step", "expected"),
    [(0, 100, 0.02), (9, 50, 0.1), (19, 100, 0.4), (19, 0, 0), (19, 50, 0.2), (19, 200, 0.4)],
)
def test_rate_grows_with_depth_and_time(layer, step, expected):
    # Sheet of paper 63, fact 1.
    module = ScheduledDropPath(0.4, layer, 20)
    assert set_drop_path_progress(module, step, 100) == 1
    assert module.current_p == pytest.approx(expected)
    assert module.rate.item() == module.current_p


def test_either_schedule_can_be_left_out():
    only_time = ScheduledDropPath(0.4, 0, 20, scale_by_depth=False)
    only_time.set_progress(0.5)
    assert only_time.current_p == pytest.approx(0.2)
    only_depth = ScheduledDropPath(0.4, 9, 20, scale_by_time=False)
    assert only_depth.current_p == pytest.approx(0.2)
    assert only_depth.rate.item() == only_depth.current_p


def test_the_final_rate_may_be_assigned():
    module = ScheduledDropPath(0.4, 0, 2, scale_by_time=False)
    module.p = 0.8
    assert module.p == 0.8
    assert module.rate.item() == pytest.approx(0.4)
    with pytest.raises(ValueError, match="p must"):
        module.p = 1.2


def test_nothing_to_do_returns_the_same_tensor():
    x = torch.randn(4, 3)
    assert drop_path(x, 0.0) is x
    assert drop_path(x, torch.tensor(0.0)) is x
    assert drop_path(x, 0.7, training=False) is x
    module = ScheduledDropPath(0.4, 0, 2)
    assert module(x) is x  # t = 0
    module.set_progress(1.0)
    assert module.eval()(x) is x


def test_residual_is_added_where_nothing_is_dropped():
    x, r = torch.randn(2, 4, 3)
    torch.testing.assert_close(drop_path(x, 0.0, residual=r), x + r)
    torch.testing.assert_close(drop_path(x, 0.5, residual=r, training=False), x + r)


def test_the_mean_over_draws_is_the_input():
    draws = drop_path(torch.ones(10_000, 2), 0.4, seed=1)[:, 0]
    deviation = (0.4 / 0.6 / 10_000) ** 0.5
    assert abs(draws.mean().item() - 1) < 4 * deviation


def test_a_sample_is_dropped_as_a_whole_or_scaled():
    x = torch.randn(64, 3, 4, 5)
    y = drop_path(x, 0.5, seed=2)
    dropped = (y == 0).flatten(1).all(1)
    assert 0 < dropped.sum() < 64
    torch.testing.assert_close(y, torch.where(dropped.reshape(-1, 1, 1, 1), 0, 2 * x))


def test_two_branches_draw_independently():
    one, two = (drop_path(torch.ones(20_000, 1), 0.3, branch=b, seed=5) == 0 for b in (0, 1))
    both = (one & two).sum().item()
    assert abs(both - 20_000 * 0.09) < 4 * (20_000 * 0.09 * 0.91) ** 0.5


def test_p_of_one_leaves_the_residual():
    x, r = torch.randn(2, 4, 3)
    assert torch.equal(drop_path(x, 1.0, residual=r), r)
    assert torch.equal(drop_path(x, 1.0), torch.zeros(4, 3))


def test_fused_residual_equals_two_operations():
    x, r = torch.randn(2, 16, 5, dtype=torch.float64)
    torch.testing.assert_close(drop_path(x, 0.4, residual=r, seed=3), r + drop_path(x, 0.4, seed=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_residual", [False, True])
def test_compact_form_equals_the_other_bit_for_bit(with_residual, dtype):
    torch.manual_seed(1)
    x, weight = torch.randn(33, 6).to(dtype), torch.randn(6).to(dtype)
    function = lambda t: (t * weight).tanh()
    options = {"residual": x if with_residual else None, "seed": 4, "branch": 3}
    found = drop_path_compact(function, x, 0.6, **options)
    assert torch.equal(found, drop_path(function(x), 0.6, **options))


def test_compact_form_calls_the_function_on_exactly_the_kept_rows():
    seen = []
    x = torch.arange(40.0).reshape(40, 1)
    y = drop_path_compact(lambda t: seen.append(t) or t + 1, x, 0.5, seed=6)
    assert torch.equal(seen[0], x[y != 0].reshape(-1, 1))
    assert 0 < len(seen[0]) < 40


def test_gradients_of_the_compact_form_are_those_of_the_other():
    branch = nn.Linear(4, 4, dtype=torch.float64)
    found = []
    for compact in (True, False):
        x = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(12, 4).requires_grad_()
        options = {"residual": x, "seed": 2}
        y = (
            drop_path_compact(branch, x, 0.5, **options)
            if compact
            else drop_path(branch(x), 0.5, **options)
        )
        found.append(torch.autograd.grad(y.square().sum(), (x, *branch.parameters())))
    torch.testing.assert_close(*found)


def test_compact_form_passes_gradcheck():
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    call = lambda x, w: drop_path_compact(lambda t: (t * w).sin(), x, 0.5, residual=x, seed=1)
    assert torch.autograd.gradcheck(call, (x, weight))


def test_without_kept_rows_the_function_is_not_called():
    branch = nn.Linear(3, 3)
    x = torch.randn(4, 3)
    y = drop_path_compact(branch, x, 1.0, residual=x)
    assert torch.equal(y, x)
    assert not y.requires_grad
    assert torch.equal(drop_path_compact(branch, x, 1.0), torch.zeros(4, 3))
    assert branch.weight.grad is None


def test_compact_form_is_plain_in_evaluation():
    x = torch.randn(4, 3)
    torch.testing.assert_close(
        drop_path_compact(torch.tanh, x, 0.5, residual=x, training=False), x + x.tanh()
    )


def test_dropped_paths_of_a_run_have_the_expected_number():
    # Sheet of paper 63, fact 7: the sum of p rho_l t / T over layers and steps.
    layers, steps, batch, p = 8, 50, 64, 0.4
    modules = nn.ModuleList(ScheduledDropPath(p, layer, layers) for layer in range(layers))
    torch.manual_seed(3)
    dropped, expected, variance = 0, 0.0, 0.0
    x = torch.ones(batch, 1)
    for step in range(1, steps + 1):
        set_drop_path_progress(modules, step, steps)
        for layer, module in enumerate(modules):
            rate = p * (layer + 1) / layers * step / steps
            dropped += (module(x) == 0).sum().item()
            expected += batch * rate
            variance += batch * rate * (1 - rate)
    assert expected == pytest.approx(p * (steps + 1) * batch * (layers + 1) / 4)
    assert abs(dropped - expected) < 4 * variance**0.5


def _network():
    return nn.ModuleDict(
        {
            "one": nn.Sequential(nn.Linear(3, 3), nn.ReLU()),
            "two": nn.Linear(3, 3),
            "three": nn.Linear(3, 3),
        }
    )


def test_branches_of_one_layer_share_its_rate_and_keys_stay():
    model = _network()
    keys = set(model.state_dict())
    assert apply_scheduled_drop_path(model, 0.8, order=["one", ["two", "three"]]) is model
    assert set(model.state_dict()) == keys
    assert set_drop_path_progress(model, 1, 1) == 3
    rates = [m.current_p for m in model.modules() if isinstance(m, ScheduledDropPath)]
    assert rates == pytest.approx([0.4, 0.8, 0.8])


def test_wrapped_branches_drop_whole_samples_in_training_only():
    model = apply_scheduled_drop_path(_network(), 0.5, order=["one", "two"])
    nn.init.constant_(model["one"][0].bias, 10.0)  # its ReLU stays open
    set_drop_path_progress(model, 1, 1)
    x = torch.randn(200, 3)
    for name, p in (("one", 0.25), ("two", 0.5)):
        dropped = (model[name](x) == 0).all(1).sum().item()
        assert abs(dropped - 200 * p) < 5 * (200 * p * (1 - p)) ** 0.5, name
    model.eval()
    assert torch.equal(model["two"](x), nn.functional.linear(x, *model["two"].parameters()))


def test_wrapped_models_are_copied_pickled_and_compiled(fresh_dynamo):
    model = apply_scheduled_drop_path(_network(), 0.5, order=["one", "two"])
    set_drop_path_progress(model, 1, 1)
    x = torch.randn(20, 3)
    torch.manual_seed(0)
    expected = model["two"](x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(0)
        assert torch.equal(twin["two"](x), expected)
    graphs = []
    compiled = torch.compile(
        model["two"], fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph
    )
    for step in range(10):
        set_drop_path_progress(model, step, 10)
        compiled(x)
    assert len(graphs) == 1


class DropPath(nn.Module):
    """The interface of timm's module."""

    def __init__(self, drop_prob, scale_by_keep=True):
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep


def test_drop_paths_of_another_library_are_replaced_a_layer_at_a_time():
    blocks = [
        nn.ModuleDict(
            {"path1": DropPath(0.1), "mlp": nn.Linear(2, 2), "path2": DropPath(0.1, False)}
        )
        for _ in range(4)
    ]
    model = apply_scheduled_drop_path(nn.ModuleList(blocks), 0.4, scale_by_time=False)
    gates = [m for m in model.modules() if isinstance(m, ScheduledDropPath)]
    assert [g.current_p for g in gates] == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])
    assert [g.scale_by_keep for g in gates[:2]] == [True, False]
    assert not any(type(m) is DropPath for m in model.modules())


def test_a_schedule_of_the_module_compiles_once(fresh_dynamo):
    model = _Residual(torch.float32)
    graphs = []
    compiled = torch.compile(
        model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph
    )
    for step in range(20):
        set_drop_path_progress(model, step, 20)
        compiled(torch.ones(3, 6))
    assert len(graphs) == 1


def test_rate_stays_exact_under_half_and_out_of_the_state_dict():
    module = ScheduledDropPath(0.1, 0, 1, scale_by_time=False).bfloat16()
    assert module.rate.dtype == torch.float64
    assert module.rate.item() == 0.1
    assert not module.state_dict()
