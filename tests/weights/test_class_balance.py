"""Class weights from counts (sheet of paper 57)."""

import pytest
import torch

from regularizers.weights import class_balanced_weights


def test_inverse_weights_of_known_counts():
    found = class_balanced_weights(torch.tensor([100, 50, 50]))
    torch.testing.assert_close(found, torch.tensor([2 / 3, 4 / 3, 4 / 3]))


@pytest.mark.parametrize("scheme", ["inverse", "effective"])
def test_equal_counts_weigh_one(scheme):
    found = class_balanced_weights(torch.full((5,), 30), scheme=scheme)
    torch.testing.assert_close(found, torch.ones(5))


def test_inverse_weights_give_every_class_the_same_total():
    counts = torch.tensor([3.0, 17.0, 80.0], dtype=torch.float64)
    found = class_balanced_weights(counts)
    torch.testing.assert_close(found * counts, torch.full((3,), 100 / 3, dtype=torch.float64))


def test_effective_weights_are_those_of_the_formula_with_mean_one():
    counts = torch.tensor([10, 100, 1000])
    expected = (1 - 0.99) / (1 - 0.99 ** counts.double())
    found = class_balanced_weights(counts, scheme="effective", beta=0.99)
    torch.testing.assert_close(found, (expected / expected.mean()).float())


def test_effective_weights_lie_between_equal_and_inverse():
    counts = torch.tensor([10.0, 1000.0], dtype=torch.float64)
    weights = lambda beta: class_balanced_weights(counts, scheme="effective", beta=beta)
    torch.testing.assert_close(weights(0.0), torch.ones(2, dtype=torch.float64))
    nearly = weights(1 - 1e-12)
    assert nearly[0] / nearly[1] == pytest.approx(100, rel=1e-3)


def test_weights_take_the_default_type_for_integers_and_keep_others():
    assert class_balanced_weights(torch.tensor([1, 2])).dtype == torch.float32
    assert class_balanced_weights(torch.tensor([1.0, 2.0]).double()).dtype == torch.float64


def test_bad_input_names_the_argument():
    counts = torch.tensor([1, 2])
    for exception, name, call in (
        (TypeError, "counts must", lambda: class_balanced_weights([1, 2])),
        (ValueError, "counts must", lambda: class_balanced_weights(torch.tensor([1, 0]))),
        (ValueError, "counts must", lambda: class_balanced_weights(torch.tensor([[1, 2]]))),
        (ValueError, "counts must", lambda: class_balanced_weights(torch.tensor([]))),
        (ValueError, "scheme must", lambda: class_balanced_weights(counts, scheme="root")),
        (ValueError, "beta must", lambda: class_balanced_weights(counts, beta=1.0)),
    ):
        with pytest.raises(exception, match=name):
            call()
