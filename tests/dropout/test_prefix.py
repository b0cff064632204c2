"""Laws of the kept length, and the prefix mask."""

import copy
import math

import pytest
import torch
from torch import nn

from regularizers.dropout.prefix import PrefixDistribution, prefix_mask

NAN = float("nan")


def test_gaussian_law_has_no_factor_one_half():
    law = PrefixDistribution.gaussian(4, mean=0.0, std=2.0)
    expected = torch.tensor([0.613038, 0.289579, 0.082966, 0.014417]).double()
    torch.testing.assert_close(law.probs, expected, atol=1e-6, rtol=0)


def test_keep_probabilities_are_reversed_sums_and_begin_with_exactly_one():
    kept = PrefixDistribution.gaussian(4, mean=0.0, std=2.0).keep_probability()
    assert kept[0].item() == 1.0
    expected = torch.tensor([1, 0.386962, 0.097383, 0.014417]).double()
    torch.testing.assert_close(kept, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("std", "mean", "at_least", "probability"),
    [(10.0, 5.9693, 10, 0.18943), (100.0, 56.738, 100, 0.16029)],
)
def test_gaussian_laws_of_the_paper(std, mean, at_least, probability):
    law = PrefixDistribution.gaussian(512, std=std)
    assert law.mean().item() == pytest.approx(mean, abs=1e-3)
    assert law.keep_probability()[at_least - 1].item() == pytest.approx(probability, abs=1e-5)


def test_gaussian_law_of_std_10_begins_with_the_paper_s_figures():
    law = PrefixDistribution.gaussian(512, std=10.0)
    assert law.probs[0].item() == pytest.approx(0.118395, abs=1e-6)
    assert (law.probs.cumsum(0) < 0.5).sum().item() + 1 == 5  # the median


def test_gaussian_law_far_from_its_mean_is_still_a_law():
    law = PrefixDistribution.gaussian(4, mean=1e6, std=1.0)
    assert torch.equal(law.probs, torch.tensor([0, 0, 0, 1]).double())


def test_geometric_law_falls_by_q():
    law = PrefixDistribution.geometric(6, 0.3)
    torch.testing.assert_close(law.probs[1:] / law.probs[:-1], torch.full((5,), 0.3).double())
    uniform = PrefixDistribution.geometric(6, 1.0).probs
    torch.testing.assert_close(uniform, torch.full((6,), 1 / 6).double())


def test_uniform_law_is_zero_below_its_least_length():
    probs = PrefixDistribution.uniform(3, 5).probs
    torch.testing.assert_close(probs, torch.tensor([0, 0, 1, 1, 1]).double() / 3)


def test_padding_raises_the_probability_of_all_tokens():
    law = PrefixDistribution.padded_uniform(256, 224, 32)
    assert law.probs[-1].item() == pytest.approx(225 / 449)
    assert law.mean().item() == pytest.approx(199.875, abs=1e-3)
    assert law.keep_probability()[199].item() == pytest.approx(0.625835, abs=1e-6)


def test_without_padding_the_padded_law_is_uniform():
    padded, uniform = PrefixDistribution.padded_uniform(9, 0, 4), PrefixDistribution.uniform(4, 9)
    torch.testing.assert_close(padded.probs, uniform.probs)


def test_fixed_law_always_gives_k():
    assert PrefixDistribution.fixed(3).num_features == 3
    law = PrefixDistribution.fixed(3, 8)
    assert set(law.sample((1000,)).tolist()) == {3}


@pytest.mark.parametrize(
    "law",
    [
        PrefixDistribution.gaussian(20, std=5.0),
        PrefixDistribution.uniform(2, 20),
        PrefixDistribution.padded_uniform(12, 10, 3),
    ],
    ids=["gaussian", "uniform", "padded"],
)
def test_draws_follow_the_law(law):
    draws = 100_000
    counts = torch.bincount(law.sample((draws,), seed=4) - 1, minlength=law.num_features).double()
    possible = law.probs > 0
    assert counts[~possible].sum() == 0
    expected = draws * law.probs[possible]
    squares = ((counts[possible] - expected) ** 2 / expected)[expected > 5]
    freedom = len(squares) - 1
    # Four standard deviations of a chi-squared variable.
    assert squares.sum().item() < freedom + 4 * math.sqrt(2 * freedom)


