"""AdaWAC (paper 98): the method contract and the facts of its sheet."""

import copy
import math

import pytest
import torch

from regularizers.mixing import AdaptiveConsistencyWeights, AdaWAC, feature_consistency
from tests.harness import MethodContract

FIRST = torch.tensor([0])


def _sigmoid(x):
    return 1 / (1 + math.exp(-x))


def _losses(*values):
    return torch.tensor(values, dtype=torch.float32)


def _features(*consistency):
    """Features of two views whose consistency losses are these."""
    r = _losses(*consistency)
    return r.sqrt()[:, None], torch.zeros(len(r), 1)


class TestContract(MethodContract):
    def build(self, dtype):
        return AdaWAC(20).to(dtype)

    def call(self, module, dtype):
        generator = torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.rand(shape, generator=generator).to(dtype).requires_grad_()
        index = torch.tensor([3, 19, 3])
        return module(draw(3), draw(3), draw(3, 4, 5), draw(3, 4, 5), index)

    def test_copies_and_pickles_give_equal_results(self):
        module = self.build(torch.float32)
        self.call(module, torch.float32)
        twin = copy.deepcopy(module)
        expected = self.call(module, torch.float32)
        assert torch.equal(self.call(twin, torch.float32), expected)

    def bad_inputs(self):
        weights, criterion = AdaptiveConsistencyWeights(4), AdaWAC(4)
        one, f = torch.rand(2), (torch.rand(2, 3), torch.rand(2, 3))
        index = torch.tensor([0, 3])
        nan, inf = _losses(1.0, math.nan), _losses(1.0, math.inf)
        mode = lambda name, *arguments, **o: AdaWAC(4, mode=name)(*arguments, **o)
        return [
            (ValueError, "index", lambda: weights.update(index + 1, one, one)),
            (ValueError, "index", lambda: weights.update(index - 1, one, one)),
            (TypeError, "index", lambda: weights.update(index.int(), one, one)),
            (TypeError, "index", lambda: weights.update([0, 3], one, one)),
            (ValueError, "index", lambda: weights.update(index[None], one, one)),
            (ValueError, "supervised", lambda: weights.update(index, one[:1], one)),
            (ValueError, "supervised", lambda: weights.update(index, nan, one)),
            (ValueError, "consistency", lambda: weights.update(index, one, inf)),
            (ValueError, "consistency", lambda: weights.update(index, one, one[:1])),
            (ValueError, "lr", lambda: AdaptiveConsistencyWeights(4, lr=-1.0)),
            (ValueError, "num_samples", lambda: AdaptiveConsistencyWeights(0)),
            (ValueError, "weight_lr", lambda: AdaWAC(4, weight_lr=-1.0)),
            (ValueError, "consistency_weight", lambda: AdaWAC(4, consistency_weight=-1.0)),
            (ValueError, "mode", lambda: AdaWAC(4, mode="both")),
            (ValueError, "trim_ratio", lambda: AdaWAC(4, trim_ratio=1.0)),
            (ValueError, "dro_strength", lambda: AdaWAC(4, mode="dro", dro_strength=0.2)),
            (ValueError, "features_b", lambda: feature_consistency(f[0], f[1][:, :2])),
            (ValueError, "features_a", lambda: feature_consistency(one, one)),
            (ValueError, "features_a", lambda: criterion(one, one, None, None, index)),
            (ValueError, "features_a", lambda: criterion(one, one, f[0][:1], f[1][:1], index)),
            (ValueError, "features_a", lambda: criterion(one, one, f[0] * math.inf, f[1], index)),
            (ValueError, "features_b", lambda: criterion(one, one, f[0], f[1][:1], index)),
            (ValueError, "index", lambda: criterion(one, one, *f)),
            (ValueError, "index", lambda: criterion(one, one, *f, index + 1)),
            (ValueError, "supervised_a", lambda: criterion(nan, one, *f, index)),
            (ValueError, "supervised_b", lambda: criterion(one, inf, *f, index)),
            (ValueError, "supervised_b", lambda: criterion(one, one[:1], *f, index)),
            (ValueError, "supervised_a", lambda: criterion(one[0], one, *f, index)),
            (ValueError, "label_density", lambda: mode("pseudo", one, one, *f)),
            (ValueError, "label_density", lambda: mode("trim_sparse", one, label_density=one[:1])),
            (ValueError, "extra must", lambda: mode("pair", one, extra_weight=0.5)),
            (
                ValueError,
                "extra_weight",
                lambda: mode("pair", one, extra=one.mean(), extra_weight=2.0),
            ),
        ]


