"""Newton-Schulz: the map of singular values, what it keeps, what it costs in bfloat16; meters."""

import math

import pytest
import torch

from regularizers.optim import newton_schulz, spectral_stats

A, B, C = 3.4445, -4.7750, 2.0315


def gaussian(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def orthogonal(n, seed):
    return torch.linalg.qr(gaussian(n, n, seed=seed))[0]


def singular_map(x):
    for _ in range(5):
        x = A * x + B * x**3 + C * x**5
    return x


@pytest.mark.parametrize(
    ("x", "expected"),
    [(1.0, 0.696436), (0.5, 0.765439), (0.1, 0.712120), (0.01, 0.698917), (0.001, 0.470544)],
)
def test_a_singular_value_goes_where_five_steps_of_the_polynomial_take_it(x, expected):
    rest = math.sqrt(1 - x * x)  # makes the Frobenius norm 1
    G = torch.diag(torch.tensor([x, rest], dtype=torch.float64))
    assert newton_schulz(G, dtype=None, eps=0.0)[0, 0].item() == pytest.approx(expected, abs=1e-6)


def test_singular_values_end_in_the_stated_band():
    x = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    y = singular_map(x)
    assert y[x >= 0.01].min() == pytest.approx(0.6818, abs=1e-4)
    assert y[x >= 0.01].max() == pytest.approx(1.1344, abs=1e-4)
    assert y.max() <= 1.2024


def test_a_diagonal_matrix_and_a_number():
    have = newton_schulz(torch.diag(torch.tensor([3.0, 0.1])), dtype=None)
    torch.testing.assert_close(have.diag(), torch.tensor([0.6970, 1.1288]), rtol=0, atol=1e-4)
    assert have[0, 1] == have[1, 0] == 0
    for sign in (1.0, -1.0):
        number = newton_schulz(torch.tensor([[sign * 7.0]]), dtype=None)
        assert number.item() == pytest.approx(sign * 0.69644, abs=1e-5)


def test_a_gaussian_matrix_comes_near_its_orthogonal_factor():
    G = gaussian(64, 32)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    have, best = newton_schulz(G, dtype=None), U @ Vh
    sigma = torch.linalg.svdvals(have)
    assert sigma.min() > 0.68
    assert sigma.max() < 1.135
    # The sheet's figures of another sample: 0.985 and 0.808.
    assert torch.cosine_similarity(have.flatten(), best.flatten(), dim=0) == pytest.approx(
        0.985, abs=5e-3
    )
    assert (G * have).sum() / S.sum() == pytest.approx(0.808, abs=0.03)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 7), (7, 1)])
def test_it_is_the_polynomial_of_singular_values(shape):
    G = gaussian(*shape)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    want = U @ torch.diag(singular_map(S / S.norm())) @ Vh
    torch.testing.assert_close(newton_schulz(G, dtype=None, eps=0.0), want, rtol=0, atol=1e-12)


def test_scale_transposition_and_rotations_go_through():
    G = gaussian(6, 4)
    want = newton_schulz(G, dtype=None, eps=0.0)
    for c in (1e-6, 100.0):
        torch.testing.assert_close(newton_schulz(c * G, dtype=None, eps=0.0), want)
    torch.testing.assert_close(newton_schulz(G.mT, dtype=None, eps=0.0), want.mT)
    Q, R = orthogonal(6, 1), orthogonal(4, 2)
    torch.testing.assert_close(newton_schulz(Q @ G @ R, dtype=None, eps=0.0), Q @ want @ R)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_zeros_stay_zeros(dtype):
    assert torch.equal(newton_schulz(torch.zeros(3, 5), dtype=dtype), torch.zeros(3, 5))


def test_bfloat16_differs_by_three_percent():
    G = gaussian(256, 128, dtype=torch.float32)
    wide, half = newton_schulz(G, dtype=None), newton_schulz(G)
    assert half.dtype == torch.float32
    assert (half - wide).norm() / wide.norm() < 0.05
    sigma = torch.linalg.svdvals(half)
    assert sigma.min() > 0.65
    assert sigma.max() < 1.16


def test_each_matrix_of_a_batch_is_normalised_by_itself():
    scales = torch.tensor([1.0, 1e-3, 1e3], dtype=torch.float64)
    G = gaussian(2, 3, 7, 4) * scales[:, None, None]
    have = newton_schulz(G, dtype=None)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(have[i, j], newton_schulz(G[i, j], dtype=None))


def test_strided_and_empty_matrices_are_taken():
    G = gaussian(8, 6)
    torch.testing.assert_close(newton_schulz(G[::2, ::3]), newton_schulz(G[::2, ::3].contiguous()))
    assert newton_schulz(torch.zeros(0, 3, 4)).shape == (0, 3, 4)
    assert newton_schulz(torch.zeros(3, 0)).shape == (3, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_come_back_in_their_dtype(dtype):
    G = gaussian(8, 4, dtype=dtype)
    have = newton_schulz(G, dtype=None)
    assert have.dtype == dtype
    # One rounding of a result of at most 1.2, to 8 bits.
    torch.testing.assert_close(
        have.float(), newton_schulz(G.float(), dtype=None), rtol=2**-8, atol=1e-6
    )


def test_it_is_differentiable_and_compiles(fresh_dynamo):
    G = gaussian(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: newton_schulz(x, dtype=None, steps=2), G)
    compiled = torch.compile(newton_schulz, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(G, dtype=None), newton_schulz(G, dtype=None))


def test_stats_of_a_known_spectrum():
    W = orthogonal(4, 0) @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]).double())
    stats = spectral_stats(W)
    have = [stats[name].item() for name in ("sigma_max", "sigma_min", "stable_rank", "condition")]
    assert have == pytest.approx([4.0, 0.5, (16 + 4 + 1 + 0.25) / 16, 8.0])


def test_stats_of_zero_singular_and_many_matrices():
    stats = spectral_stats(torch.stack([torch.zeros(2, 3), torch.eye(2, 3)]))
    assert stats["stable_rank"].tolist() == [0.0, 2.0]
    assert stats["condition"].tolist() == [math.inf, 1.0]


BAD = [
    (ValueError, "G must have", lambda: newton_schulz(torch.zeros(3))),
    (TypeError, "G must be", lambda: newton_schulz(torch.zeros(3, 3, dtype=torch.complex64))),
    (ValueError, "steps", lambda: newton_schulz(torch.eye(2), steps=0)),
    (ValueError, "eps", lambda: newton_schulz(torch.eye(2), eps=-1.0)),
    (ValueError, "coefficients", lambda: newton_schulz(torch.eye(2), coefficients=(1.0, 2.0))),
    (TypeError, "dtype", lambda: newton_schulz(torch.eye(2), dtype=torch.int32)),
    (ValueError, "W must", lambda: spectral_stats(torch.zeros(3))),
    (ValueError, "W must", lambda: spectral_stats(torch.zeros(3, 0))),
    (TypeError, "W must", lambda: spectral_stats(torch.eye(3).to(torch.int64))),
]


@pytest.mark.parametrize(("exception", "message", "call"), BAD)
def test_bad_input_names_the_argument(exception, message, call):
    with pytest.raises(exception, match=message):
        call()
