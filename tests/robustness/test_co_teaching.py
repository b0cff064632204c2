"""Small-loss selection and the schedule of the forget rate."""

import pytest
import torch

from regularizers.robustness import forget_rate_schedule, small_loss_select


def test_the_smallest_losses_are_selected():
    assert small_loss_select(torch.tensor([3.0, 1.0, 2.0, 0.0]), 0.5).tolist() == [3, 1]


@pytest.mark.parametrize(
    ("rate", "count", "kept"),
    [(0.8, 10, 2), (0.9, 10, 1), (0.7, 10, 3), (0.25, 10, 7), (0.0, 3, 3)],
)
def test_the_count_is_that_of_real_numbers(rate, count, kept):
    assert len(small_loss_select(torch.rand(count), rate)) == kept


def test_equal_losses_go_by_index_and_nan_goes_last():
    losses = torch.tensor([1.0, float("nan"), 0.5, 1.0])
    assert small_loss_select(losses, 0.25).tolist() == [2, 0, 3]


def test_the_ramp_reaches_its_end_in_its_last_epoch():
    rates = [forget_rate_schedule(epoch, 0.2, 5) for epoch in range(7)]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.2, 0.2])


def test_short_ramps():
    assert forget_rate_schedule(0, 0.3, 0) == 0.3
    assert [forget_rate_schedule(epoch, 0.3, 1) for epoch in range(2)] == [0.0, 0.3]


@pytest.mark.parametrize(
    ("exception", "name", "call"),
    [
        (TypeError, "losses must", lambda: small_loss_select([1.0], 0.1)),
        (ValueError, "losses must", lambda: small_loss_select(torch.rand(2, 2), 0.1)),
        (ValueError, "losses must", lambda: small_loss_select(torch.rand(2), 0.6)),
        (ValueError, "losses must", lambda: small_loss_select(torch.rand(0), 0.0)),
        (ValueError, "forget_rate must", lambda: small_loss_select(torch.rand(4), 1.0)),
        (ValueError, "forget_rate must", lambda: small_loss_select(torch.rand(4), -0.1)),
        (ValueError, "epoch must", lambda: forget_rate_schedule(-1)),
        (ValueError, "forget_rate must", lambda: forget_rate_schedule(0, 1.0)),
        (ValueError, "n_gradual must", lambda: forget_rate_schedule(0, 0.2, -1)),
        (TypeError, "epoch must", lambda: forget_rate_schedule(0.5)),
    ],
)
def test_bad_input_names_the_argument(exception, name, call):
    with pytest.raises(exception, match=name):
        call()
