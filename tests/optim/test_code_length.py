"""Lengths of Exp-Golomb codes, and the entropy of quantized weights (paper 4)."""

import math

import pytest
import torch

from regularizers.optim import GeneralizedGaussian, entropy_bits, exp_golomb_bits


def test_lengths_of_order_zero():
    q = torch.tensor([0, 1, -1, 2, -2, 3, -3, 4, -4, 7, -7, 8])
    assert exp_golomb_bits(q).tolist() == [1, 3, 3, 5, 5, 5, 5, 7, 7, 7, 7, 9]


@pytest.mark.parametrize("order", [0, 1, 3])
def test_lengths_are_those_of_the_written_code(order):
    def code(u):  # quotient in order 0, then the low bits
        high = bin((u >> order) + 1)[2:]
        low = format(u % 2**order, f"0{order}b") if order else ""
        return "0" * (len(high) - 1) + high + low

    q = torch.arange(-40, 41)
    lengths = [len(code(2 * k - 1 if k > 0 else -2 * k)) for k in q.tolist()]
    assert exp_golomb_bits(q, order=order).tolist() == lengths


@pytest.mark.parametrize("order", [0, 2])
def test_code_fills_the_kraft_sum(order):
    lengths = exp_golomb_bits(torch.arange(-(2**15), 2**15), order=order).double()
    assert torch.exp2(-lengths).sum().item() == pytest.approx(1, abs=2**-12)
    assert torch.exp2(-lengths).sum() <= 1


def test_lengths_are_exact_at_powers_of_two():
    k = torch.arange(1, 50)
    q = 2**k  # u + 1 = 2^(k + 1)
    assert torch.equal(exp_golomb_bits(q), 2 * (k + 1) + 1)
    assert torch.equal(exp_golomb_bits(-q + 1), 2 * k + 1)


@pytest.mark.parametrize(("shape", "bits"), [(2.0, 5.369), (1.0, 5.265), (0.5, 4.761)])
def test_entropy_at_a_tenth_of_the_deviation_is_the_law_s(shape, bits):
    torch.manual_seed(0)
    law = GeneralizedGaussian.from_stddev(0.0, 1.0, shape)
    found = entropy_bits((law.sample((1_000_000,)) / 0.1).round().int()).item()
    assert found == pytest.approx(bits, abs=0.01)
    # At shape 0.5 the peak is narrower than the step, which costs 0.01 bits.
    assert found == pytest.approx(law.entropy().item() / math.log(2) - math.log2(0.1), abs=0.015)


def test_entropy_of_few_symbols():
    assert entropy_bits(torch.zeros(5, dtype=torch.int8)).item() == 0
    assert entropy_bits(torch.arange(8)).item() == 3


def test_no_code_is_shorter_than_the_entropy():
    torch.manual_seed(0)
    q = (3 * torch.distributions.Laplace(0.0, 1.0).sample((10_000,))).round().int()
    for order in range(4):
        assert exp_golomb_bits(q, order=order).double().mean() >= entropy_bits(q)


def test_bad_input_names_the_argument():
    q = torch.tensor([1])
    for exception, name, call in (
        (TypeError, "q must", lambda: exp_golomb_bits([1])),
        (TypeError, "q must", lambda: exp_golomb_bits(torch.ones(2))),
        (TypeError, "q must", lambda: entropy_bits(torch.ones(2, dtype=torch.bool))),
        (ValueError, "q must not be empty", lambda: entropy_bits(q[:0])),
        (ValueError, "order must", lambda: exp_golomb_bits(q, order=-1)),
        (ValueError, "order must", lambda: exp_golomb_bits(q, order=31)),
        (TypeError, "order must", lambda: exp_golomb_bits(q, order=1.0)),
    ):
        with pytest.raises(exception, match=name):
            call()