@pytest.mark.parametrize(
    ("supervised", "consistency", "lr", "expected"),
    [
        (1.0, 0.2, 1.0, (0.689974, 0.310026)),
        (1.0, 0.2, 8.0, (0.998341, 0.001659)),
        (0.1, 0.3, 1.0, (0.450166, 0.549834)),
    ],
)
def test_one_step_from_even_weights(supervised, consistency, lr, expected):
    weights = AdaptiveConsistencyWeights(3, lr=lr)
    found = weights.update(FIRST, _losses(supervised), _losses(consistency))
    assert [weight.item() for weight in found] == pytest.approx(expected, abs=2e-6)


def test_constant_losses_give_a_sigmoid_of_their_difference():
    weights = AdaptiveConsistencyWeights(1, lr=1.0)
    for _ in range(10):
        weights.update(FIRST, _losses(0.5), _losses(0.3))
    assert weights(FIRST)[0].item() == pytest.approx(0.880797, abs=1e-6)


def test_equal_losses_leave_the_weights():
    weights = AdaptiveConsistencyWeights(1)
    assert weights.update(FIRST, _losses(0.7), _losses(0.7))[0].item() == 0.5


def test_without_a_rate_the_loss_is_the_mean_of_both():
    criterion = AdaWAC(4, weight_lr=0.0, consistency_weight=1.0)
    supervised, consistency = torch.rand(3), torch.rand(3)
    for _ in range(3):
        loss = criterion(supervised, supervised, *_features(*consistency), torch.tensor([0, 1, 3]))
        torch.testing.assert_close(loss, ((supervised + consistency) / 2).mean())


def test_only_indexed_samples_change():
    weights = AdaptiveConsistencyWeights(50)
    index = torch.tensor([4, 17, 30])
    weights.update(index, torch.rand(3) + 1, torch.rand(3))
    assert weights.logit.nonzero().flatten().tolist() == index.tolist()


def test_duplicates_in_a_batch_add_up():
    weights = AdaptiveConsistencyWeights(3, lr=1.0)
    weights.update(torch.tensor([1, 1, 1]), _losses(0.3, 0.5, 0.2), _losses(0.1, 0.1, 0.1))
    torch.testing.assert_close(weights.logit, torch.tensor([0.0, 0.7, 0.0]))


def test_weights_take_no_gradient_and_losses_get_their_weights():
    criterion = AdaWAC(4, weight_lr=1.0, consistency_weight=1.0)
    a, b = torch.rand(2).requires_grad_(), torch.rand(2).requires_grad_()
    features = [f.clone().requires_grad_() for f in _features(0.2, 0.4)]
    index = torch.tensor([2, 0])
    loss = criterion(a, b, *features, index)
    on_supervised, on_consistency = criterion.weights(index)
    assert not on_supervised.requires_grad
    to_a, to_b, to_first, to_second = torch.autograd.grad(loss, (a, b, *features))
    torch.testing.assert_close(to_a, on_supervised / 2 / 2)  # half of l, mean of two
    torch.testing.assert_close(to_b, on_supervised / 2 / 2)
    torch.testing.assert_close(to_first[:, 0], on_consistency * features[0][:, 0].detach())
    torch.testing.assert_close(to_second, -to_first)


def test_weights_move_before_the_loss():
    criterion = AdaWAC(4, weight_lr=1.0, consistency_weight=1.0)
    loss = criterion(_losses(1.0), None, *_features(0.2), FIRST)
    beta = _sigmoid(0.8)
    assert loss.item() == pytest.approx(beta * 1.0 + (1 - beta) * 0.2, abs=1e-6)


def test_weights_stay_in_evaluation():
    criterion = AdaWAC(4).eval()
    loss = criterion(_losses(1.0), None, *_features(0.2), FIRST)
    assert criterion.weights.logit.abs().sum() == 0
    assert loss.item() == pytest.approx((1.0 + 2 * 0.2) / 2)


def test_weights_sum_to_one_after_extreme_steps():
    weights = AdaptiveConsistencyWeights(2, lr=8.0)
    index = torch.tensor([0, 1])
    for step in range(10_000):
        sign = 1.0 if step < 6000 else -1.0
        found = weights.update(index, sign * _losses(50.0, -50.0), _losses(0.0, 0.0))
    assert (sum(found) - 1).abs().max() < 1e-6
    assert weights.logit.isfinite().all()
    assert found[0].tolist() == pytest.approx([0.0, 1.0], abs=1e-6)  # no step was too late


