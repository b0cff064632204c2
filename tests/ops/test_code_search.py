"""nearest_code and sample_code: the operator contract through the codes found, and their facts."""

import pytest
import torch

import regularizers
from regularizers.ops import nearest_code, sample_code
from regularizers.ops.code_search import NEAREST_CODE, SAMPLE_CODE
from tests.harness import OperatorContract, RandomOperatorContract, Sample

TRIANGLE = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
# Rows of softmax_j(-|e_j - e_i|^2) over j != i.
TRIANGLE_PROBABILITIES = torch.tensor(
    [[0.0, 0.952574, 0.047426], [0.982014, 0.0, 0.017986], [0.731059, 0.268941, 0.0]]
)


def _double(value):
    return torch.tensor(value, dtype=torch.float64)


def quantize(z, codebook):
    """An index has no derivative: codes are what the contract can differentiate."""
    index = nearest_code(z, codebook)
    return z + codebook.index_select(0, index.flatten()).reshape(z.shape)


def replace(codebook, *, index, **options):
    return codebook[sample_code(index, codebook, **options)]


class TestNearestContract(OperatorContract):
    bitwise_across_threads = True  # a token is searched by one thread
    autocast_dtype = torch.float32
    scheduled = {}

    def samples(self, dtype):
        z, codebook = torch.randn(5, 3, dtype=dtype), torch.randn(7, 3, dtype=dtype)
        return [
            Sample("odd sizes", (z, codebook), quantize),
            Sample("one of each", (z[:1, :1], codebook[:1, :1]), quantize),
            Sample("a batch", (z.reshape(5, 1, 3), codebook), quantize),
            Sample("one token", (z[0], codebook), quantize),
            Sample("not contiguous", (z.T[:, ::2], codebook.T[:, :3]), quantize),
        ]

    def empty(self, dtype):
        z, codebook = torch.randn(5, 3, dtype=dtype), torch.randn(7, 3, dtype=dtype)
        return [
            Sample("no tokens", (z[:0], codebook), quantize),
            Sample("no features", (z[:, :0], codebook[:, :0]), quantize),
        ]

    def operator_calls(self):
        return [(NEAREST_CODE, (torch.randn(5, 3), torch.randn(7, 3)))]

    def bad_inputs(self):
        z, codebook = torch.ones(2, 3), torch.ones(4, 3)
        return [
            (TypeError, "z must", lambda: nearest_code([1.0], codebook)),
            (TypeError, "z must", lambda: nearest_code(z.long(), codebook)),
            (ValueError, "z must", lambda: nearest_code(z[0, 0], codebook)),
            (TypeError, "codebook must", lambda: nearest_code(z, None)),
            (TypeError, "codebook must", lambda: nearest_code(z, codebook.long())),
            (TypeError, "codebook must", lambda: nearest_code(z, codebook.double())),
            (ValueError, "codebook must", lambda: nearest_code(z, codebook[:0])),
            (ValueError, "codebook must", lambda: nearest_code(z, codebook[0])),
            (ValueError, "codebook must", lambda: nearest_code(z, torch.ones(4, 2))),
            (ValueError, "codebook must", lambda: nearest_code(z, codebook.to("meta"))),
            (ValueError, "finite", lambda: nearest_code(z, codebook.log1p().neg().sqrt())),
        ]

    def test_backward_stays_on_the_backend_of_forward(self):
        # There is no backward pass: the index requires no grad, whatever backend found it.
        z, codebook = torch.randn(5, 3).requires_grad_(), torch.randn(7, 3).requires_grad_()
        for backend in ("cpp", "reference"):
            with regularizers.use_backend(backend):
                assert not nearest_code(z, codebook).requires_grad


