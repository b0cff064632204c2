"""drop_block: the operator contract, and facts of its masks, counts and memory layout."""

import pytest
import torch

from regularizers.ops import drop_block, philox_words
from regularizers.ops.drop_block import DROP_BLOCK, centre_ratio
from tests.harness import RandomOperatorContract, Sample


def _rate(value):
    return torch.tensor(value, dtype=torch.float64)


OPTIONS = {"p": 0.4, "block_size": 3, "seed": 12}
EXACT = {**OPTIONS, "gamma": "exact"}
SEPARATE = {**OPTIONS, "shared_channels": False}


class TestContract(RandomOperatorContract):
    bitwise_across_threads = True
    autocast_dtype = torch.float32  # dropout keeps its input's type under autocast
    scheduled = {"p": (0.0, 0.9)}

    def samples(self, dtype):
        x = torch.randn(3, 2, 5, 7, dtype=dtype)
        last = torch.randn(2, 3, 6, 5, dtype=dtype).to(memory_format=torch.channels_last)
        by_sample = {**OPTIONS, "normalize": "sample"}
        return [
            Sample("odd sizes", (x,), drop_block, OPTIONS),
            Sample("whole blocks", (x,), drop_block, EXACT),
            Sample("a mask a channel", (x,), drop_block, {**SEPARATE, "normalize": "sample"}),
            Sample("by sample", (x,), drop_block, by_sample),
            Sample("channels last", (last,), drop_block, EXACT),
            Sample("channels last, a mask a channel", (last,), drop_block, SEPARATE),
            Sample("transposed", (x.transpose(2, 3),), drop_block, OPTIONS),
            Sample("expanded", (x[:, :1].expand(3, 2, 5, 7),), drop_block, OPTIONS),
            Sample("every second", (x[:, :, ::2, ::3],), drop_block, OPTIONS),
            Sample("one pixel", (x[:1, :1, :1, :1],), drop_block, OPTIONS),
            Sample("a block larger than x", (x,), drop_block, {**OPTIONS, "block_size": 15}),
            Sample("single pixels", (x,), drop_block, {**OPTIONS, "block_size": 1}),
            Sample("p = 0", (x,), drop_block, {**OPTIONS, "p": 0.0}),
        ]

    def empty(self, dtype):
        shapes = ((0, 2, 4, 4), (2, 0, 4, 4), (2, 2, 0, 4))
        return [Sample(str(s), (torch.empty(s, dtype=dtype),), drop_block, OPTIONS) for s in shapes]

    def operator_calls(self):
        x = torch.randn(2, 3, 4, 5, requires_grad=True)
        last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
        options = (_rate(0.5), torch.tensor(1), 3, False, False, True)
        return [(DROP_BLOCK, (x, *options)), (DROP_BLOCK, (last, *options))]

    def bad_inputs(self):
        x = torch.ones(1, 1, 4, 6)
        return [
            (TypeError, "x must", lambda: drop_block([1.0], 0.1)),
            (TypeError, "x must", lambda: drop_block(x.long(), 0.1)),
            (ValueError, "x must", lambda: drop_block(x[0], 0.1)),
            (ValueError, "p must", lambda: drop_block(x, 1.0)),
            (ValueError, "p must", lambda: drop_block(x, -0.1)),
            (ValueError, "p must", lambda: drop_block(x, float("nan"))),
            (ValueError, "p must", lambda: drop_block(x, _rate(1.0))),
            (ValueError, "p must", lambda: drop_block(x, torch.tensor([0.5]))),
            (ValueError, "block_size must", lambda: drop_block(x, 0.1, 4)),
            (ValueError, "block_size must", lambda: drop_block(x, 0.1, 0)),
            (TypeError, "block_size must", lambda: drop_block(x, 0.1, 3.0)),
            (ValueError, "block_size must", lambda: drop_block(x, 0.1, 5, gamma="exact")),
            (ValueError, "gamma must", lambda: drop_block(x, 0.1, gamma="torchvision")),
            (ValueError, "normalize must", lambda: drop_block(x, 0.1, normalize="channel")),
            (TypeError, "seed", lambda: drop_block(x, 0.1, seed=1.5)),
            (TypeError, "generator", lambda: drop_block(x, 0.1, generator=3)),
        ]


