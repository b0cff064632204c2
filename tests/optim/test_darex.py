"""DAREx: the statistics of dropping, state dicts, importance, activations, output change."""

import warnings

import pytest
import torch
from torch import nn

from regularizers.optim import (
    ActivationMean,
    darex,
    drop_delta,
    importance_mask,
    mse_q,
    output_change,
)

COUNT = 400_000


@pytest.mark.parametrize(("q", "mean", "variance"), [(0.1, 1.0, 9.0), (0.3, 1 / 3, 1.0)])
def test_mean_and_variance_are_those_of_the_formula(q, mean, variance):
    x = drop_delta(torch.ones(COUNT), 0.9, q=q, seed=0)
    # Five standard deviations of the mean; the variance is a function of the share kept.
    tolerance = 5 * (variance / COUNT) ** 0.5
    assert x.mean().item() == pytest.approx(mean, abs=tolerance)
    assert x.var().item() == pytest.approx(variance, rel=0.03)


def test_default_is_the_unbiased_q():
    x = torch.randn(100)
    torch.testing.assert_close(drop_delta(x, 0.9, seed=1), drop_delta(x, 0.9, q=0.1, seed=1))


def test_q_of_one_only_drops():
    x = torch.randn(1000)
    y = drop_delta(x, 0.5, q=1.0, seed=0)
    kept = y != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(y[kept], x[kept])


@pytest.mark.parametrize("q", [None, 1.0])
def test_dropping_nothing_returns_the_tensor_itself(q):
    x = torch.randn(3)
    assert drop_delta(x, 0.0, q=q) is x


def test_a_seed_gives_one_mask_for_every_q():
    x = torch.ones(1000)
    masks = [drop_delta(x, 0.9, q=q, seed=7) != 0 for q in (0.1, 0.2, 1.0)]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_equal_generators_give_equal_masks_and_move_on():
    x = torch.ones(1000)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    first, second = (drop_delta(x, 0.9, generator=g) for g in generators)
    assert torch.equal(first, second)
    assert not torch.equal(first, drop_delta(x, 0.9, generator=generators[0]))


def test_structured_dropping_takes_whole_input_features():
    y = drop_delta(torch.ones(8, 100), 0.5, structured=True, seed=0)
    assert torch.equal(y, y[:1].expand(8, 100))
    assert 0 < (y[0] == 0).sum() < 100
    assert (drop_delta(torch.ones(100), 0.5, structured=True, seed=0) == 0).any()


def test_q_may_be_one_for_each_row_and_is_differentiable():
    x = torch.randn(4, 50, dtype=torch.float64, requires_grad=True)
    q = torch.tensor([[0.3], [0.4], [0.8], [1.0]], dtype=torch.float64, requires_grad=True)
    f = lambda x, q: drop_delta(x, 0.8, q=q, seed=0)
    torch.testing.assert_close(f(x, q), drop_delta(x, 0.8, q=1.0, seed=0) / q)
    assert torch.autograd.gradcheck(f, (x, q))