def test_weight_grows_with_the_difference_of_the_losses():
    weights = AdaptiveConsistencyWeights(20, lr=1.0)
    supervised = torch.linspace(0, 2, 20)
    found, _ = weights.update(torch.arange(20), supervised, torch.ones(20))
    assert (found.diff() > 0).all()


def test_dense_samples_go_to_supervision_and_sparse_ones_to_consistency():
    generator = torch.Generator().manual_seed(0)
    weights = AdaptiveConsistencyWeights(200, lr=0.2)
    centre = torch.cat([torch.full((100,), 0.81), torch.full((100,), 0.11)])
    for _ in range(30):
        for index in torch.randperm(200, generator=generator).split(20):
            noise = 0.02 * torch.randn(2, 20, generator=generator)
            weights.update(index, centre[index] + noise[0], 0.31 + noise[1])
    beta, _ = weights(torch.arange(200))
    # sigmoid(0.2 x 30 x 0.5) and sigmoid(-0.2 x 30 x 0.2), less the curvature times the noise.
    assert beta[:100].mean().item() == pytest.approx(0.9525, abs=2e-3)
    assert beta[100:].mean().item() == pytest.approx(0.2314, abs=4e-3)


def test_logits_stay_float32_in_a_half_precision_model():
    criterion = AdaWAC(4).to(torch.bfloat16)
    assert criterion.weights.logit.dtype == torch.float32
    assert set(criterion.state_dict()) == {"weights.logit"}


def test_extra_loss_takes_its_share():
    criterion = AdaWAC(4, mode="pair")
    loss = criterion(_losses(1.0, 2.0), extra=torch.tensor(5.0), extra_weight=0.5)
    assert loss.item() == pytest.approx(0.5 * 1.5 + 0.5 * 5)


def test_pseudo_supervises_labelled_samples_and_ties_the_others():
    criterion = AdaWAC(4, mode="pseudo", consistency_weight=1.0)
    density = torch.tensor([0.3, 0.0])
    loss = criterion(_losses(1.0, 7.0), None, *_features(5.0, 0.2), label_density=density)
    assert loss.item() == pytest.approx((1.0 + 0.2) / 2)


def test_trim_sparse_is_the_mean_over_labelled_samples_or_zero():
    criterion = AdaWAC(4, mode="trim_sparse")
    losses = _losses(1.0, 2.0, 6.0).requires_grad_()
    assert criterion(losses, label_density=torch.tensor([0, 3, 1])).item() == pytest.approx(4.0)
    nothing = criterion(losses, label_density=torch.zeros(3))
    assert nothing.item() == 0.0
    assert torch.autograd.grad(nothing, losses)[0].tolist() == [0, 0, 0]


def test_trim_ratio_is_the_mean_of_the_losses_from_the_quantile_on():
    criterion = AdaWAC(4, mode="trim_ratio", trim_ratio=0.5)
    assert criterion(_losses(1.0, 9.0, 2.0, 5.0)).item() == pytest.approx(7.0)


def test_pair_and_consistency_are_plain_means():
    a, b, features = _losses(1.0, 2.0), _losses(3.0, 4.0), _features(0.5, 1.5)
    assert AdaWAC(4, mode="pair")(a, b).item() == pytest.approx(2.5)
    both = AdaWAC(4, mode="consistency", consistency_weight=2.0)
    assert both(a, b, *features).item() == pytest.approx((2.5 + 2 * 1.0) / 2)


def test_reweight_is_an_exponential_of_the_losses_over_the_batch():
    criterion = AdaWAC(4, mode="reweight", weight_lr=2.0)
    losses, index = torch.rand(3), torch.tensor([3, 0, 1])
    expected = ((2 * losses).softmax(0) * losses).sum()
    torch.testing.assert_close(criterion(losses, index=index), expected)
    again = ((4 * losses).softmax(0) * losses).sum()
    torch.testing.assert_close(criterion(losses, index=index), again)
    # Mean 1, as the sample that was not seen.
    assert criterion.weights.logit[index].exp().mean().item() == pytest.approx(1.0)


def test_dro_forgets_its_weights():
    losses, index = torch.rand(3), torch.tensor([0, 1, 2])
    criterion = AdaWAC(3, mode="dro", weight_lr=2.0, dro_strength=0.25)
    criterion(losses, index=index)
    loss = criterion(losses, index=index)
    # (1 - 2 / 4) of the first step, and the second.
    expected = ((3 * losses).softmax(0) * losses).sum()
    torch.testing.assert_close(loss, expected)
