"""Meters of collapse: what they are for a collapsed encoder, and for one that is not."""

import pytest
import torch

from regularizers.representation import collapse_metrics


def test_a_constant_encoder_scores_zero():
    z = torch.randn(1, 5, 8).expand(30, 5, 8)
    found = collapse_metrics(z)
    assert found["intra_feature_variance"] == 0
    assert found["euclidean"] == 0
    assert found["kl"] == 0


def test_one_constant_number_scores_zero_throughout():
    assert all(value == 0 for value in collapse_metrics(torch.full((4, 3, 2), 0.5)).values())


def test_variances_are_those_of_the_formulas():
    z = torch.randn(40, 5, 8, dtype=torch.float64)
    found = collapse_metrics(z)
    torch.testing.assert_close(found["intra_feature_variance"], z.var(0, correction=0).mean())
    torch.testing.assert_close(found["inter_feature_variance"], z.mean(1).var(correction=0))


def test_distance_is_that_of_different_samples():
    z = torch.tensor([0.0, 3.0]).view(2, 1, 1).expand(2, 4, 4)
    assert collapse_metrics(z, num_pairs=50)["euclidean"] == 12.0


def test_divergence_sees_a_shift_and_a_scale():
    base = torch.randn(20, 10, 10)
    alike = collapse_metrics(base, seed=0)["kl"]
    shifted = collapse_metrics(base + torch.arange(20.0).view(-1, 1, 1), seed=0)["kl"]
    scaled = collapse_metrics(base * torch.arange(1.0, 21).view(-1, 1, 1), seed=0)["kl"]
    assert 0 <= alike < 0.5
    assert shifted > alike + 0.5
    assert scaled > alike + 0.5


def test_divergence_agrees_with_two_normal_distributions():
    # KL(N(0, 1) | N(1, 1)) = 1/2; the kernel widens both a little, the two orders are equal.
    z = torch.randn(2, 100, 200, dtype=torch.float64)
    z[1] += 1
    found = collapse_metrics(z, num_pairs=8)["kl"]
    torch.testing.assert_close(found, torch.tensor(0.5).double(), rtol=0.1, atol=0)


def test_pairs_are_a_function_of_the_seed():
    z = torch.randn(50, 3, 4)
    assert collapse_metrics(z, seed=1) == collapse_metrics(z, seed=1)
    assert collapse_metrics(z, seed=1)["euclidean"] != collapse_metrics(z, seed=2)["euclidean"]


def test_bad_input_names_the_argument():
    for exception, name, call in [
        (ValueError, "z must", lambda: collapse_metrics(torch.ones(1, 2, 3))),
        (ValueError, "z must", lambda: collapse_metrics(torch.ones(4, 2))),
        (TypeError, "z must", lambda: collapse_metrics(torch.ones(4, 2, 3).int())),
        (ValueError, "num_pairs must", lambda: collapse_metrics(torch.ones(4, 2, 3), num_pairs=0)),
    ]:
        with pytest.raises(exception, match=name):
            call()
