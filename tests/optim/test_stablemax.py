"""StableMax: worked values, derivatives, no saturation; the meter of softmax collapse."""

import math

import pytest
import torch
from torch.nn import functional as F

from regularizers.optim import (
    log_stablemax,
    softmax_collapse_fraction,
    stablemax,
    stablemax_cross_entropy,
)


def logits(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def test_worked_example():
    x = torch.tensor([2.0, 0.0, -1.0])
    torch.testing.assert_close(stablemax(x), torch.tensor([2 / 3, 2 / 9, 1 / 9]))
    loss = stablemax_cross_entropy(x, torch.tensor(0))
    assert loss.item() == pytest.approx(math.log(1.5), rel=1e-6)


def test_log_s_is_odd_and_monotone():
    x = torch.linspace(-50, 50, 1001, dtype=torch.float64)
    pairs = torch.stack([x, torch.zeros_like(x)], -1)
    log_s = log_stablemax(pairs).diff(dim=-1).squeeze(-1).neg()  # log s(x) - log s(0)
    torch.testing.assert_close(log_s, -log_s.flip(0))
    assert (log_s.diff() > 0).all()


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_log_is_the_logarithm_over_any_dimension(dim):
    x = logits(3, 4, 5)
    torch.testing.assert_close(stablemax(x, dim=dim).log(), log_stablemax(x, dim=dim))
    torch.testing.assert_close(stablemax(x, dim=dim).sum(dim), torch.ones_like(x.sum(dim)))


@pytest.mark.parametrize("function", [stablemax, log_stablemax])
@pytest.mark.parametrize("values", [[1e30, 1.0, -1e30], [3e38, 3e38, 3e38]])
def test_huge_logits_give_finite_values_and_gradients(function, values):
    x = torch.tensor(values, requires_grad=True)
    y = function(x)
    y[1].backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_right_at_the_joints(value, dtype):
    # s'(0) = 1 from both sides; the authors' log has a NaN at 1, where 1 / (1 - x) is infinite.
    x = torch.tensor([value, 0.5], dtype=dtype, requires_grad=True)
    log_stablemax(x)[0].backward()
    s = [value + 1 if value >= 0 else 1 / (1 - value), 1.5]
    slope = 1.0 if value >= 0 else 1 / (1 - value) ** 2
    want = [slope * (1 / s[0] - 1 / sum(s)), -1 / sum(s)]
    assert x.grad.tolist() == pytest.approx(want, rel=1e-6)


def test_gradcheck_of_all_three():
    x = logits(4, 3).requires_grad_()
    target = torch.tensor([0, 2, 1, -100])
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    for call in (
        stablemax,
        log_stablemax,
        lambda z: stablemax_cross_entropy(z, target, weight=weight),
    ):
        assert torch.autograd.gradcheck(call, x)
        assert torch.autograd.gradgradcheck(call, x)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(5, 4), (2, 4, 3), (4,)])
def test_cross_entropy_is_torchs_of_the_log_probabilities(reduction, weighted, shape):
    x = logits(*shape)
    dim = min(1, len(shape) - 1)
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(4, shape[:dim] + shape[dim + 1 :], generator=generator)
    if target.dim():
        target[0] = 3
        target[-1] = -100
    weight = torch.tensor([1.0, 0.5, 2.0, 3.0], dtype=torch.float64) if weighted else None
    have = stablemax_cross_entropy(x, target, weight=weight, reduction=reduction)
    want = F.nll_loss(log_stablemax(x, dim=dim), target, weight=weight, reduction=reduction)
    torch.testing.assert_close(have, want)


def test_nothing_counted_gives_what_torch_gives():
    x, target = logits(3, 4), torch.full((3,), -100)
    assert stablemax_cross_entropy(x, target).isnan()
    assert stablemax_cross_entropy(x, target, reduction="sum") == 0
    assert stablemax_cross_entropy(x, target, reduction="none").tolist() == [0.0] * 3
    assert softmax_collapse_fraction(x, target).isnan()


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_large_margin_keeps_its_gradient(dtype):
    x = torch.tensor([[1e6, 0.0]], requires_grad=True)
    loss = stablemax_cross_entropy(x, torch.tensor([0]), dtype=dtype)
    loss.backward()
    assert loss.item() == pytest.approx(1e-6, rel=1e-5)
    assert x.grad[0].tolist() == pytest.approx([-1e-12, 1e-6], rel=1e-5)


def test_half_types_are_computed_wide():
    x = logits(5, 4, dtype=torch.bfloat16)
    target = torch.tensor([0, 1, 2, 3, 0])
    loss = stablemax_cross_entropy(x, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, stablemax_cross_entropy(x.float(), target))
    assert stablemax(x).dtype == log_stablemax(x).dtype == torch.bfloat16


