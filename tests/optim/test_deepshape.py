"""DeepShape: histogram specification of weights (paper 4)."""

import math

import pytest
import torch

from regularizers.optim import deepshape_, estimate_shape


def ratio(w):
    return (w.square().mean() / w.abs().mean() ** 2).item()


def gaussian(n=50_000):
    torch.manual_seed(0)
    return torch.randn(n)


BINS = pytest.mark.parametrize("bins", [None, 4096])
SIGNS = pytest.mark.parametrize("preserve_sign", [True, False])


@BINS
@SIGNS
def test_order_of_the_entries_is_kept(preserve_sign, bins):
    w = gaussian()
    new = deepshape_(w.clone(), shape=0.5, preserve_sign=preserve_sign, bins=bins)
    ranked, moved = (w.abs(), new.abs()) if preserve_sign else (w, new)
    by_rank = moved[ranked.argsort(stable=True)]
    assert (by_rank.diff() >= 0).all()


@BINS
@SIGNS
def test_gaussian_weights_become_laplacian_at_the_same_rms(preserve_sign, bins):
    w = gaussian()
    new = deepshape_(w.clone(), shape=1.0, preserve_sign=preserve_sign, bins=bins)
    # The largest quantiles are cut at half an entry: the ratio is a little below 2.
    assert ratio(new) == pytest.approx(2, abs=1e-3)
    assert new.square().mean().item() == pytest.approx(w.square().mean().item(), rel=1e-5)
    assert ((new - w).norm() / w.norm()).item() == pytest.approx(0.191, abs=0.005)


@pytest.mark.parametrize("shape", [0.5, 1.5, 2.0, 4.0])
def test_fitted_shape_is_the_target(shape):
    new = deepshape_(gaussian(), shape=shape)
    # The cut tails weigh most where they are heaviest.
    assert estimate_shape(new)[0].item() == pytest.approx(shape, rel=0.02)


def test_target_that_is_there_already_changes_little():
    w = gaussian()
    new = deepshape_(w.clone(), shape=2.0)
    assert (new - w).norm() < 0.02 * w.norm()


def test_signs_and_zeros_stay():
    w = gaussian()
    w[:1000] = 0
    new = deepshape_(w.clone(), shape=1.0)
    assert torch.equal(new.sign(), w.sign())


def test_without_signs_kept_entries_between_zero_and_the_median_flip():
    w = gaussian() + 0.5
    new = deepshape_(w.clone(), shape=2.0, preserve_sign=False)
    flipped = (w > 0) & (w < 0.45)
    assert (new[flipped] < 0).all()


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_strength_blends(strength):
    w = gaussian(100).double()
    full = deepshape_(w.clone(), shape=1.0)
    found = deepshape_(w.clone(), shape=1.0, strength=strength)
    torch.testing.assert_close(found, (1 - strength) * w + strength * full)


@SIGNS
def test_std_is_kept_on_request(preserve_sign):
    w = gaussian().double() + 0.3
    new = deepshape_(w.clone(), shape=1.0, keep="std", preserve_sign=preserve_sign)
    assert new.std().item() == pytest.approx(w.std().item(), rel=1e-10)
    if not preserve_sign:
        assert new.mean().item() == pytest.approx(w.mean().item(), rel=1e-10)


@SIGNS
def test_histogram_agrees_with_sorting(preserve_sign):
    w = gaussian()
    exact = deepshape_(w.clone(), shape=1.0, preserve_sign=preserve_sign)
    binned = deepshape_(w.clone(), shape=1.0, preserve_sign=preserve_sign, bins=4096)
    # Entries of one bin, 0.4 % wide, are placed by interpolation.
    assert (binned - exact).norm() < 0.004 * exact.norm()


def test_large_tensors_use_the_histogram():
    torch.manual_seed(0)
    w = torch.randn(2**16 + 1)
    new = deepshape_(w.clone(), shape=1.0)
    assert torch.equal(new, deepshape_(w.clone(), shape=1.0, bins=4096))


def test_writes_in_place_whatever_layout_and_type():
    w = gaussian(60).reshape(6, 10)
    expected = deepshape_(w.clone(), shape=1.0)
    transposed = w.t().contiguous().t()
    assert deepshape_(transposed, shape=1.0) is transposed
    torch.testing.assert_close(transposed, expected)
    parameter = torch.nn.Parameter(w.bfloat16())
    assert deepshape_(parameter, shape=1.0).dtype == torch.bfloat16
    assert parameter.requires_grad
    single = torch.tensor([-3.0])
    torch.testing.assert_close(deepshape_(single, shape=1.0), torch.tensor([-3.0]))


def test_empty_and_zero_tensors_are_skipped_with_a_warning():
    for w in (torch.zeros(4), torch.ones(0)):
        with pytest.warns(UserWarning, match="skipped"):
            assert deepshape_(w, shape=1.0) is w
        assert not w.any()


def test_bad_input_names_the_argument():
    w = torch.ones(3)
    for exception, name, call in (
        (TypeError, "w must", lambda: deepshape_([1.0], shape=1.0)),
        (TypeError, "w must", lambda: deepshape_(torch.ones(3, dtype=torch.int32), shape=1.0)),
        (ValueError, "w must be finite", lambda: deepshape_(w * math.inf, shape=1.0)),
        (ValueError, "shape must", lambda: deepshape_(w, shape=0.0)),
        (ValueError, "shape must", lambda: deepshape_(w, shape=10.5)),
        (ValueError, "strength must", lambda: deepshape_(w, shape=1.0, strength=1.5)),
        (ValueError, "keep must", lambda: deepshape_(w, shape=1.0, keep="max")),
        (ValueError, "bins must", lambda: deepshape_(w, shape=1.0, bins=1)),
    ):
        with pytest.raises(exception, match=name):
            call()
    assert torch.equal(w, torch.ones(3))
