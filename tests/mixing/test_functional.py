"""The shared pieces of the mixing methods: weights, mixed batches and their losses."""

import pytest
import torch
from torch.nn import functional as F

from regularizers.mixing.functional import (
    MixBatch,
    mixed_cross_entropy,
    sample_lambda,
    softmax_consistency,
)
from tests.harness import DTYPES, TOLERANCES, GraphRecorder


def _problem(dtype=torch.float64, batch=6, classes=5):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, classes, generator=generator, dtype=torch.float64).to(dtype)
    a, b = torch.randint(classes, (2, batch), generator=generator)
    lam = torch.rand(batch, generator=generator, dtype=torch.float64)
    return logits, a, b, lam


def _soft(a, b, lam, classes=5):
    return MixBatch(a, a, b, lam, a).soft_target(classes)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, None), (0.4, None), (2.0, 5.0)])
def test_weights_have_the_moments_of_the_beta_law(alpha, beta):
    lam = sample_lambda(200_000, alpha, beta, generator=torch.Generator().manual_seed(0))
    b = alpha if beta is None else beta
    mean, variance = alpha / (alpha + b), alpha * b / ((alpha + b) ** 2 * (alpha + b + 1))
    assert abs(lam.mean() - mean) < 4 * (variance / 200_000) ** 0.5  # four standard errors
    assert abs(lam.var() - variance) < 0.02 * variance


def test_no_alpha_means_no_mixing():
    assert torch.equal(sample_lambda(4, 0.0), torch.ones(4))
    assert torch.equal(sample_lambda(4, 0), torch.ones(4))


def test_tiny_alpha_gives_weights_without_nan():
    # Both gamma draws underflow to zero for most of these; a weight is one half then.
    lam = sample_lambda(1000, 1e-5)
    assert ((lam >= 0) & (lam <= 1)).all()
    assert (lam == 0.5).any()


def test_folded_weights_lie_above_one_half_and_above_the_minimum():
    assert (sample_lambda(1000, 0.3, fold=True) >= 0.5).all()
    found = sample_lambda(1000, 0.3, fold=True, minimum=0.55)
    assert found.min() == torch.tensor(0.55)