class TestSampleContract(RandomOperatorContract):
    bitwise_across_threads = True
    autocast_dtype = torch.float32
    scheduled = {"temperature": (0.1, 10.0)}

    def samples(self, dtype):
        codebook = torch.randn(11, 3, dtype=dtype)
        index = torch.arange(32) % 11
        options = {"index": index, "seed": 12, "temperature": 2.0}
        grid = {**options, "index": index.reshape(2, 16).T}
        selected = {**options, "selected": index % 2 == 0}
        return [
            Sample("odd sizes", (codebook,), replace, options),
            Sample("two codes", (codebook[:2],), replace, {**options, "index": index % 2}),
            Sample("a grid, transposed", (codebook,), replace, grid),
            Sample("some selected", (codebook,), replace, selected),
            Sample(
                "not contiguous", (torch.randn(6, 11, dtype=dtype).T[:, ::2],), replace, options
            ),
            Sample("cold", (codebook,), replace, {**options, "temperature": 1e-9}),
            Sample("hot", (codebook,), replace, {**options, "temperature": 1e9}),
        ]

    def empty(self, dtype):
        codebook = torch.randn(11, 3, dtype=dtype)
        options = {"index": torch.zeros(0, dtype=torch.int64), "seed": 1}
        return [Sample("no tokens", (codebook,), replace, options)]

    def operator_calls(self):
        index, codebook = torch.tensor([1, 2, 0]), torch.randn(4, 2)
        selected = torch.tensor([True, False, True])
        return [
            (SAMPLE_CODE, (index, codebook, None, _double(1.0), torch.tensor(3))),
            (SAMPLE_CODE, (index, codebook, selected, _double(1.0), torch.tensor(3))),
        ]

    def bad_inputs(self):
        index, e = torch.tensor([0, 3]), torch.ones(4, 3)
        nan = torch.full((4, 3), torch.nan)
        return [
            (TypeError, "index must", lambda: sample_code([0], e)),
            (TypeError, "index must", lambda: sample_code(index.int(), e)),
            (ValueError, "index must", lambda: sample_code(index + 1, e)),
            (ValueError, "index must", lambda: sample_code(index - 1, e)),
            (TypeError, "codebook must", lambda: sample_code(index, e.long())),
            (ValueError, "codebook must", lambda: sample_code(index * 0, e[:1])),
            (ValueError, "codebook must", lambda: sample_code(index, nan)),
            (ValueError, "codebook must", lambda: sample_code(index, e.to("meta"))),
            (ValueError, "temperature", lambda: sample_code(index, e, temperature=0.0)),
            (ValueError, "temperature", lambda: sample_code(index, e, temperature=_double(-1.0))),
            (ValueError, "temperature", lambda: sample_code(index, e, temperature=float("inf"))),
            (TypeError, "temperature", lambda: sample_code(index, e, temperature="warm")),
            (TypeError, "selected", lambda: sample_code(index, e, selected=index)),
            (ValueError, "selected", lambda: sample_code(index, e, selected=index[:1] > 0)),
            (TypeError, "seed", lambda: sample_code(index, e, seed=1.5)),
            (TypeError, "generator", lambda: sample_code(index, e, generator=3)),
        ]

    def test_backward_stays_on_the_backend_of_forward(self):
        codebook = torch.randn(5, 3).requires_grad_()
        for backend in ("cpp", "reference"):
            with regularizers.use_backend(backend):
                assert not sample_code(torch.tensor([1]), codebook).requires_grad


@pytest.mark.parametrize(("tokens", "codes", "features"), [(300, 1000, 64), (65, 4097, 7)])
def test_nearest_code_is_that_of_double_precision_but_for_ties_within_rounding(
    tokens, codes, features
):
    z, codebook = torch.randn(tokens, features) + 3, torch.randn(codes, features) + 3
    distance = (z[:, None].double() - codebook.double()).square().sum(-1)
    found = distance.gather(1, nearest_code(z, codebook)[:, None])[:, 0]
    # One rounding of s_j, of the size of the squared norms about the mean code.
    assert (found - distance.amin(1)).max() < 1e-6 * 4 * features


def test_a_codebook_far_from_the_origin_loses_no_digits():
    # Without the mean code taken off, |e|^2 = 6e8 would leave distances no digit in float32.
    codebook = torch.randn(500, 6) + 1e4
    z = codebook + 1e-3
    assert torch.equal(nearest_code(z, codebook), torch.arange(500))


