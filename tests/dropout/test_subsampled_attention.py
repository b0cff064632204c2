"""Subsampled attention and its draws: the facts of the sheet of paper 89, bad input."""

import math

import pytest
import torch
from torch.nn import functional as F

import regularizers
from regularizers.dropout import jitter_permutation, sample_keys, subsampled_attention
from regularizers.ops import philox_words
from tests.harness import RandomOperatorContract, Sample


def _qkv(batch=2, heads=2, tokens=24, features=4, dtype=torch.float64, queries=None):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, n, features) for n in (queries or tokens, tokens, tokens)]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)


def _padding(batch, tokens, *counts):
    mask = torch.zeros(batch, tokens, dtype=torch.bool)
    for row, count in zip(mask, counts, strict=True):
        row[tokens - count :] = True
    return mask


class TestContract(RandomOperatorContract):
    """The parts of the operator contract that concern the draw; the rest is the operator's own."""

    autocast_dtype = torch.bfloat16
    bitwise_across_threads = True
    scheduled = {}

    def samples(self, dtype):
        tensors = _qkv(batch=2, heads=1, tokens=6, features=2, dtype=dtype)
        padding = _padding(2, 6, 0, 4)

        def sample(name, **options):
            return Sample(name, tensors, subsampled_attention, {"seed": 4, **options})

        return [
            sample("unbiased", num_keys=2),
            sample("causal", keep_ratio=0.5, is_causal=True, key_padding_mask=padding),
            sample("local", window=3, mode="local", sigma=1.0, key_padding_mask=padding),
            sample("grid", window=4, mode="local", grid=(2, 3)),
        ]

    def operator_calls(self):
        from regularizers.ops.subsampled_attention import ATTENTION

        return [(ATTENTION, ())]

    test_opcheck_passes = None  # with the operator
    test_gradcheck_first_and_second_order = None
    test_forward_mode_agrees_with_reverse_mode = None
    test_numbers_and_sizes_may_vary_in_one_dynamic_graph = None

    def bad_inputs(self):
        q, k, v = _qkv(dtype=torch.float32)
        mask = _padding(2, 24, 0, 3)

        def call(q=q, k=k, v=v, **options):
            return lambda: subsampled_attention(q, k, v, **options)

        local = {"mode": "local", "window": 6}
        return [
            (ValueError, "exactly one of num_keys", call()),
            (ValueError, "exactly one of num_keys", call(num_keys=3, keep_ratio=0.5)),
            (ValueError, "exactly one of num_keys", call(num_keys=3, **local)),
            (ValueError, "num_keys must", call(num_keys=0)),
            (ValueError, "num_keys must", call(num_keys=25)),
            (TypeError, "num_keys must", call(num_keys=2.5)),
            (ValueError, "keep_ratio must", call(keep_ratio=0.0)),
            (ValueError, "keep_ratio must", call(keep_ratio=1.1)),
            (TypeError, "keep_ratio must", call(keep_ratio="half")),
            (ValueError, "mode must", call(num_keys=3, mode="far")),
            (ValueError, "mode must not be 'local'", call(q=q[:, :, :5], **local)),
            (ValueError, "window must be None", call(window=3)),
            (ValueError, "window must", call(mode="local", window=25)),
            (ValueError, "sigma must be at least 0", call(sigma=-1.0, **local)),
            (ValueError, "sigma must be None", call(num_keys=3, sigma=1.0)),
            (ValueError, "grid must be", call(grid=(5, 5), **local)),
            (ValueError, "grid must be", call(grid=(24,), **local)),
            (ValueError, "grid must be None", call(num_keys=3, grid=(4, 6))),
            (ValueError, "is_causal must", call(q=q[:, :, :5], num_keys=3, is_causal=True)),
            (ValueError, "always_include_self", call(q=q[:, :, :5], num_keys=3,
                                                     always_include_self=True)),
            (TypeError, "key_padding_mask", call(num_keys=3, key_padding_mask=mask.int())),
            (ValueError, "key_padding_mask", call(num_keys=3, key_padding_mask=mask[:1])),
            (ValueError, "sample 1", call(num_keys=3, key_padding_mask=_padding(2, 24, 0, 24))),
            (ValueError, "key_padding_mask must be None", call(
                num_keys=3, key_padding_mask=mask, shared_across_batch=True)),
            (ValueError, "attn_bias", call(num_keys=3, attn_bias=torch.zeros(1, 1, 3, 3))),
            (ValueError, "k must", call(k=k[:, :1], num_keys=3)),
            (TypeError, "seed", call(num_keys=3, seed=1.5)),
            (ValueError, "batch", lambda: sample_keys(0, 4, 2)),
            (ValueError, "num_tokens", lambda: sample_keys(1, 0, 1)),
            (ValueError, "num_keys must lie", lambda: sample_keys(1, 4, 5)),
            (ValueError, "sigma", lambda: jitter_permutation(1, 4, -1.0)),
            (ValueError, "window must lie", lambda: jitter_permutation(1, 4, 1.0, window=5)),
            (ValueError, "window must be", lambda: jitter_permutation(1, 4, 1.0, grid=(2, 2))),
            (ValueError, "square", lambda: jitter_permutation(1, 4, 1.0, window=2, grid=(2, 2))),
        ]  # fmt: skip