def test_draw_i_is_the_least_index_whose_cumulative_probability_exceeds_word_i():
    # Seed 42, stream 0, element 0 is 0x9CEAF053 (docs/operators.md): u = 0.61296.
    law = PrefixDistribution(torch.tensor([0.6129, 0.0002, 0.3869]))
    assert law.sample(seed=42).item() == 2
    assert law.sample((3,), seed=42)[0].item() == 2


def test_u_of_zero_skips_lengths_of_probability_zero():
    law = PrefixDistribution.uniform(3, 4)
    found = torch.searchsorted(law._cumulative, torch.zeros(1).double(), right=True) + 1
    assert found.item() == 3


def test_shapes_share_draws_in_row_major_order():
    law = PrefixDistribution.uniform(1, 100)
    flat = law.sample((12,), seed=3)
    assert torch.equal(law.sample((3, 4), seed=3), flat.reshape(3, 4))
    assert law.sample((0,), seed=3).shape == (0,)
    assert law.sample(seed=3).shape == ()


def test_draws_come_from_the_default_generator_or_the_one_given():
    law = PrefixDistribution.uniform(1, 10**6)
    torch.manual_seed(1)
    first, second = law.sample(), law.sample()
    torch.manual_seed(1)
    assert torch.equal(law.sample(), first)
    assert not torch.equal(first, second)
    twice = [law.sample(generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*twice)


def test_a_law_moves_with_its_module_in_float64_and_stays_out_of_the_state_dict():
    module = nn.Module()
    module.law = PrefixDistribution.uniform(1, 3)
    module.half()
    assert module.law.probs.dtype == torch.float64
    assert module.state_dict() == {}
    assert torch.equal(
        copy.deepcopy(module).law.sample((9,), seed=1), module.law.sample((9,), seed=1)
    )


def test_a_law_compiles_and_draws_what_it_draws_in_eager_mode(fresh_dynamo):
    law = PrefixDistribution.uniform(1, 50)
    draw = torch.compile(
        lambda seed: law.sample((7,), seed=seed), fullgraph=True, backend="aot_eager"
    )
    for seed in (torch.tensor(1), torch.tensor(2)):
        assert torch.equal(draw(seed), law.sample((7,), seed=seed))


@pytest.mark.parametrize(
    ("exception", "name", "call"),
    [
        (TypeError, "probs must", lambda: PrefixDistribution([1.0])),
        (ValueError, "probs must", lambda: PrefixDistribution(torch.ones(0))),
        (ValueError, "probs must", lambda: PrefixDistribution(torch.ones(1, 1))),
        (ValueError, "probs must", lambda: PrefixDistribution(torch.tensor([1.5, -0.5]))),
        (ValueError, "probs must", lambda: PrefixDistribution(torch.tensor([NAN, 1.0]))),
        (ValueError, "sum to 1", lambda: PrefixDistribution(torch.tensor([0.5, 0.4]))),
        (ValueError, "std must", lambda: PrefixDistribution.gaussian(4, std=0.0)),
        (ValueError, "num_features must", lambda: PrefixDistribution.gaussian(0)),
        (ValueError, "q must", lambda: PrefixDistribution.geometric(4, 1.5)),
        (ValueError, "q must", lambda: PrefixDistribution.geometric(4, 0.0)),
        (ValueError, "k_min must", lambda: PrefixDistribution.uniform(0, 3)),
        (ValueError, "k_max must", lambda: PrefixDistribution.uniform(4, 3)),
        (ValueError, "num_pad must", lambda: PrefixDistribution.padded_uniform(4, -1)),
        (ValueError, "k_min must", lambda: PrefixDistribution.padded_uniform(4, 2, 5)),
        (ValueError, "k must", lambda: PrefixDistribution.fixed(0)),
        (ValueError, "num_features must", lambda: PrefixDistribution.fixed(3, 2)),
    ],
)
def test_bad_laws_are_refused(exception, name, call):
    with pytest.raises(exception, match=name):
        call()


def test_mask_keeps_the_prefix_unscaled_and_keeping_all_returns_the_input():
    x = torch.randn(2, 3, 5)
    masked = prefix_mask(x, 2)
    assert torch.equal(masked[..., :2], x[..., :2])
    assert torch.equal(masked[..., 2:], torch.zeros(2, 3, 3))
    assert prefix_mask(x, 5) is x


def test_mask_takes_any_dimension_and_a_length_for_each_leading_index():
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(prefix_mask(x, 1, dim=1), x * torch.tensor([1.0, 0, 0])[:, None])
    k = torch.tensor([1, 3])
    expected = torch.stack([prefix_mask(x[i], int(k[i]), dim=0) for i in range(2)])
    assert torch.equal(prefix_mask(x, k, dim=1), expected)
    rows = torch.tensor([[1, 2, 3], [4, 5, 1]])
    expected = torch.stack(
        [torch.stack([prefix_mask(x[i, j], int(rows[i, j])) for j in range(3)]) for i in range(2)]
    )
    assert torch.equal(prefix_mask(x, rows), expected)
    assert torch.equal(prefix_mask(x, rows[:1]), prefix_mask(x, rows[:1].expand(2, 3)))


def test_truncation_is_a_view_of_the_prefix():
    x = torch.randn(4, 6)
    for k in (2, torch.tensor(2)):
        cut = prefix_mask(x, k, truncate=True)
        assert torch.equal(cut, x[:, :2])
        assert cut.data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    "k", [2, torch.tensor(2), torch.tensor([2, 2])], ids=["int", "0-d", "rows"]
)
def test_a_dropped_nan_reaches_neither_result_nor_gradient(k):
    x = torch.tensor([[1.0, 2.0, NAN], [3.0, 4.0, NAN]], requires_grad=True)
    result = prefix_mask(x, k)
    assert torch.equal(result, torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 0.0]]))
    result.backward(torch.tensor([[1.0, 1.0, NAN]]).expand(2, 3))
    assert torch.equal(x.grad, torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_mask_keeps_the_dtype(dtype):
    assert prefix_mask(torch.ones(2, 3, dtype=dtype), torch.tensor([1, 2])).dtype == dtype


@pytest.mark.parametrize(
    ("exception", "name", "call"),
    [
        (TypeError, "x must", lambda x: prefix_mask([1.0], 1)),
        (ValueError, "dim must", lambda x: prefix_mask(x, 1, dim=2)),
        (ValueError, "k must", lambda x: prefix_mask(x, 0)),
        (ValueError, "k must", lambda x: prefix_mask(x, 4)),
        (TypeError, "k must", lambda x: prefix_mask(x, 1.0)),
        (TypeError, "k must", lambda x: prefix_mask(x, torch.tensor([1.0, 1.0]))),
        (ValueError, "k must", lambda x: prefix_mask(x, torch.tensor([1, 4]))),
        (ValueError, "k must", lambda x: prefix_mask(x, torch.tensor([1, 2, 3]))),
        (ValueError, "k must", lambda x: prefix_mask(x, torch.tensor([1, 1]), dim=0)),
        (ValueError, "k must", lambda x: prefix_mask(x, torch.tensor([1, 1]), truncate=True)),
    ],
)
def test_bad_masks_are_refused(exception, name, call):
    with pytest.raises(exception, match=name):
        call(torch.ones(2, 3))
