"""Reductions over the entries that count."""

import torch

from regularizers._shared.entries import reduce_entries


def test_mean_sum_and_none_are_of_the_valid_entries():
    values = torch.tensor([[1.0, 2.0], [3.0, torch.nan]])
    valid = torch.tensor([[True, False], [True, False]])
    assert reduce_entries(values, "mean", valid=valid) == 2
    assert reduce_entries(values, "sum", valid=valid) == 4
    assert torch.equal(
        reduce_entries(values, "none", valid=valid), torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    )


def test_a_rule_for_rows_serves_their_entries():
    values = torch.tensor([[1.0, 2.0], [3.0, 9.0]])
    assert reduce_entries(values, "mean", valid=torch.tensor([[True], [False]])) == 1.5


def test_without_a_rule_all_entries_count():
    values = torch.randn(3, 4)
    assert torch.equal(reduce_entries(values, "mean"), values.sum() / 12)
    assert reduce_entries(values, "none") is values


def test_nothing_valid_is_zero_with_a_live_graph():
    values = torch.ones(3, requires_grad=True)
    mean = reduce_entries(values, "mean", valid=torch.zeros(3, dtype=torch.bool))
    mean.backward()
    assert mean == 0
    assert (values.grad == 0).all()