def test_it_compiles_to_one_graph(fresh_dynamo):
    x, target = logits(5, 4), torch.tensor([0, 1, 2, 3, -100])
    compiled = torch.compile(stablemax_cross_entropy, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, target), stablemax_cross_entropy(x, target))


def test_softmax_in_float32_collapses_where_the_meter_says():
    target = torch.tensor([0])
    for margin, loss_is_zero, all_is_zero in ((16.0, 0, 0), (17.0, 1, 0), (104.0, 1, 1)):
        x = torch.tensor([[margin, 0.0]], requires_grad=True)
        loss = F.cross_entropy(x, target)
        loss.backward()
        assert (loss == 0) == loss_is_zero
        assert (x.grad[0, 0] == 0) == loss_is_zero
        assert bool((x.grad == 0).all()) == all_is_zero
        assert softmax_collapse_fraction(x, target) == loss_is_zero
        z = torch.tensor([[margin, 0.0]], requires_grad=True)
        stable = stablemax_cross_entropy(z, target)
        stable.backward()
        assert stable > 0
        assert (z.grad != 0).all()


def test_meter_without_target_looks_at_the_sum_alone():
    x = torch.tensor([[17.0, 0.0], [0.0, 17.0], [0.0, 1.0], [16.0, 0.0]])
    assert softmax_collapse_fraction(x) == 0.5
    assert softmax_collapse_fraction(x, torch.tensor([0, 0, 0, 0])) == 0.25
    assert softmax_collapse_fraction(x, torch.tensor([0, -100, 0, -100])) == 0.5
    assert softmax_collapse_fraction(x.double()) == 0  # 17 is far from enough in float64


def test_a_fitted_linear_classifier_collapses_under_softmax_alone():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(32, 40, generator=generator)
    y = torch.randint(4, (32,), generator=generator)
    ends = {}
    for name, loss_of in (("softmax", F.cross_entropy), ("stablemax", stablemax_cross_entropy)):
        W = torch.zeros(4, 40, requires_grad=True)
        for _ in range(3000):
            (grad,) = torch.autograd.grad(loss_of(X @ W.T, y), W)
            with torch.no_grad():
                W -= 0.1 * grad / grad.norm().clamp(min=1e-30)
        z = X @ W.T
        (grad,) = torch.autograd.grad(loss_of(z, y), W)
        share = (loss_of(z, y, reduction="none") == 0).double().mean()
        ends[name] = (share.item(), grad.norm().item())
        if name == "softmax":
            assert softmax_collapse_fraction(z, y) == 1
    assert ends["softmax"][0] == 1.0
    assert ends["softmax"][1] < 1e-15
    assert ends["stablemax"][0] == 0.0
    assert ends["stablemax"][1] > 1e-9


TARGET = torch.tensor([0, 1])
BAD = [
    (TypeError, "x must be", lambda: stablemax(torch.tensor([1]))),
    (TypeError, "x must be", lambda: log_stablemax(torch.tensor([1]))),
    (TypeError, "logits", lambda: stablemax_cross_entropy(torch.zeros(2, 3).int(), TARGET)),
    (TypeError, "target", lambda: stablemax_cross_entropy(torch.zeros(2, 3), TARGET.float())),
    (TypeError, "target", lambda: softmax_collapse_fraction(torch.zeros(2, 3), TARGET.int())),
    (ValueError, "target", lambda: stablemax_cross_entropy(torch.zeros(3, 3), TARGET)),
    (ValueError, "target", lambda: stablemax_cross_entropy(torch.zeros(2, 1), TARGET)),
    (ValueError, "logits", lambda: stablemax_cross_entropy(torch.tensor(0.0), TARGET)),
    (ValueError, "logits", lambda: softmax_collapse_fraction(torch.tensor(0.0))),
    (
        ValueError,
        "weight",
        lambda: stablemax_cross_entropy(torch.zeros(2, 3), TARGET, weight=torch.ones(2)),
    ),
    (
        ValueError,
        "reduction",
        lambda: stablemax_cross_entropy(torch.zeros(2, 3), TARGET, reduction="max"),
    ),
    (
        TypeError,
        "dtype",
        lambda: stablemax_cross_entropy(torch.zeros(2, 3), TARGET, dtype=torch.int64),
    ),
]


@pytest.mark.parametrize(("exception", "message", "call"), BAD)
def test_bad_input_names_the_argument(exception, message, call):
    with pytest.raises(exception, match=message):
        call()