@pytest.mark.parametrize("options", [
    {"keep_ratio": 1.0},
    {"num_keys": 24},
    {"window": 24, "mode": "local"},
    {"window": 24, "mode": "local", "grid": (4, 6)},
    {"keep_ratio": 0.25, "training": False},
    {"window": 6, "mode": "local", "training": False},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("causal", [False, True])
def test_all_keys_and_evaluation_are_dense_and_draw_nothing(options, causal):
    q, k, v = _qkv()
    state = torch.get_rng_state()
    found = subsampled_attention(q, k, v, is_causal=causal, **options)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, is_causal=causal))
    assert torch.equal(torch.get_rng_state(), state)


def test_dense_attention_respects_padding_causality_and_bias_together():
    q, k, v = _qkv()
    padding, bias = _padding(2, 24, 0, 7), torch.randn(1, 2, 24, 24, dtype=torch.float64)
    options = {"is_causal": True, "key_padding_mask": padding, "attn_bias": bias}
    found = subsampled_attention(q, k, v, keep_ratio=0.5, training=False, **options)
    hidden = padding[:, None, None] | ~torch.ones(24, 24, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(q, k, v, bias.masked_fill(hidden, -torch.inf))
    torch.testing.assert_close(found, expected)


def test_keys_almost_all_agree_with_all():
    # The sampling path itself, not its shortcut. A missing key of 400 costs its weight in each row:
    # 1 / 400 on average, but some tenths in the rows that prefer it.
    q, k, v = _qkv(tokens=400, batch=1)
    found = subsampled_attention(q, k, v, num_keys=399, seed=0)
    relative = (found - F.scaled_dot_product_attention(q, k, v)).norm() / found.norm()
    assert 0 < relative < 0.2


def test_result_is_attention_to_the_sampled_keys_in_every_head():
    q, k, v = _qkv()
    keys = sample_keys(2, 24, 7, seed=3)
    found = subsampled_attention(q, k, v, num_keys=7, seed=3)
    for b in range(2):
        gathered = (t[b : b + 1, :, keys[b]] for t in (k, v))
        expected = F.scaled_dot_product_attention(q[b : b + 1], *gathered)
        torch.testing.assert_close(found[b : b + 1], expected)


@pytest.mark.parametrize("causal", [False, True])
def test_result_is_dense_attention_with_the_complement_hidden(causal):
    q, k, v = _qkv()
    keys = sample_keys(2, 24, 7, seed=3)
    visible = torch.zeros(2, 24, dtype=torch.bool).scatter(1, keys, True)[:, None].expand(2, 24, 24)
    visible = visible | torch.eye(24, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    found = subsampled_attention(
        q, k, v, num_keys=7, seed=3, is_causal=causal, always_include_self=True
    )
    expected = F.scaled_dot_product_attention(q, k, v, visible[:, None])
    torch.testing.assert_close(found, expected)


def test_every_key_is_drawn_equally_often_and_at_most_once():
    draws, tokens, n = 4000, 20, 6
    keys = sample_keys(draws, tokens, n, seed=0)
    assert (keys[:, 1:] > keys[:, :-1]).all()
    counts = torch.bincount(keys.flatten(), minlength=tokens).double()
    deviation = math.sqrt(draws * n / tokens * (1 - n / tokens))
    assert (counts - draws * n / tokens).abs().max() < 4 * deviation


def test_keys_are_the_smallest_words_of_the_streams():
    words = philox_words(torch.tensor(9), 50, stream=torch.arange(3))
    expected = words.argsort(dim=1, stable=True)[:, :8].sort(1).values
    assert torch.equal(sample_keys(3, 50, 8, seed=9), expected)


def test_keys_do_not_depend_on_backend_or_batch():
    expected = sample_keys(4, 100, 30, seed=5)
    assert torch.equal(sample_keys(2, 100, 30, seed=5), expected[:2])
    assert torch.equal(sample_keys(4, 100, 30, shared=True, seed=5), expected[:1])
    with regularizers.use_backend("reference"):
        assert torch.equal(sample_keys(4, 100, 30, seed=5), expected)


def test_samples_seeds_and_calls_differ():
    keys = sample_keys(2, 100, 30, seed=5)
    assert not torch.equal(keys[0], keys[1])
    assert not torch.equal(sample_keys(2, 100, 30, seed=6), keys)
    assert not torch.equal(sample_keys(2, 100, 30), sample_keys(2, 100, 30))


def test_a_shared_draw_serves_all_samples():
    q, k, v = (tensor[:1].expand(3, -1, -1, -1) for tensor in _qkv())
    for options in ({"num_keys": 5}, {"window": 5, "mode": "local"}):
        found = subsampled_attention(q, k, v, shared_across_batch=True, seed=1, **options)
        torch.testing.assert_close(found[0], found[2])
        apart = subsampled_attention(q, k, v, seed=1, **options)
        assert not torch.allclose(apart[0], apart[2])


def test_padding_is_never_drawn_and_short_samples_use_all_they_have():
    padding = _padding(2, 10, 3, 8)
    for seed in range(20):
        keys = sample_keys(2, 10, 4, key_padding_mask=padding, seed=seed)
        assert keys[0].max() < 7
        assert keys[1].tolist() == [0, 1, -1, -1]


@pytest.mark.parametrize("options", [{"num_keys": 6}, {"window": 6, "mode": "local"}], ids=str)
def test_padding_does_not_reach_other_tokens(options):
    q, k, v = _qkv()
    padding = _padding(2, 24, 5, 20)
    arguments = {"key_padding_mask": padding, "seed": 2, **options}
    expected = subsampled_attention(q, k, v, **arguments)
    for tensor in (k, v):
        tensor.masked_fill_(padding[:, None, :, None], 1e3)
    torch.testing.assert_close(subsampled_attention(q, k, v, **arguments), expected)


def test_consistency_bias_and_deviation_shrink_as_keys_are_added():
    # Sheet, fact 4: 400 draws, one Gaussian problem of 64 tokens and 16 features.
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 64, 16, generator=generator)
    dense = F.scaled_dot_product_attention(q, k, v)
    many = [tensor.expand(400, -1, -1, -1) for tensor in (q, k, v)]
    biases, deviations = [], []
    for n in (64, 32, 16, 8):
        found = subsampled_attention(*many, num_keys=n, seed=0)
        biases.append((found.mean(0) - dense[0]).norm() / dense.norm())
        deviations.append((found - dense).square().mean(0).sum().sqrt() / dense.norm())
    expected = torch.tensor([[0.0, 0.11, 0.23, 0.37], [0.0, 0.88, 1.42, 1.97]])
    # Another problem of the same law: its figures differ by some percent.
    torch.testing.assert_close(
        torch.tensor([biases, deviations]), expected, rtol=0.15, atol=0.02
    )  # fmt: skip
    assert biases == sorted(biases)
    assert deviations == sorted(deviations)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_keys_that_no_query_sees_are_exactly_zero(causal):
    leaves = [tensor.requires_grad_() for tensor in _qkv()]
    keys = sample_keys(2, 24, 7, seed=3)
    found = subsampled_attention(*leaves, num_keys=7, seed=3, always_include_self=False)
    found.sum().backward()
    listed = torch.zeros(2, 24, dtype=torch.bool).scatter(1, keys, True)
    for leaf in leaves[1:]:
        touched = (leaf.grad != 0).any(-1)
        assert torch.equal(touched, listed[:, None].expand_as(touched))


@pytest.mark.parametrize("options", [{"num_keys": 6}, {"window": 6, "mode": "local"}], ids=str)
def test_a_causal_row_does_not_change_when_later_tokens_do(options):
    q, k, v = _qkv()
    expected = subsampled_attention(q, k, v, is_causal=True, seed=2, **options)
    for tensor in (q, k, v):
        tensor[:, :, 10:] += 1
    found = subsampled_attention(q, k, v, is_causal=True, seed=2, **options)
    assert torch.equal(found[:, :, :10], expected[:, :, :10])
    assert not torch.allclose(found[:, :, 10:], expected[:, :, 10:])


@pytest.mark.parametrize("options", [{"num_keys": 1}, {"window": 1, "mode": "local"}], ids=str)
def test_every_causal_row_sees_its_own_key(options):
    q, k, v = _qkv()
    found = subsampled_attention(q, k, v, is_causal=True, **options)
    torch.testing.assert_close(found[:, :, 0], v[:, :, 0])
    assert (found != 0).all()


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [
        (0.0, {8: 0.75, 16: 0.5, 32: 0.0, 64: 0.0}),
        (8.0, {1: 0.72, 16: 0.47, 32: 0.13, 64: 0.0, 128: 0.0}),
        (32.0, {1: 0.28, 16: 0.26, 32: 0.22, 64: 0.10}),
        (1e9, dict.fromkeys((1, 16, 64, 128), 31 / 255)),
    ],
)
def test_windows_hold_tokens_at_a_distance_as_often_as_the_sheet_says(sigma, expected):
    # Fact 6, tolerance 0.04 with 400 draws.
    draws, tokens, window = 400, 256, 32
    order = jitter_permutation(draws, tokens, sigma, window=window, seed=1)
    numbers = (torch.arange(tokens) // window).expand(draws, -1)
    windows = torch.empty_like(order).scatter(1, order, numbers)
    for distance, share in expected.items():
        found = (windows[:, :-distance] == windows[:, distance:]).double().mean()
        assert abs(found - share) < 0.04, distance


def test_without_jitter_windows_are_shifted_at_random():
    order = jitter_permutation(200, 12, 0.0, window=4, seed=0)
    assert torch.equal((order - order[:, :1]) % 12, torch.arange(12).expand(200, -1))
    assert set(order[:, 0].tolist()) == {0, 1, 2, 3}
    assert torch.equal(jitter_permutation(2, 12, 0.0, seed=0), torch.arange(12).expand(2, -1))


def test_windows_of_a_grid_are_squares():
    order = jitter_permutation(50, 64, 0.0, window=16, grid=(8, 8), seed=0)
    windows = order.view(50, 4, 16)
    for values in (windows // 8, windows % 8):
        # Four rows and four columns that follow each other on the ring.
        kinds = [sorted(set(row.tolist())) for row in values.flatten(0, 1)]
        assert all(len(kind) == 4 for kind in kinds)


@pytest.mark.parametrize("grid", [None, (4, 9), (9, 4)])
@pytest.mark.parametrize("sigma", [0.0, 1.5, 100.0])
def test_every_token_stands_in_the_order_once(grid, sigma):
    order = jitter_permutation(7, 36, sigma, window=9, grid=grid, seed=3)
    assert torch.equal(order.sort(1).values, torch.arange(36).expand(7, -1))


def test_orders_do_not_depend_on_the_backend():
    expected = jitter_permutation(3, 100, 5.0, window=10, seed=5)
    with regularizers.use_backend("reference"):
        assert torch.equal(jitter_permutation(3, 100, 5.0, window=10, seed=5), expected)


@pytest.mark.parametrize(
    ("tokens", "window", "grid"), [(24, 6, None), (25, 6, None), (24, 4, (4, 6))]
)
def test_local_attention_is_dense_inside_each_window(tokens, window, grid):
    q, k, v = _qkv(tokens=tokens)
    options = {"window": window, "sigma": 2.0, "grid": grid, "seed": 7}
    found = subsampled_attention(q, k, v, mode="local", **options)
    order = jitter_permutation(2, tokens, options.pop("sigma"), **options)
    for b in range(2):
        for places in order[b].split(window):
            part = (tensor[b : b + 1, :, places] for tensor in (q, k, v))
            expected = F.scaled_dot_product_attention(*part)
            torch.testing.assert_close(found[b : b + 1, :, places], expected)


def test_unbiased_attention_is_equivariant_given_the_permuted_keys():
    from regularizers.ops import gathered_attention

    q, k, v = _qkv(batch=1)
    order = torch.randperm(24)
    keys = sample_keys(1, 24, 7, seed=3)
    found = gathered_attention(
        q[:, :, order], k[:, :, order], v[:, :, order], order.argsort()[keys]
    )
    expected = subsampled_attention(q, k, v, num_keys=7, seed=3)
    torch.testing.assert_close(found, expected[:, :, order])


def test_bias_goes_by_original_places():
    q, k, v = _qkv()
    bias = torch.zeros(1, 1, 24, 24, dtype=torch.float64)
    bias[..., 0] = 50.0  # whoever sees token 0 sees nothing else
    options = {"window": 6, "mode": "local", "sigma": 2.0}
    found = subsampled_attention(q, k, v, attn_bias=bias, seed=7, **options)
    order = jitter_permutation(2, 24, 2.0, window=6, seed=7)
    for b in range(2):
        places = next(part for part in order[b].split(6) if 0 in part)
        torch.testing.assert_close(found[b, :, places], v[b, :, :1].expand(-1, 6, -1))


def test_cross_attention_samples_the_keys():
    q, k, v = _qkv(queries=5)
    keys = sample_keys(2, 24, 7, seed=3)
    found = subsampled_attention(q, k, v, num_keys=7, seed=3)
    expected = F.scaled_dot_product_attention(q[:1], k[:1, :, keys[0]], v[:1, :, keys[0]])
    torch.testing.assert_close(found[:1], expected)