def _expected_mask(shape, p, block_size, seed, *, exact=False, stream=0):
    """The mask pixel by pixel: no centre within block_size // 2 in both directions."""
    batch, _, height, width = shape
    words = philox_words(torch.tensor(seed), batch * height * width, stream=stream)
    threshold = round(p * centre_ratio(height, width, block_size, exact) * 2**32)
    reach, mask = block_size // 2, torch.ones(batch, height, width, dtype=torch.bool)
    inset = reach if exact else 0
    for i, y, x in (words.reshape(batch, height, width) < threshold).nonzero().tolist():
        if inset <= y < height - inset and inset <= x < width - inset:
            rows = slice(max(y - reach, 0), y + reach + 1)
            mask[i, rows, max(x - reach, 0) : x + reach + 1] = False
    return mask


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("block_size", [1, 3, 5, 7])
def test_a_pixel_is_dropped_iff_a_centre_lies_within_reach(block_size, exact):
    x = torch.ones(5, 2, 13, 70)
    gamma = "exact" if exact else "simple"
    kept = drop_block(x, 0.3, block_size, gamma=gamma, seed=8) != 0
    expected = _expected_mask(x.shape, 0.3, block_size, 8, exact=exact)
    assert not expected.all()
    assert torch.equal(kept, expected[:, None].expand_as(kept))


def test_streams_are_channels_where_masks_are_not_shared():
    x = torch.ones(3, 4, 9, 9)
    kept = drop_block(x, 0.3, 3, shared_channels=False, seed=8) != 0
    for channel in range(4):
        expected = _expected_mask(x.shape, 0.3, 3, 8, stream=channel)
        assert torch.equal(kept[:, channel], expected)


def test_channels_share_the_mask_by_default():
    kept = drop_block(torch.ones(6, 5, 20, 20), 0.3, 5, seed=1) != 0
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert not kept.all()


def test_mask_and_layout_do_not_depend_on_each_other():
    x = torch.randn(2, 5, 9, 11)
    for options in ({}, {"shared_channels": False}):
        expected = drop_block(x, 0.3, 3, seed=5, **options)
        last = drop_block(x.to(memory_format=torch.channels_last), 0.3, 3, seed=5, **options)
        assert torch.equal(last, expected)
        assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("normalize", ["batch", "sample"])
def test_a_constant_keeps_its_mean(normalize, shared):
    x = torch.full((7, 3, 20, 20), 2.5, dtype=torch.float64)
    options = {"normalize": normalize, "shared_channels": shared, "seed": 3}
    result = drop_block(x, 0.3, 5, **options)
    assert (result == 0).any()
    means = result.mean() if normalize == "batch" else result.mean((1, 2, 3))
    torch.testing.assert_close(means, torch.full_like(means, 2.5))


def test_a_sample_without_kept_pixels_is_zero_and_the_batch_stays_finite():
    x = torch.ones(20, 1, 3, 3)
    result = drop_block(x, 0.5, 3, gamma="exact", normalize="sample", seed=2)
    sums = result.sum((1, 2, 3))
    assert set(sums.tolist()) == {0.0, 9.0}


def test_without_any_kept_pixel_the_result_is_zero():
    x = torch.ones(1, 2, 3, 3)
    seed = next(s for s in range(50) if not _expected_mask(x.shape, 0.9, 3, s, exact=True).any())
    assert torch.equal(drop_block(x, 0.9, 3, gamma="exact", seed=seed), torch.zeros_like(x))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.15, 0.2])
def test_interior_drop_rate_is_that_of_the_formula(p):
    # Sheet of paper 57, fact 1: .04879, .09526, .13949, .18160.
    expected = 1 - (1 - p / 49) ** 49
    known = {0.05: 0.04879, 0.1: 0.09526, 0.15: 0.13949, 0.2: 0.18160}
    assert expected == pytest.approx(known[p], abs=1e-5)
    # Pixels 7 apart in both directions share no centre.
    kept = drop_block(torch.ones(60_000, 1, 13, 13), p, 7, seed=4)[:, 0, 6, 6] != 0
    dropped = 60_000 - kept.sum().item()
    assert abs(dropped - 60_000 * expected) < 4 * (60_000 * expected * (1 - expected)) ** 0.5


def test_blocks_of_one_pixel_are_independent_with_the_exact_rate():
    count = 40 * 100 * 100
    dropped = (drop_block(torch.ones(40, 1, 100, 100), 0.3, 1, seed=9) == 0).sum().item()
    assert abs(dropped - 0.3 * count) < 4 * (count * 0.3 * 0.7) ** 0.5


def test_exact_gamma_never_cuts_a_block():
    kept = drop_block(torch.ones(200, 1, 15, 15), 0.05, 7, gamma="exact", seed=6)[:, 0] != 0
    dropped = (~kept).flatten(1).sum(1)
    assert set(dropped.tolist()) - {0}
    assert dropped[dropped > 0].min() >= 49


def test_nan_under_a_block_leaks_neither_forward_nor_backward():
    keep = drop_block(torch.ones(2, 3, 9, 9), 0.3, 3, seed=3) != 0
    x = torch.where(keep, 1.0, float("nan")).requires_grad_()
    result = drop_block(x, 0.3, 3, seed=3)
    assert result.isfinite().all()
    result.backward(torch.where(keep, 1.0, float("nan")))
    assert torch.equal(x.grad, result.detach())


def test_the_backward_pass_stores_no_mask():
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, id):
        drop_block(x, 0.3, 3)
    assert saved == [1, 1]  # p and the seed