def test_a_generator_reproduces_and_leaves_the_default_one_alone():
    state = torch.get_rng_state()
    draws = [sample_lambda(9, 0.7, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_equals_that_of_the_soft_target(reduction, label_smoothing):
    logits, a, b, lam = _problem()
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    expected = F.cross_entropy(logits, _soft(a, b, lam), **options)
    torch.testing.assert_close(mixed_cross_entropy(logits, a, b, lam, **options), expected)


def test_gradient_is_softmax_minus_the_soft_target_over_the_batch():
    logits, a, b, lam = _problem()
    logits.requires_grad_()
    mixed_cross_entropy(logits, a, b, lam).backward()
    expected = (logits.detach().softmax(1) - _soft(a, b, lam)) / len(a)
    torch.testing.assert_close(logits.grad, expected)


def test_loss_is_differentiable_in_logits_and_weights():
    logits, a, b, lam = _problem()
    leaves = (logits.requires_grad_(), lam.requires_grad_())
    call = lambda z, weight: mixed_cross_entropy(z, a, b, weight, label_smoothing=0.1)
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_equal_labels_give_the_plain_cross_entropy():
    logits, a, _, lam = _problem()
    a[2] = -100
    for reduction in ("mean", "sum", "none"):
        expected = F.cross_entropy(logits, a, reduction=reduction, label_smoothing=0.2)
        found = mixed_cross_entropy(logits, a, a, lam, reduction=reduction, label_smoothing=0.2)
        torch.testing.assert_close(found, expected)


def test_an_ignored_label_drops_out_with_its_weight():
    logits, a, b, lam = _problem()
    b[1] = -1
    kept = lam[1] * F.cross_entropy(logits[1:2], a[1:2])
    rows = mixed_cross_entropy(logits, a, b, lam, ignore_index=-1, reduction="none")
    torch.testing.assert_close(rows[1], kept)
    mean = mixed_cross_entropy(logits, a, b, lam, ignore_index=-1)
    torch.testing.assert_close(mean, rows.sum() / (5 + lam[1]))


def test_a_mean_over_no_labels_is_nan_as_in_torch():
    ignored = torch.full((2,), -100)
    assert mixed_cross_entropy(torch.zeros(2, 3), ignored, ignored, 0.5).isnan()


def test_one_weight_serves_all_rows():
    logits, a, b, _ = _problem()
    found = [mixed_cross_entropy(logits, a, b, w) for w in (0.3, torch.tensor(0.3).double())]
    expected = 0.3 * F.cross_entropy(logits, a) + 0.7 * F.cross_entropy(logits, b)
    for have in found:
        torch.testing.assert_close(have, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_keeps_the_dtype_of_the_logits(dtype):
    logits, a, b, lam = _problem(dtype)
    lam = lam.float()
    found = mixed_cross_entropy(logits, a, b, lam)
    assert found.dtype == dtype
    expected = mixed_cross_entropy(logits.double(), a, b, lam)
    torch.testing.assert_close(found.double(), expected, **TOLERANCES[dtype])


def test_loss_is_float32_under_autocast():
    logits, a, b, lam = _problem(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert mixed_cross_entropy(logits, a, b, lam).dtype == torch.float32


def test_loss_compiles_to_one_graph_for_all_weights(fresh_dynamo):
    logits, a, b, _ = _problem()
    graphs = GraphRecorder()
    compiled = torch.compile(mixed_cross_entropy, fullgraph=True, backend=graphs)
    for weight in torch.linspace(0, 1, 20, dtype=torch.float64):
        expected = mixed_cross_entropy(logits, a, b, weight)
        torch.testing.assert_close(compiled(logits, a, b, weight), expected)
    assert len(graphs) == 1


def test_soft_targets_are_smoothed_as_by_torch():
    _, a, b, lam = _problem()
    smooth = MixBatch(a, a, b, lam, a).soft_target(5, label_smoothing=0.1)
    torch.testing.assert_close(smooth, 0.9 * _soft(a, b, lam) + 0.1 / 5)
    torch.testing.assert_close(smooth.sum(1), torch.ones(6).double())


def test_a_batch_computes_its_loss():
    logits, a, b, lam = _problem()
    batch = MixBatch(logits, a, b, lam, a)
    assert torch.equal(batch.loss(logits), mixed_cross_entropy(logits, a, b, lam))


def test_consistency_does_not_see_a_constant_added_to_a_row():
    a, b = torch.randn(2, 7, 4, dtype=torch.float64)
    shift = torch.randn(7, 1, dtype=torch.float64)
    for kind in ("mse", "kl"):
        torch.testing.assert_close(
            softmax_consistency(a + shift, b - shift, kind=kind),
            softmax_consistency(a, b, kind=kind),
        )


def test_squared_consistency_is_at_most_two_over_the_classes():
    a = 1e4 * torch.eye(5)
    torch.testing.assert_close(softmax_consistency(a, a.roll(1, 0)), torch.tensor(2 / 5))


def test_kl_is_that_of_the_target_against_the_prediction():
    a, b = torch.randn(2, 7, 4, dtype=torch.float64)
    p, q = a.softmax(1), b.softmax(1)
    expected = (q * (q / p).log()).sum(1) / 4
    torch.testing.assert_close(softmax_consistency(a, b, kind="kl", reduction="none"), expected)


def test_a_detached_target_gets_no_gradient():
    a, b = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    softmax_consistency(a, b, detach_target=True).backward()
    assert a.grad.abs().sum() > 0
    assert b.grad is None


def test_bad_input_names_the_argument():
    logits, a, b, lam = _problem()
    loss = mixed_cross_entropy
    for exception, name, call in [
        (ValueError, "alpha must", lambda: sample_lambda(3, -1.0)),
        (ValueError, "alpha must", lambda: sample_lambda(3, float("nan"))),
        (TypeError, "alpha must", lambda: sample_lambda(3, "1")),
        (ValueError, "beta must", lambda: sample_lambda(3, 1.0, 0.0)),
        (ValueError, "minimum must", lambda: sample_lambda(3, 1.0, minimum=1.5)),
        (ValueError, "n must", lambda: sample_lambda(-1, 1.0)),
        (TypeError, "logits must", lambda: loss(logits.long(), a, b, lam)),
        (ValueError, "logits must", lambda: loss(logits[0], a, b, lam)),
        (TypeError, "target_a must", lambda: loss(logits, a.int(), b, lam)),
        (ValueError, "target_b must", lambda: loss(logits, a, b[:2], lam)),
        (ValueError, "lam must", lambda: loss(logits, a, b, 1.5)),
        (ValueError, "lam must", lambda: loss(logits, a, b, float("nan"))),
        (ValueError, "lam must", lambda: loss(logits, a, b, lam[:2])),
        (TypeError, "lam must", lambda: loss(logits, a, b, "half")),
        (ValueError, "label_smoothing must", lambda: loss(logits, a, b, lam, label_smoothing=1.0)),
        (ValueError, "reduction must", lambda: loss(logits, a, b, lam, reduction="avg")),
        (ValueError, "kind must", lambda: softmax_consistency(logits, logits, kind="l1")),
        (ValueError, "logits_b must", lambda: softmax_consistency(logits, logits[:2])),
        (ValueError, "num_classes must", lambda: MixBatch(a, a, b, lam, a).soft_target(0)),
    ]:
        with pytest.raises(exception, match=name):
            call()
