"""Attention entropy maximization and the attention head it is for (sheet of paper 123)."""

import math

import pytest
import torch
from torch.nn import functional as F

from regularizers.representation import (
    GatedAttentionMIL,
    aem_loss,
    attention_neg_entropy,
    attention_neg_entropy_from_probs,
)
from tests.harness import MethodContract


class TestGatedAttentionMIL(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return GatedAttentionMIL(6, 5, 3, heads=2).to(dtype)

    def call(self, module, dtype):
        bag = torch.linspace(0, 9, 2 * 7 * 6, dtype=torch.float64).sin().reshape(2, 7, 6)
        mask = torch.arange(7) < torch.tensor([[7], [4]])
        logits, attn_logits = module(bag.to(dtype), mask)
        entropy = attention_neg_entropy(attn_logits, mask=mask).to(dtype)
        return logits + entropy

    def bad_inputs(self):
        model, bag = GatedAttentionMIL(6, 5, 3), torch.ones(2, 7, 6)
        one_empty = torch.tensor([[True] * 7, [False] * 7])
        a, loss = torch.zeros(2, 1, 7), attention_neg_entropy
        logits, target = torch.zeros(2, 3), torch.tensor([0, 1])
        return [
            (ValueError, "heads must", lambda: GatedAttentionMIL(6, 5, 3, heads=0)),
            (TypeError, "hidden must", lambda: GatedAttentionMIL(6, 5.0, 3)),
            (ValueError, "bag must", lambda: model(bag[..., :5])),
            (ValueError, "bag must", lambda: model(bag[:, :0])),
            (TypeError, "bag must", lambda: model(bag.long())),
            (ValueError, "mask must leave", lambda: model(bag, one_empty)),
            (ValueError, "logits must", lambda: loss(a[..., :0])),
            (ValueError, "logits must", lambda: loss(torch.zeros(4))),
            (TypeError, "logits must", lambda: loss(a.long())),
            (ValueError, "mask must leave", lambda: loss(a, mask=one_empty)),
            (ValueError, "mask must have", lambda: loss(a, mask=one_empty[:, :6])),
            (TypeError, "mask must", lambda: loss(a, mask=one_empty.float())),
            (ValueError, "reduction must", lambda: loss(a, reduction="max")),
            (ValueError, "attn must lie", lambda: attention_neg_entropy_from_probs(a - 1)),
            (ValueError, "attn must lie", lambda: attention_neg_entropy_from_probs(a + 2)),
            (ValueError, "eps must", lambda: attention_neg_entropy_from_probs(a, eps=0.0)),
            (ValueError, "weight must", lambda: aem_loss(logits, a, target, weight=-0.1)),
            (ValueError, "attn_logits must", lambda: aem_loss(logits, a[:1], target)),
            (ValueError, "target must", lambda: aem_loss(logits, a, target[:1])),
            (ValueError, "instance", lambda: aem_loss(logits, a, target, instance_logits=a)),
        ]


def _rows(*rows):
    return torch.tensor([list(row) for row in rows], dtype=torch.float64)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [((0, 0, 0, 0), -math.log(4)), ((0, 0, math.log(2)), -1.0397207708), ((100, 0, 0, 0), 0.0)],
)
def test_known_values(logits, expected):
    found = attention_neg_entropy(_rows(logits)).item()
    assert found == pytest.approx(expected, abs=1e-30, rel=1e-10)


def test_value_lies_between_that_of_even_attention_and_zero():
    a = 5 * torch.randn(200, 1, 9, dtype=torch.float64)
    each = attention_neg_entropy(a, reduction="none")
    assert each.shape == (200,)
    assert each.min() >= -math.log(9)
    assert each.max() <= 0


def test_neither_a_shift_nor_the_order_of_instances_matters():
    a = torch.randn(3, 2, 7, dtype=torch.float64)
    expected = attention_neg_entropy(a)
    shift = torch.randn(3, 2, 1, dtype=torch.float64)
    torch.testing.assert_close(attention_neg_entropy(a + shift), expected)
    torch.testing.assert_close(attention_neg_entropy(a[..., torch.randperm(7)]), expected)


def test_reductions_are_over_bags_and_heads_are_averaged():
    a = torch.randn(3, 2, 7, dtype=torch.float64)
    each = attention_neg_entropy(a, reduction="none")
    torch.testing.assert_close(
        each, attention_neg_entropy(a.flatten(0, 1)[:, None], reduction="none").view(3, 2).mean(1)
    )
    torch.testing.assert_close(attention_neg_entropy(a, reduction="sum"), each.sum())
    torch.testing.assert_close(attention_neg_entropy(a), each.mean())


