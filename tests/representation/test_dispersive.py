"""Dispersive losses: the facts of the sheet of paper 168, and the regularizer that taps layers."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers._shared.moments import covariance, off_diagonal
from regularizers.representation import DispersiveRegularizer, dispersive_loss
from tests.harness import DTYPES, GraphRecorder, MethodContract

VARIANTS = ("infonce_l2", "infonce_cosine", "hinge", "covariance")
REDUCTIONS = ("mean", "sum", "none")
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64, sums in another order


def _features(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _pairs(h):
    """Squared distances and cosines of the pairs i != j, [B, B - 1]."""
    keep = ~torch.eye(len(h), dtype=torch.bool)
    squares = (h[:, None] - h).square().sum(-1)
    cosines = F.cosine_similarity(h[:, None], h[None], dim=-1)
    return squares[keep].view(len(h), -1), cosines[keep].view(len(h), -1)


class TestDispersiveRegularizer(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
        return DispersiveRegularizer(model, ["0", "1"], weight=0.5, layer_weights=[1.0, 3.0])

    def call(self, module, dtype):
        y, penalty = module(torch.linspace(-1, 1, 15, dtype=dtype).reshape(5, 3))
        return (y.float().square().mean() + penalty).to(dtype)

    def bad_inputs(self):
        make = lambda *taps, **options: DispersiveRegularizer(nn.Linear(2, 2), taps, **options)
        return [
            (TypeError, "model must", lambda: DispersiveRegularizer(lambda x: x, [""])),
            (ValueError, "taps must", lambda: make()),
            (ValueError, "tap names no submodule", lambda: make("hidden")),
            (ValueError, "weight must", lambda: make("", weight=-0.1)),
            (ValueError, "layer_weights must", lambda: make("", layer_weights=[0.0])),
            (ValueError, "layer_weights must", lambda: make("", layer_weights=[1.0, 1.0])),
            (ValueError, "temperature must", lambda: make("", temperature=0.0)),
            (ValueError, "variant must", lambda: make("", variant="l1")),
        ]


@pytest.mark.parametrize(
    ("variant", "worst"),
    [("infonce_l2", 0.0), ("infonce_cosine", 2.0), ("hinge", 2.25), ("covariance", 0.0)],
)
def test_a_collapsed_batch_has_the_largest_value(variant, worst):
    h = torch.tensor([0.3, -2.0, 5.0]).expand(6, 3)
    found = dispersive_loss(h, variant=variant, margin=1.5)
    # float32: log of 30, and squared distances about the mean.
    torch.testing.assert_close(found, torch.tensor(worst), rtol=1e-6, atol=1e-6)


def test_worked_values():
    h = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    found = dispersive_loss(h, temperature=0.5)
    assert found.item() == pytest.approx(math.log((4 * math.exp(-2) + 2 * math.exp(-4)) / 6))
    assert found.item() == pytest.approx(-2.33999, abs=1e-5)
    assert dispersive_loss(h, variant="hinge", margin=2.0).item() == pytest.approx(2 / 3)
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    cosine = dispersive_loss(directions, variant="infonce_cosine", temperature=0.5)
    assert cosine.item() == pytest.approx(-0.33999, abs=1e-5)


def test_every_variant_and_reduction_is_its_formula():
    h = _features(7, 4)
    squares, cosines = _pairs(h)
    spread = (-squares / 0.7).exp()
    near = (cosines / 0.7).exp()
    slack = (3.0 - squares).relu().square()
    crossed = off_diagonal(torch.cov(h.T)).square()
    count = math.log(7 * 6)
    expected = {
        "infonce_l2": (spread.mean().log(), spread.sum().log(), spread.mean(1).log()),
        "infonce_cosine": (near.sum().log() - count, near.sum().log(), near.mean(1).log()),
        "hinge": (slack.mean(), slack.sum(), slack.mean(1)),
        "covariance": (crossed.sum() / 12, crossed.sum(), crossed.sum(1) / 3),
    }
    for variant, values in expected.items():
        for reduction, value in zip(REDUCTIONS, values, strict=True):
            found = dispersive_loss(
                h, variant=variant, temperature=0.7, margin=3.0, reduction=reduction
            )
            torch.testing.assert_close(found, value, **EXACT)


def test_diag_target_penalises_features_of_small_variance():
    h = _features(9, 3) * torch.tensor([0.1, 1.0, 3.0])
    plain = dispersive_loss(h, variant="covariance")
    hinge = (1.5 - h.var(0)).relu()
    found = dispersive_loss(h, variant="covariance", diag_target=1.5)
    torch.testing.assert_close(found, plain + hinge.mean(), **EXACT)
    collapsed = torch.ones(9, 3)
    assert dispersive_loss(collapsed, variant="covariance") == 0
    assert dispersive_loss(collapsed, variant="covariance", diag_target=1.5) == 1.5


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_more_features_than_samples_give_the_covariance_of_the_features(reduction):
    h = _features(5, 30)
    crossed = off_diagonal(covariance(h)).square()
    expected = {
        "mean": crossed.sum() / (30 * 29),
        "sum": crossed.sum(),
        "none": crossed.sum(1) / 29,
    }[reduction]
    found = dispersive_loss(h, variant="covariance", reduction=reduction)
    torch.testing.assert_close(found, expected, **EXACT)


def test_one_feature_has_no_others():
    assert dispersive_loss(_features(5, 1), variant="covariance") == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_axes_after_the_batch_are_flattened(variant):
    h = _features(5, 2, 3, 4)
    found = dispersive_loss(h, variant=variant, margin=30.0)
    torch.testing.assert_close(found, dispersive_loss(h.flatten(1), variant=variant, margin=30.0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_normalize_scales_samples_to_length_one(variant):
    h = _features(6, 4)
    found = dispersive_loss(h, variant=variant, normalize=True)
    torch.testing.assert_close(found, dispersive_loss(F.normalize(h), variant=variant))


def test_l2_is_invariant_to_moving_and_turning_all_features():
    h = _features(8, 5)
    turn, _ = torch.linalg.qr(_features(5, 5, seed=1))
    moved = h @ turn + 100 * _features(5, seed=2)
    torch.testing.assert_close(dispersive_loss(moved), dispersive_loss(h), rtol=1e-9, atol=0)


def test_cosine_is_invariant_to_the_scale_of_each_sample():
    h = _features(8, 5)
    scaled = h * torch.rand(8, 1).add(0.1).double()
    found = [dispersive_loss(x, variant="infonce_cosine") for x in (scaled, h)]
    torch.testing.assert_close(*found, **EXACT)


def test_rows_of_the_l2_gradient_add_up_to_zero():
    h = _features(8, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(dispersive_loss(h), h)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient.sum(0), torch.zeros(5).double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("variant", ["infonce_l2", "hinge"])
def test_larger_features_never_raise_the_loss(variant):
    h = 0.2 * _features(8, 3)
    losses = [dispersive_loss(s * h, variant=variant).item() for s in (1.0, 1.5, 2.0, 4.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant):
    h = _features(5, 3).requires_grad_()
    loss = lambda x: dispersive_loss(x, variant=variant, margin=2.0)
    assert torch.autograd.gradcheck(loss, h)
    wide = _features(3, 6).requires_grad_()
    assert torch.autograd.gradcheck(loss, wide)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_single_sample_gives_zero_with_a_live_graph(variant, reduction):
    h = _features(1, 4).requires_grad_()
    found = dispersive_loss(h, variant=variant, reduction=reduction)
    sizes = {"none": 4 if variant == "covariance" else 1}
    assert found.shape == ((sizes["none"],) if reduction == "none" else ())
    assert (found == 0).all()
    found.sum().backward()
    assert (h.grad == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_gives_nan(variant):
    for size in (1, 4):
        h = _features(size, 3)
        h[0, 0] = math.nan
        assert dispersive_loss(h, variant=variant).isnan()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_types_accumulate_in_float32(variant, dtype):
    h = _features(16, 8).to(dtype)
    found = dispersive_loss(h, variant=variant, margin=20.0)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = dispersive_loss(h.double(), variant=variant, margin=20.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_autocast_leaves_the_loss_alone():
    h = _features(16, 8).float()
    for variant in VARIANTS:
        expected = dispersive_loss(h, variant=variant)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(dispersive_loss(h, variant=variant), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_to_one_graph(variant, fresh_dynamo):
    h = _features(6, 4).requires_grad_()
    loss = lambda x: dispersive_loss(x, variant=variant, margin=4.0)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h), loss(h))
    gradients = [torch.autograd.grad(f(h), h)[0] for f in (compiled, loss)]
    torch.testing.assert_close(*gradients)


def test_the_released_clamp_hides_collapse_and_this_loss_does_not():
    spread = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    collapsed = torch.zeros(3, 2, dtype=torch.float64)

    def released(h):
        distance = torch.cdist(h, h)
        masked = distance.masked_fill(torch.eye(len(h), dtype=torch.bool), torch.inf)
        return -(masked / 0.5).clamp(-10, 10).logsumexp(1).mean()

    assert released(collapsed).item() == pytest.approx(-10.00009, abs=1e-5)
    assert abs(released(collapsed) - released(spread)) < 1e-3
    assert dispersive_loss(collapsed) - dispersive_loss(spread) > 2


def test_the_parent_method_is_this_loss_at_another_temperature():
    h = _features(6, 5)
    squares = (h[:, None] - h).square().sum(-1) / 5
    parent = (-squares / 0.8).exp().mean().log()
    expected = ((6 * parent.exp() - 1) / 5).log()
    torch.testing.assert_close(dispersive_loss(h, temperature=0.8 * 5), expected, **EXACT)


def test_penalty_is_the_weighted_mean_over_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = _features(6, 3)
    regularized = DispersiveRegularizer(
        model, ["0", "1"], weight=0.4, layer_weights=[1.0, 3.0], variant="hinge", margin=9.0
    )
    y, penalty = regularized(x)
    first, second = (
        dispersive_loss(h, variant="hinge", margin=9.0) for h in (model[0](x), model[:2](x))
    )
    torch.testing.assert_close(y, model(x))
    torch.testing.assert_close(penalty, 0.4 * (first + 3 * second) / 4)


def test_a_schedule_of_the_weight_compiles_one_graph(fresh_dynamo):
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    regularized, graphs, x = DispersiveRegularizer(model, ["1"]), GraphRecorder(), torch.randn(6, 3)
    compiled = torch.compile(regularized, fullgraph=True, backend=graphs)
    for step in range(12):
        regularized.weight = 0.1 * step
        torch.testing.assert_close(compiled(x)[1], regularized(x)[1])
    assert len(graphs) == 1


def test_the_tapped_model_keeps_nothing_and_can_be_copied():
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    regularized = DispersiveRegularizer(model, ["1"])
    x = torch.randn(6, 3)
    _, penalty = regularized(x)
    model(x)
    assert regularized.tap._outputs == {}
    twin = copy.deepcopy(regularized)
    with torch.no_grad():
        twin.model[0].weight.mul_(2)
    assert torch.equal(regularized(x)[1], penalty)
    assert not torch.equal(twin(x)[1], penalty)


def test_a_tap_that_returns_no_tensor_is_refused():
    model = nn.Sequential(nn.LSTM(3, 4))
    regularized = DispersiveRegularizer(model, ["0"])
    with pytest.raises(ValueError, match="tap '0' must return a tensor, got tuple"):
        regularized(torch.randn(5, 3))


def test_bad_input_names_the_argument():
    h = torch.randn(4, 3)
    for exception, name, call in [
        (TypeError, "features must", lambda: dispersive_loss(h.long())),
        (ValueError, "features must", lambda: dispersive_loss(h[:0])),
        (ValueError, "temperature must", lambda: dispersive_loss(h, temperature=0.0)),
        (ValueError, "margin must", lambda: dispersive_loss(h, margin=-1.0)),
        (ValueError, "variant must", lambda: dispersive_loss(h, variant="l2")),
        (ValueError, "reduction must", lambda: dispersive_loss(h, reduction="max")),
        (ValueError, "diag_target must", lambda: dispersive_loss(h, diag_target=1.0)),
    ]:
        with pytest.raises(exception, match=name):
            call()


def test_features_of_nearly_equal_inputs_spread_without_harm_to_the_fit():
    def run(weight):
        generator = torch.Generator().manual_seed(0)
        x = 1 + 0.05 * torch.randn(64, 8, generator=generator)
        target = torch.randn(64, 2, generator=generator)
        torch.manual_seed(0)
        layers = [nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)]
        model = nn.Sequential(*layers)
        regularized = DispersiveRegularizer(model, ["2"], weight=weight)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(300):
            y, penalty = regularized(x)
            optimizer.zero_grad()
            (F.mse_loss(y, target) + penalty).backward()
            optimizer.step()
        with torch.no_grad():
            h = model[:3](x)
            return _pairs(h)[0].mean().item(), F.mse_loss(model(x), target).item()

    torch.set_num_threads(1)
    (near, fit), (far, regularized_fit) = run(0.0), run(0.5)
    assert far > 20 * near
    assert regularized_fit < 1.1 * fit
