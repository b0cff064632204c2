"""gradient_gate: the operator contract; what it does to gradients is told by gradient dropout."""

import math

import pytest
import torch

from regularizers.ops import gradient_gate, philox_words
from regularizers.ops.gradient_gate import GRADIENT_GATE, agreement
from tests.harness import DTYPES, RandomOperatorContract, Sample


def _strength(value):
    return torch.tensor(value, dtype=torch.float64)


class TestContract(RandomOperatorContract):
    bitwise_across_threads = True
    autocast_dtype = torch.float32  # as a product of float32 tensors
    scheduled = {"drop_strength": (0.0, 1.0)}

    def samples(self, dtype):
        a, b = torch.randn(2, 5, 3, 9, dtype=dtype)
        image, other = torch.randn(2, 2, 3, 4, 5, dtype=dtype)
        last = image.to(memory_format=torch.channels_last)
        options = {"g_reg": b, "drop_strength": 0.7, "seed": 3}
        whole = {**options, "drop_strength": 1.0, "stream": 2**32 - 1}
        swapped = {**options, "g_reg": b.transpose(0, 1)}
        return [
            Sample("some dropped", (a,), gradient_gate, options),
            Sample("dropped entirely", (a,), gradient_gate, whole),
            Sample("nothing dropped", (a,), gradient_gate, {**options, "drop_strength": 0.0}),
            Sample("no eps", (a,), gradient_gate, {**options, "eps": 0.0}),
            Sample("a number", (a[0, 0, 0],), gradient_gate, {**options, "g_reg": b[0, 0, 0]}),
            Sample("transposed", (a.transpose(0, 1),), gradient_gate, swapped),
            Sample("expanded", (a[:1].expand(5, 3, 9),), gradient_gate, options),
            Sample("channels last", (last,), gradient_gate, {**options, "g_reg": other}),
        ]

    def empty(self, dtype):
        nothing = torch.empty(0, 3, dtype=dtype)
        return [Sample("nothing", (nothing,), gradient_gate, {"g_reg": nothing, "seed": 1})]

    def operator_calls(self):
        a, b = torch.randn(2, 4, 3)
        value = torch.randn(4, 3, requires_grad=True)
        return [(GRADIENT_GATE, (value, a, b, _strength(0.5), torch.tensor(1), 1e-8, 0))]

    def bad_inputs(self):
        x = torch.ones(2, 3)
        return [
            (TypeError, "g_task must", lambda: gradient_gate([1.0], x)),
            (TypeError, "g_task must", lambda: gradient_gate(x.long(), x)),
            (TypeError, "g_reg must", lambda: gradient_gate(x, None)),
            (TypeError, "g_reg must", lambda: gradient_gate(x, x.double())),
            (ValueError, "g_reg must", lambda: gradient_gate(x, x[:1])),
            (ValueError, "g_reg must", lambda: gradient_gate(x, x.to("meta"))),
            (ValueError, "drop_strength must", lambda: gradient_gate(x, x, 1.5)),
            (ValueError, "drop_strength must", lambda: gradient_gate(x, x, _strength(math.nan))),
            (ValueError, "eps must", lambda: gradient_gate(x, x, eps=-1.0)),
            (ValueError, "stream must", lambda: gradient_gate(x, x, stream=2**32)),
            (TypeError, "seed", lambda: gradient_gate(x, x, seed=1.5)),
        ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_entry_is_kept_iff_the_upper_bits_of_its_word_lie_below_its_probability(dtype):
    a, b = torch.randn(2, 50_001, dtype=torch.float64).to(dtype)
    found = gradient_gate(a, b, seed=7, stream=5)
    uniform = (philox_words(torch.tensor(7), a.numel(), stream=5) >> 8).double() * 2.0**-24
    keep = uniform < agreement(a, b, 1e-8).double()
    assert torch.equal(found, torch.where(keep, a, 0))


def test_what_is_infinite_or_nan_is_kept_or_dropped_to_zero():
    inf, nan = math.inf, math.nan
    a = torch.tensor([inf, -inf, nan, 1.0, 1.0, 0.0, 0.0])
    b = torch.tensor([-inf, 1.0, 1.0, -inf, nan, inf, -1.0])
    for seed in range(20):
        found = gradient_gate(a, b, seed=seed)
        torch.testing.assert_close(found, a, equal_nan=True)
    # Opposed beyond all doubt, and too large for (1 - strength) of it to be left.
    gone = gradient_gate(torch.full((64,), 1e30), torch.full((64,), -3e38), seed=1)
    assert set(gone.tolist()) == {0.0}


def test_the_backward_pass_gates_alike():
    a, b = torch.randn(2, 300)
    a.requires_grad_()
    found = gradient_gate(a, b, 0.25, seed=2)
    (grad,) = torch.autograd.grad(found, a, torch.ones(300))
    torch.testing.assert_close(grad * a.detach(), found.detach())
    assert set(grad.tolist()) == {1.0, 0.75}