def test_identical_heads_are_worth_one():
    a = torch.randn(3, 1, 7, dtype=torch.float64)
    many = a.expand(3, 4, 7)
    torch.testing.assert_close(attention_neg_entropy(many), attention_neg_entropy(a))


def test_gradient_is_that_of_the_formula_and_adds_up_to_zero():
    a = torch.randn(1, 1, 7, dtype=torch.float64, requires_grad=True)
    value = attention_neg_entropy(a)
    value.backward()
    alpha = a.detach().softmax(-1)
    torch.testing.assert_close(a.grad, alpha * (alpha.log() - value.detach()))
    assert abs(a.grad.sum()) < 1e-15


def test_gradient_is_zero_at_even_attention():
    a = torch.full((2, 3, 5), 0.7, dtype=torch.float64, requires_grad=True)
    attention_neg_entropy(a).backward()
    assert a.grad.abs().max() < 1e-16


@pytest.mark.parametrize("padding", [0.0, 1e4, math.inf, math.nan])
def test_masked_bag_equals_the_bag_without_padding(padding):
    mask = torch.arange(9) < torch.tensor([[5], [9]])
    a = torch.randn(2, 3, 9, dtype=torch.float64)
    padded = a.where(mask[:, None], padding).requires_grad_()
    found = attention_neg_entropy(padded, mask=mask, reduction="none")
    for bag, count in enumerate((5, 9)):
        alone = attention_neg_entropy(a[bag, :, :count], reduction="none")
        torch.testing.assert_close(found[bag], alone, rtol=1e-14, atol=0)
    found.sum().backward()
    assert padded.grad.isfinite().all()
    assert (padded.grad[0, :, 5:] == 0).all()


@pytest.mark.parametrize("normalize", [False, True])
def test_one_instance_has_no_entropy_and_no_gradient(normalize):
    for a, mask in (
        (torch.randn(1, 2, 1), None),
        (torch.randn(1, 2, 4), torch.tensor([[False, True, False, False]])),
    ):
        a.requires_grad_()
        value = attention_neg_entropy(a, mask=mask, normalize=normalize)
        value.backward()
        assert value == 0
        assert (a.grad == 0).all()


def test_normalized_value_of_even_attention_is_minus_one_for_every_size():
    mask = torch.arange(9) < torch.tensor([[2], [5], [9]])
    a = torch.zeros(3, 2, 9, dtype=torch.float64)
    each = attention_neg_entropy(a, mask=mask, normalize=True, reduction="none")
    torch.testing.assert_close(each, -torch.ones(3, dtype=torch.float64))
    assert attention_neg_entropy(a, normalize=True).item() == pytest.approx(-1)


def test_logits_of_minus_infinity_are_instances_without_attention():
    a = torch.tensor([[0.0, 0.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    value = attention_neg_entropy(a)
    value.backward()
    assert value.item() == pytest.approx(-math.log(2))
    assert (a.grad == 0).all()


def test_nan_in_gives_nan_out():
    a = torch.zeros(1, 4)
    a[0, 1] = math.nan
    assert attention_neg_entropy(a).isnan()
    assert attention_neg_entropy_from_probs(a.sigmoid()).isnan()


def test_gradcheck_with_mask_and_normalization():
    a = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])
    call = lambda a: attention_neg_entropy(a, mask=mask, normalize=True)
    assert torch.autograd.gradcheck(call, a, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, a)


def test_half_types_are_added_up_in_float32():
    a = torch.randn(2, 1, 30_000).half()
    found = attention_neg_entropy(a)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), attention_neg_entropy(a.double()), rtol=1e-6, atol=0)


def test_probabilities_give_the_value_of_their_logits():
    a = torch.randn(3, 2, 7, dtype=torch.float64)
    torch.testing.assert_close(
        attention_neg_entropy_from_probs(a.softmax(-1)), attention_neg_entropy(a)
    )
    mask = torch.arange(7) < torch.tensor([[3], [5], [7]])
    weights = a.where(mask[:, None], -math.inf).softmax(-1).where(mask[:, None], math.nan)
    torch.testing.assert_close(
        attention_neg_entropy_from_probs(weights, mask=mask), attention_neg_entropy(a, mask=mask)
    )


def test_even_attention_over_many_instances_is_not_biased_by_eps():
    n = 100_000
    attn = torch.full((1, n), 1 / n, dtype=torch.float64)
    assert attention_neg_entropy_from_probs(attn).item() == pytest.approx(-math.log(n), rel=1e-12)
    with_eps_added = (attn * (attn + 1e-6).log()).sum().item()
    assert abs(with_eps_added + math.log(n)) > 0.05


def test_softmax_taken_for_logits_says_almost_nothing():
    a = 3 * torch.randn(1, 100, dtype=torch.float64)
    right, twice = attention_neg_entropy(a), attention_neg_entropy(a.softmax(-1))
    assert right > -math.log(100) + 1
    assert twice < -math.log(100) + 0.01


