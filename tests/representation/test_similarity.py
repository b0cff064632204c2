"""Meters of similarity scores, against scikit-learn."""

import math

import pytest
import torch
from sklearn.metrics import precision_recall_curve

from regularizers.representation import similarity_f1, similarity_ratio


def test_separable_scores_have_an_f1_of_one_and_a_threshold_between_the_classes():
    sim = torch.tensor([0.1, 0.9, 0.3, 0.8])
    label = torch.tensor([0, 1, 0, 1])
    found = similarity_f1(sim, label)
    assert (found.f1, found.precision, found.recall) == (1, 1, 1)
    assert torch.equal((sim >= found.threshold).long(), label)
    assert found.threshold == torch.tensor(0.8)


@pytest.mark.parametrize("digits", [1, 6])
def test_f1_is_the_best_of_scikit_learns_curve(digits):
    # One digit: many equal scores, which no threshold tells apart.
    generator = torch.Generator().manual_seed(0)
    label = torch.rand(200, generator=generator) < 0.3
    noise = torch.randn(200, generator=generator, dtype=torch.float64)
    sim = (label + noise).round(decimals=digits)
    precision, recall, thresholds = precision_recall_curve(label, sim)
    f1 = 2 * precision[:-1] * recall[:-1] / (precision[:-1] + recall[:-1]).clip(1e-300)
    best = f1.argmax()
    expected = [f1[best], precision[best], recall[best], thresholds[best]]
    torch.testing.assert_close(
        torch.stack(similarity_f1(sim, label)), torch.tensor(expected, dtype=torch.float64)
    )


def test_of_equal_f1_the_lowest_threshold_is_taken():
    # One of one: 2 / (1 + 2). Two of four: 4 / (4 + 2).
    found = similarity_f1(torch.tensor([0.9, 0.7, 0.5, 0.3]), torch.tensor([1, 0, 0, 1]))
    assert found.f1.item() == pytest.approx(2 / 3)
    assert found.threshold == torch.tensor(0.3)


def test_scores_beyond_one_stay_apart():
    found = similarity_f1(torch.tensor([30.0, 20.0, 10.0]), torch.tensor([True, False, False]))
    assert (found.f1, found.threshold) == (1, 30)


def test_nan_among_scores_comes_through():
    found = similarity_f1(torch.tensor([0.5, math.nan]), torch.tensor([1, 0]))
    assert all(x.isnan() for x in found)


def test_half_types_give_float32():
    assert similarity_f1(torch.ones(2).half(), torch.ones(2)).f1.dtype == torch.float32
    assert similarity_ratio(torch.ones(2).half(), torch.ones(2)).dtype == torch.float32


def test_ratio_is_that_of_the_means():
    ratio = similarity_ratio(torch.tensor([0.9, 0.7]), torch.tensor([-0.1, -0.3]), eps=0.0)
    torch.testing.assert_close(ratio, torch.tensor(4.0))
    assert similarity_ratio(torch.ones(1), torch.zeros(3)).item() == pytest.approx(1e8)


@pytest.mark.parametrize(
    ("exception", "name", "call"),
    [
        (TypeError, "sim must", lambda: similarity_f1(torch.ones(2).long(), torch.ones(2))),
        (ValueError, "sim must", lambda: similarity_f1(torch.ones(0), torch.ones(0))),
        (ValueError, "label must", lambda: similarity_f1(torch.ones(2), torch.ones(3))),
        (ValueError, "label must", lambda: similarity_f1(torch.ones(2), torch.zeros(2))),
        (ValueError, "label must", lambda: similarity_f1(torch.ones(2), torch.tensor([1, 2]))),
        (TypeError, "label must", lambda: similarity_f1(torch.ones(2), [1, 0])),
        (ValueError, "neg must", lambda: similarity_ratio(torch.ones(2), torch.ones(0))),
        (TypeError, "pos must", lambda: similarity_ratio(torch.ones(2).long(), torch.ones(2))),
        (ValueError, "eps must", lambda: similarity_ratio(torch.ones(2), torch.ones(2), eps=-1.0)),
    ],
)
def test_bad_input_names_the_argument(exception, name, call):
    with pytest.raises(exception, match=name):
        call()