def test_high_rates_are_worse_than_dropping_everything_where_deltas_cancel():
    def errors(mean, std, scales):
        torch.manual_seed(0)
        delta, x = mean + std * torch.randn(64, 512), torch.rand(64, 512)
        out = x @ delta.T
        found = []
        for q in scales:
            pruned = [x @ drop_delta(delta, 0.99, q=q, seed=s).T for s in range(40)]
            found.append(torch.stack([(y - out).square().mean() for y in pruned]).mean().sqrt())
        best = mse_q(out.square().mean(), (x**2 @ (delta**2).T).mean(), p=0.99)
        return [e.item() for e in found], out.square().mean().sqrt().item(), best.item()

    (dare, better), _, best = errors(0.02, 0.01, (0.01, 0.013))
    # The error itself varies by some 3% over 40 masks of 64 rows.
    assert dare == pytest.approx(2.84, rel=0.06)
    assert better == pytest.approx(2.46, rel=0.06)
    assert better < dare
    assert best == pytest.approx(0.0132, abs=2e-4)
    (dare, half), everything, best = errors(0.0, 0.02, (0.01, 0.5))
    assert dare == pytest.approx(2.62, rel=0.05)
    assert half == pytest.approx(0.26, abs=0.02)
    assert half == pytest.approx(everything, rel=0.02)
    assert dare > 8 * everything
    assert best == pytest.approx(1.0, abs=0.1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(20, 30)
        self.norm = nn.BatchNorm1d(30)
        self.classifier = nn.Linear(30, 3)


def pair():
    torch.manual_seed(0)
    before = Net().state_dict()
    after = {k: v + torch.randn(v.shape).to(v.dtype) for k, v in before.items()}
    return after, before


def kept_deltas(result, before):
    return {k: result[k] - before[k] for k in before if result[k].is_floating_point()}


def test_state_dict_keeps_classifier_counters_order_and_types():
    after, before = pair()
    result = darex(after, before, p=0.9, seed=0)
    assert list(result) == list(after)
    assert torch.equal(result["classifier.weight"], after["classifier.weight"])
    assert torch.equal(result["norm.num_batches_tracked"], after["norm.num_batches_tracked"])
    Net().load_state_dict(result)


def test_entries_are_pretrained_or_moved_by_the_rescaled_delta():
    after, before = pair()
    moved = kept_deltas(darex(after, before, p=0.5, q=0.7, seed=0), before)["fc1.weight"]
    whole = after["fc1.weight"] - before["fc1.weight"]
    kept = moved != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(moved[kept], whole[kept] / 0.7)


def test_dropping_nothing_gives_the_finetuned_model():
    after, before = pair()
    torch.testing.assert_close(darex(after, before, p=0.0), after)


def test_masks_differ_between_tensors_but_not_between_values_of_q():
    before = {name: torch.zeros(1000) for name in "ab"}
    after = {name: torch.ones(1000) for name in "ab"}
    results = [darex(after, before, p=0.5, q=q, seed=3) for q in ("dare", 0.6, {"a": 1.0})]
    masks = [{name: x != 0 for name, x in result.items()} for result in results]
    assert not torch.equal(masks[0]["a"], masks[0]["b"])
    for name in "ab":
        assert torch.equal(masks[0][name], masks[1][name])
        assert torch.equal(masks[0][name], masks[2][name])
    other = darex(after, before, p=0.5, seed=4)
    assert not torch.equal(other["a"], results[0]["b"])


def test_biases_take_the_q_of_their_weight_and_others_the_mean():
    after, before = pair()
    before["fc2.weight"], after["fc2.weight"] = torch.zeros(4, 4), torch.ones(4, 4)
    named = darex(after, before, p=0.5, q={"fc1": 0.5, "fc2.weight": 0.9}, seed=0)
    want = {"fc1.weight": 0.5, "fc1.bias": 0.5, "fc2.weight": 0.9, "norm.weight": 0.7}
    plain = darex(after, before, p=0.5, q=1.0, seed=0)
    for key, q in want.items():
        delta = plain[key] - before[key]
        torch.testing.assert_close(named[key] - before[key], delta / q, rtol=1e-4, atol=1e-5)


def test_result_is_differentiable_in_q():
    after, before = pair()
    q = torch.tensor(0.6, requires_grad=True)
    darex(after, before, p=0.5, q={"fc1": q}, seed=0)["fc1.weight"].sum().backward()
    assert q.grad.abs() > 0


def test_tied_tensors_are_pruned_alike():
    weight, other = torch.ones(100), torch.zeros(100)
    result = darex({"a": weight, "b": weight}, {"a": other, "b": other}, p=0.5, seed=0)
    assert torch.equal(result["a"], result["b"])


def test_magnitude_keeps_the_largest_of_the_tensor():
    delta = torch.tensor([[1.0, -5.0], [4.0, 0.5]])
    want = torch.tensor([[False, True], [True, False]])
    assert torch.equal(importance_mask(delta, p=0.5), want)


def test_wanda_weighs_by_the_input_and_compares_within_rows():
    delta = torch.tensor([[1.0, 5.0], [4.0, 0.5]])
    mask = importance_mask(delta, method="wanda", p=0.5, activations=torch.tensor([10.0, 1.0]))
    assert torch.equal(mask, torch.tensor([[True, False], [True, False]]))


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
def test_importance_keeps_the_asked_part_also_of_equal_entries(p):
    assert importance_mask(torch.ones(10, 10), p=p).sum() == round(100 * (1 - p))


def test_means_are_over_all_tokens_of_all_calls():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    first, second = torch.randn(5, 4), torch.randn(2, 7, 4)
    with ActivationMean(model) as activations:
        model(first)
        model(second)
    model(first)  # no longer counted
    tokens = torch.cat((first, second.flatten(0, 1)))
    torch.testing.assert_close(activations.means()["0"], tokens.mean(0))
    torch.testing.assert_close(activations.norms()["0"], tokens.square().mean(0).sqrt())
    torch.testing.assert_close(activations.means()["2"], model[:2](tokens).mean(0).detach())


def test_change_of_hidden_states_and_of_the_largest_logits():
    a, b = torch.randn(3, 10), torch.randn(3, 10)
    torch.testing.assert_close(output_change(a, b, topk=None), (a - b).abs().mean())
    top = a.argsort(descending=True)[:, :4]
    want = (a.gather(1, top) - b.gather(1, top)).square().mean()
    torch.testing.assert_close(output_change(a, b, topk=4), want)


def test_bad_input_names_the_argument():
    after, before = pair()
    x = torch.ones(2, 3)
    for exception, name, call in [
        (ValueError, "p must", lambda: drop_delta(x, 1.0)),
        (ValueError, "p must", lambda: drop_delta(x, -0.1)),
        (ValueError, "q must", lambda: drop_delta(x, 0.5, q=0.0)),
        (ValueError, "q must", lambda: drop_delta(x, 0.5, q=torch.tensor(-1.0))),
        (TypeError, "delta", lambda: drop_delta(torch.ones(2, dtype=torch.long), 0.5)),
        (
            ValueError,
            "seed and generator",
            lambda: drop_delta(x, 0.5, seed=1, generator=torch.Generator()),
        ),
        (ValueError, "p must", lambda: darex(after, before, p=1.0)),
        (ValueError, "q must", lambda: darex(after, before, q="best")),
        (ValueError, "q must be above 0", lambda: darex(after, before, q=-1.0)),
        (ValueError, r"q\['fc1.weight'\]", lambda: darex(after, before, q={"fc1": 0.0})),
        (ValueError, "q must name.*fc9", lambda: darex(after, before, q={"fc1": 0.5, "fc9": 0.5})),
        (ValueError, "q must name", lambda: darex(after, before, q={})),
        (ValueError, "same keys", lambda: darex({**after, "new": x}, before)),
        (ValueError, "method", lambda: importance_mask(x, method="random", p=0.5)),
        (ValueError, "activations", lambda: importance_mask(x, method="wanda", p=0.5)),
        (ValueError, "activations", lambda: importance_mask(x, p=0.5, activations=x[0])),
        (
            ValueError,
            r"activations must have shape \[n\]",
            lambda: importance_mask(x, method="wanda", p=0.5, activations=torch.ones(2)),
        ),
        (ValueError, "b must", lambda: output_change(x, torch.ones(2, 4))),
        (ValueError, "topk", lambda: output_change(x, x)),
        (ValueError, "target", lambda: ActivationMean(nn.ReLU())),
        (TypeError, "model", lambda: ActivationMean("model")),
    ]:
        with pytest.raises(exception, match=name):
            call()


def test_q_below_that_of_dare_warns_and_others_do_not():
    after, before = pair()
    with pytest.warns(UserWarning, match="below 1 - p"):
        drop_delta(torch.ones(3), 0.5, q=0.4, seed=0)
    with pytest.warns(UserWarning, match="below 1 - p"):
        darex(after, before, p=0.5, q=0.4, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drop_delta(torch.ones(3), 0.99, q=0.01, seed=0)
        darex(after, before, q=0.01, seed=0)