def test_weight_zero_gives_the_plain_loss_and_its_gradients():
    model, bags = GatedAttentionMIL(6, 5, 3).double(), torch.randn(4, 9, 6, dtype=torch.float64)
    target = torch.tensor([0, 2, 1, 1])
    logits, attn_logits = model(bags)
    found = aem_loss(logits, attn_logits, target, weight=0.0)
    plain = F.cross_entropy(logits, target)
    assert torch.equal(found, plain)
    parameters = [p for name, p in model.named_parameters()]
    have = torch.autograd.grad(found, parameters, retain_graph=True)
    want = torch.autograd.grad(plain, parameters)
    torch.testing.assert_close(have, want, rtol=0, atol=0)


def test_loss_is_cross_entropy_and_the_weighted_term():
    logits, a = torch.randn(4, 3), torch.randn(4, 2, 9)
    target = torch.tensor([0, 2, 1, 1])
    expected = F.cross_entropy(logits, target) + 0.3 * attention_neg_entropy(a)
    torch.testing.assert_close(aem_loss(logits, a, target, weight=0.3), expected)
    each = aem_loss(logits, a, target, weight=torch.tensor(0.3), reduction="none")
    torch.testing.assert_close(each.mean(), expected)


def test_head_of_two_streams_halves_bag_and_largest_instance():
    logits, a, target = torch.randn(2, 3), torch.randn(2, 1, 9), torch.tensor([0, 2])
    instances = torch.randn(2, 9, 3)
    mask = torch.arange(9) < torch.tensor([[5], [9]])
    largest = torch.stack([instances[0, :5].amax(0), instances[1].amax(0)])
    expected = 0.5 * F.cross_entropy(logits, target) + 0.5 * F.cross_entropy(largest, target)
    found = aem_loss(logits, a, target, weight=0.0, mask=mask, instance_logits=instances)
    torch.testing.assert_close(found, expected)


def test_a_schedule_of_the_weight_compiles_once(fresh_dynamo):
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(aem_loss, fullgraph=True, backend=record)
    logits, a, target = torch.randn(2, 3), torch.randn(2, 1, 9), torch.tensor([0, 2])
    for step in range(10):
        weight = torch.tensor(step / 10, dtype=torch.float64)
        torch.testing.assert_close(
            compiled(logits, a, target, weight=weight),
            aem_loss(logits, a, target, weight=step / 10),
        )
    assert len(graphs) == 1


def test_padding_changes_neither_output_of_the_model():
    model = GatedAttentionMIL(6, 5, 3, heads=2).double()
    bag = torch.randn(1, 4, 6, dtype=torch.float64)
    padded = torch.cat([bag, torch.full((1, 3, 6), math.nan, dtype=torch.float64)], 1)
    logits, attn_logits = model(padded, torch.arange(7)[None] < 4)
    expected, expected_attn = model(bag)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(attn_logits[..., :4], expected_attn)


def test_pooling_is_the_attention_that_the_model_shows():
    model = GatedAttentionMIL(6, 5, 3, heads=2, gated=False)
    bag = torch.randn(4, 9, 6)
    logits, attn_logits = model(bag)
    pooled = torch.einsum("bhn,bnd->bhd", attn_logits.softmax(-1), bag)
    torch.testing.assert_close(logits, model.head(pooled.flatten(1)))
    assert model.gate is None


@pytest.mark.slow
def test_term_spreads_attention_and_does_not_cost_accuracy():
    # Sheet: 80 bags of 60 instances, 8 of them weakly shifted in positive bags, 200
    # steps, means over 4 seeds.
    def bags(count, shift, generator):
        x = torch.randn(count, 60, 16, generator=generator)
        target = torch.arange(count) % 2
        x[target == 1, :8] += shift
        return x, target

    def train(weight, seed):
        generator = torch.Generator().manual_seed(seed)
        shift = 0.3 * torch.randn(16, generator=generator).sign()
        x, target = bags(80, shift, generator)
        torch.manual_seed(seed)
        model = GatedAttentionMIL(16, 32, 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(200):
            optimizer.zero_grad()
            aem_loss(*model(x), target, weight=weight).backward()
            optimizer.step()
        x, target = bags(400, shift, generator)
        with torch.no_grad():
            logits, attn_logits = model(x)
        accuracy = (logits.argmax(1) == target).double().mean().item()
        return accuracy, -attention_neg_entropy(attn_logits).item()

    plain, spread = (
        torch.tensor([train(weight, seed) for seed in range(4)]).mean(0) for weight in (0.0, 0.5)
    )
    assert spread[1] > plain[1] + 1.5
    assert spread[0] >= plain[0]