def test_of_equal_codes_the_first_counts():
    codebook = torch.randn(9, 20).repeat(30, 1)
    assert torch.equal(nearest_code(codebook, codebook), torch.arange(270) % 9)


def test_a_token_that_is_not_finite_gets_code_0():
    z = torch.tensor([[torch.nan, 0.0], [torch.inf, 0.0], [0.0, 2.0]])
    for backend in ("cpp", "reference"):
        with regularizers.use_backend(backend):
            assert nearest_code(z, TRIANGLE).tolist() == [0, 0, 2]


def test_an_index_does_not_depend_on_the_tokens_beside_it():
    z, codebook = torch.randn(600, 33), torch.randn(900, 33)
    found = nearest_code(z, codebook)
    for first, last in ((0, 1), (5, 18), (250, 531)):
        assert torch.equal(nearest_code(z[first:last], codebook), found[first:last])


def test_draws_follow_the_distance_softmax():
    count = 200_000
    for own in range(3):
        drawn = sample_code(torch.full((count,), own), TRIANGLE, seed=own)
        frequency = drawn.bincount(minlength=3) / count
        # Five standard deviations of a frequency, at most 1 / (2 sqrt(count)) each.
        torch.testing.assert_close(frequency, TRIANGLE_PROBABILITIES[own], rtol=0, atol=5.6e-3)


def test_draws_from_many_codes_follow_the_distance_softmax():
    codebook = torch.randn(600, 2)
    drawn = sample_code(torch.full((100_000,), 7), codebook, temperature=0.5, seed=3)
    distance = (codebook - codebook[7]).square().sum(1)
    p = (-distance / 0.5).masked_fill(torch.arange(600) == 7, -torch.inf).softmax(0)
    expected = p * 100_000
    frequent = expected > 20
    chi = ((drawn.bincount(minlength=600) - expected).square() / expected)[frequent].sum()
    count = int(frequent.sum())
    assert chi < count + 4 * (2 * count) ** 0.5  # mean and deviation of chi squared


def test_no_token_keeps_its_code():
    index = torch.randint(50, (5000,))
    for temperature in (1e-3, 1.0, 1e3):
        drawn = sample_code(index, torch.randn(50, 4), temperature=temperature, seed=1)
        assert (drawn != index).all()


def test_a_cold_draw_is_the_nearest_other_code():
    codebook = torch.randn(300, 5)
    distance = torch.cdist(codebook, codebook).fill_diagonal_(torch.inf)
    drawn = sample_code(torch.arange(300), codebook, temperature=1e-9, seed=1)
    assert torch.equal(drawn, distance.argmin(1))


def test_a_hot_draw_is_uniform_over_the_other_codes():
    codebook = torch.randn(21, 5)
    drawn = sample_code(torch.full((100_000,), 4), codebook, temperature=1e9, seed=1)
    counts = drawn.bincount(minlength=21)
    assert counts[4] == 0
    # Mean 5000, standard deviation 69.
    assert (counts[torch.arange(21) != 4] - 5000).abs().max() < 5 * 69


def test_a_draw_does_not_depend_on_what_else_is_selected():
    index, codebook = torch.randint(400, (500,)), torch.randn(400, 8)
    every = sample_code(index, codebook, seed=6)
    selected = torch.rand(500) < 0.2
    some = sample_code(index, codebook, selected=selected, seed=6)
    assert torch.equal(some, torch.where(selected, every, index))


def test_the_word_of_a_draw_is_stream_place_and_element_code():
    # Equal distances: the largest word wins, ties of the upper 23 bits by index.
    codebook = torch.eye(64)
    words = regularizers.ops.philox_words(torch.tensor(9), 64, stream=torch.arange(40))
    words[torch.arange(40), torch.arange(40)] = -1
    expected = (words >> 9).argmax(1)
    assert torch.equal(sample_code(torch.arange(40), codebook, seed=9), expected)
