"""Views of items: information between features, masks, and the augmenter of paper 72."""

import math

import pytest
import torch
from scipy.stats import chisquare
from sklearn.metrics import mutual_info_score
from torch import nn

from regularizers.representation import (
    ItemAugmenter,
    batch_contrastive_loss,
    correlated_feature_mask,
    feature_mutual_information,
    random_feature_mask,
)
from tests.harness import MethodContract


def _features(n=4000):
    """A feature, its copy under other names, an independent one and a coarser one."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(4, (n,), generator=generator)
    independent = torch.randint(5, (n,), generator=generator)
    return torch.stack([first, 3 - first, independent, first // 2], 1), [4, 4, 5, 2]


def test_information_is_that_of_scikit_learn():
    features, sizes = _features(300)
    information = feature_mutual_information(features, sizes)
    for i in range(4):
        for j in range(4):
            expected = mutual_info_score(features[:, i], features[:, j])
            assert information[i, j].item() == pytest.approx(expected, abs=1e-12)


def test_copies_share_their_entropy_and_independent_features_nothing():
    information = feature_mutual_information(*_features())
    assert information[0, 1].item() == pytest.approx(math.log(4), abs=1e-3)
    assert information[0, 2] < 0.005
    assert information[0, 3].item() == pytest.approx(math.log(2), abs=1e-3)


def test_information_is_symmetric_with_entropies_on_the_diagonal():
    features, sizes = _features(500)
    information = feature_mutual_information(features, sizes)
    assert torch.equal(information, information.T)
    for k, size in enumerate(sizes):
        p = torch.bincount(features[:, k], minlength=size) / 500.0
        assert information[k, k].item() == pytest.approx(-torch.xlogy(p, p).sum().item(), abs=1e-6)


def test_one_value_with_padding_is_one_value():
    features, sizes = _features(200)
    padded = torch.stack([torch.full_like(features, -1), features], 2)
    torch.testing.assert_close(
        feature_mutual_information(padded, sizes), feature_mutual_information(features, sizes)
    )


def test_an_item_of_several_values_counts_as_each_of_them_in_part():
    # One item has the values 0 and 1; as two items, everything twice, each has one of them.
    several = torch.tensor([[[0, 1], [0, -1]], [[1, -1], [1, -1]]])
    single = torch.tensor([[0, 0], [1, 0], [1, 1], [1, 1]])
    torch.testing.assert_close(
        feature_mutual_information(several, [2, 2]), feature_mutual_information(single, [2, 2])
    )


def test_items_without_a_value_are_left_out_of_its_pairs():
    features, sizes = _features(200)
    missing = features[:, :, None].clone()
    missing[100:, 0] = -1
    information = feature_mutual_information(missing, sizes)
    known = feature_mutual_information(features[:100], sizes)
    torch.testing.assert_close(information[0], known[0])
    torch.testing.assert_close(information[0, 0], known[0, 0])


def test_a_feature_that_no_item_has_tells_nothing():
    features = torch.tensor([[[0], [-1]], [[1], [-1]]])
    expected = torch.tensor([[math.log(2), 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(feature_mutual_information(features, [2, 3]), expected)


def test_large_vocabularies_need_no_table_of_all_pairs():
    features = torch.stack([torch.arange(50), torch.arange(50)], 1) * 10**8
    information = feature_mutual_information(features, [10**10, 10**10])
    torch.testing.assert_close(information, torch.full((2, 2), math.log(50)).double())


def _grouped(count=6):
    """Features in pairs that know all of each other and little of the rest."""
    generator = torch.Generator().manual_seed(1)
    noise = 0.1 * torch.rand(count, count, generator=generator)
    same = torch.arange(count)[:, None] // 2 == torch.arange(count) // 2
    return torch.where(same, 1.0, noise + noise.T)


def test_features_are_masked_with_those_that_know_them():
    masks = correlated_feature_mask(_grouped(), num_masked=1, size=100)
    assert torch.equal(masks[:, 0::2], masks[:, 1::2])
    assert (masks.sum(1) == 2).all()


def test_by_default_half_the_features_are_masked_with_the_seed():
    assert correlated_feature_mask(_grouped(6)).sum() == 4
    assert random_feature_mask(7).sum() == 3


def test_each_view_keeps_a_feature():
    assert correlated_feature_mask(torch.ones(2, 2)).sum() == 1
    assert correlated_feature_mask(_grouped(4), num_masked=3).sum() == 3


def test_seeds_are_uniform_over_features():
    # Each feature's only neighbour is the next, so a pair of masked features tells the seed.
    mi = torch.eye(6).roll(1, dims=1)
    generator = torch.Generator().manual_seed(0)
    masks = correlated_feature_mask(mi, num_masked=1, size=10_000, generator=generator)
    seeds = masks & masks.roll(-1, dims=1)
    assert (seeds.sum(1) == 1).all()
    assert chisquare(seeds.sum(0)).pvalue > 0.001


def test_the_diagonal_of_the_information_is_not_looked_at():
    mi = _grouped()
    generator = lambda: torch.Generator().manual_seed(4)
    expected = correlated_feature_mask(mi, size=20, generator=generator())
    mi.fill_diagonal_(-9.0)
    assert torch.equal(correlated_feature_mask(mi, size=20, generator=generator()), expected)


def test_random_masks_treat_features_alike():
    generator = torch.Generator().manual_seed(0)
    masks = random_feature_mask(5, num_masked=2, size=10_000, generator=generator)
    assert (masks.sum(1) == 2).all()
    codes = (masks * 2 ** torch.arange(5)).sum(1)
    counts = torch.unique(codes, return_counts=True)[1]
    assert len(counts) == 10
    assert chisquare(counts).pvalue > 0.001


class TestItemAugmenter(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        mi = _grouped(4)
        return ItemAugmenter(4, 3, mi=mi, per_row=True).to(dtype)

    def call(self, module, dtype):
        embedded = torch.linspace(-1, 1, 8 * 4 * 2 * 3, dtype=dtype).reshape(8, 4, 2, 3)
        return torch.cat(module(embedded))

    def inert(self, module):
        embedded = torch.randn(8, 4, 3)
        return torch.stack(module(embedded)), torch.stack([embedded, embedded])

    def bad_inputs(self):
        build = ItemAugmenter
        plain = build(4, 3, mask="rfm")
        valid = torch.ones(2, 4, 5, dtype=torch.bool)
        several = torch.ones(2, 4, 5, 3)
        return [
            (ValueError, "num_features must", lambda: build(1, 3, mask="rfm")),
            (ValueError, "dim must", lambda: build(4, 0, mask="rfm")),
            (ValueError, "mask must", lambda: build(4, 3, mask="none")),
            (ValueError, "mi must", lambda: build(4, 3)),
            (ValueError, "mi must", lambda: build(4, 3, mi=torch.ones(3, 3))),
            (ValueError, "value_dropout must", lambda: build(4, 3, mask="rfm", value_dropout=1.0)),
            (ValueError, "num_masked must", lambda: build(4, 3, mask="rfm", num_masked=4)),
            (ValueError, "embedded must", lambda: plain(torch.ones(2, 3, 3))),
            (TypeError, "embedded must", lambda: plain(torch.ones(2, 4, 3).double())),
            (ValueError, "valid_values must", lambda: plain(torch.ones(2, 4, 3), valid)),
            (TypeError, "valid_values must", lambda: plain(several, valid.long())),
            (ValueError, "valid_values must", lambda: plain(several, valid[:1])),
        ]


def test_views_are_complementary():
    augmenter = ItemAugmenter(6, 4, mi=_grouped())
    embedded = torch.randn(8, 6, 4)
    first, second = augmenter(embedded)
    shown_first, shown_second = ((view == embedded).all(-1) for view in (first, second))
    assert torch.equal(shown_first, ~shown_second)
    hidden = augmenter.default.expand_as(first)
    torch.testing.assert_close(first[~shown_first], hidden[~shown_first])
    torch.testing.assert_close(second[shown_first], hidden[shown_first])


@pytest.mark.parametrize("mask", ["cfm", "rfm"])
def test_a_batch_has_one_mask_unless_each_row_gets_its_own(mask):
    embedded = torch.randn(40, 6, 4)
    for per_row in (False, True):
        augmenter = ItemAugmenter(6, 4, mi=_grouped(), mask=mask, per_row=per_row)
        shown = (augmenter(embedded)[0] == embedded).all(-1)
        assert (len(shown.unique(dim=0)) > 1) == per_row


def _shown(augmenter, embedded, valid=None, generator=None):
    """What the two views show between them: every feature once."""
    first, second = augmenter(embedded, valid, generator)
    return torch.where((first == augmenter.default).all(-1, keepdim=True), second, first)


def test_survivors_of_several_values_are_averaged():
    augmenter = ItemAugmenter(2, 1, mask="rfm", value_dropout=0.5)
    embedded = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 1, 4, 1).expand(2000, 2, 4, 1)
    shown = _shown(augmenter, embedded)
    subsets = [[v for k, v in enumerate([1, 2, 4, 8]) if code >> k & 1] for code in range(1, 16)]
    means = torch.tensor([sum(subset) / len(subset) for subset in subsets])
    known = (shown - means).abs().amin(-1, keepdim=True) < 1e-5
    empty = shown == augmenter.default.view(1, 2, 1)
    assert (known | empty).all()
    # Each of the 16 subsets is equally likely; 4000 draws, five standard deviations.
    assert abs(empty.float().mean().item() - 1 / 16) < 5 * (1 / 16 * 15 / 16 / 4000) ** 0.5


def test_a_single_value_is_never_dropped_and_padding_never_counts():
    augmenter = ItemAugmenter(2, 1, mask="rfm", value_dropout=0.9)
    embedded = torch.tensor([3.0, 100.0]).view(1, 1, 2, 1).expand(50, 2, 2, 1)
    valid = torch.tensor([True, False]).expand(50, 2, 2)
    assert torch.equal(_shown(augmenter, embedded, valid), torch.full((50, 2, 1), 3.0))


def test_without_dropout_several_values_are_plainly_averaged():
    augmenter = ItemAugmenter(3, 2, mask="rfm", value_dropout=0.0)
    embedded = torch.randn(5, 3, 4, 2)
    torch.testing.assert_close(_shown(augmenter, embedded), embedded.mean(2))
    torch.testing.assert_close(augmenter.plain(embedded), embedded.mean(2))


def test_a_feature_without_values_shows_its_default():
    augmenter = ItemAugmenter(2, 3, mask="rfm").eval()
    valid = torch.tensor([[True, True], [False, False]]).expand(4, 2, 2)
    embedded = torch.randn(4, 2, 2, 3)
    view, _ = augmenter(embedded, valid)
    torch.testing.assert_close(view[:, 0], embedded[:, 0].mean(1))
    torch.testing.assert_close(view[:, 1], augmenter.default[1].expand(4, 3))


def test_padding_that_is_not_a_number_does_no_harm():
    augmenter = ItemAugmenter(2, 3, mask="rfm")
    embedded = torch.randn(4, 2, 2, 3)
    embedded[:, :, 1] = math.nan
    valid = torch.tensor([True, False]).expand(4, 2, 2)
    assert all(view.isfinite().all() for view in augmenter(embedded, valid))


def test_equal_generators_give_equal_views():
    augmenter = ItemAugmenter(6, 4, mi=_grouped())
    embedded = torch.randn(8, 6, 3, 4)
    state = torch.get_rng_state()
    views = [augmenter(embedded, None, torch.Generator().manual_seed(3)) for _ in range(2)]
    torch.testing.assert_close(views[0], views[1], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_gradient_of_the_contrast_reaches_the_shared_tables():
    table = nn.Embedding(30, 4)
    augmenter = ItemAugmenter(6, 4, mask="rfm")
    tower = nn.Sequential(nn.Flatten(), nn.Linear(24, 8))
    first, second = augmenter(table(torch.randint(30, (16, 6))))
    batch_contrastive_loss(tower(first), tower(second)).backward()
    for parameter in (table.weight, augmenter.default, tower[1].weight):
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("exception", "name", "call"),
    [
        (TypeError, "features must", lambda: feature_mutual_information(torch.ones(3, 2), [2, 2])),
        (ValueError, "features must", lambda: _information([[0], [1]], [2])),
        (ValueError, "features must", lambda: _information([[0, 2]], [2, 2])),
        (ValueError, "features must", lambda: _information([[0, -1]], [2, 2])),
        (ValueError, "features must", lambda: _information([[[0], [-2]]], [2, 2])),
        (ValueError, "cardinalities must", lambda: _information([[0, 1]], [2])),
        (ValueError, "mi must", lambda: correlated_feature_mask(torch.ones(2, 3))),
        (ValueError, "mi must", lambda: correlated_feature_mask(torch.ones(1, 1))),
        (ValueError, "mi must", lambda: correlated_feature_mask(torch.full((3, 3), math.nan))),
        (TypeError, "mi must", lambda: correlated_feature_mask(torch.ones(3, 3).long())),
        (
            ValueError,
            "num_masked must",
            lambda: correlated_feature_mask(torch.eye(3), num_masked=3),
        ),
        (ValueError, "num_masked must", lambda: random_feature_mask(3, num_masked=0)),
        (ValueError, "num_features must", lambda: random_feature_mask(1)),
    ],
)
def test_bad_input_names_the_argument(exception, name, call):
    with pytest.raises(exception, match=name):
        call()


def _information(values, sizes):
    return feature_mutual_information(torch.tensor(values), sizes)
