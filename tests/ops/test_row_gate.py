"""row_gate: the operator contract, and facts of its decisions."""

import pytest
import torch

from regularizers.ops import philox_words, row_gate
from regularizers.ops.row_gate import ROW_GATE, kept_rows
from tests.harness import RandomOperatorContract, Sample


def _rate(value):
    return torch.tensor(value, dtype=torch.float64)


OPTIONS = {"p": 0.4, "seed": 3}


def _onto(x, residual, **options):
    return row_gate(x, residual=residual, **options)


class TestContract(RandomOperatorContract):
    bitwise_across_threads = True
    autocast_dtype = torch.float32  # as an addition of float32 tensors
    scheduled = {"p": (0.0, 1.0)}

    def samples(self, dtype):
        x, r = torch.randn(2, 5, 3, 7, dtype=dtype)
        image = torch.randn(5, 3, 2, 4, dtype=dtype)
        last = image.to(memory_format=torch.channels_last)
        volume = torch.randn(3, 2, 2, 3, 2, dtype=dtype)
        volume_last = volume.to(memory_format=torch.channels_last_3d)
        return [
            Sample("with a residual", (x, r), _onto, OPTIONS),
            Sample("alone", (x,), row_gate, OPTIONS),
            Sample("not scaled", (x, r), _onto, {**OPTIONS, "scale_by_keep": False}),
            Sample("another branch", (x,), row_gate, {**OPTIONS, "stream": 2}),
            Sample("one dimension", (x[:, 0, 0],), row_gate, OPTIONS),
            Sample("transposed", (x.transpose(1, 2), r.transpose(1, 2)), _onto, OPTIONS),
            Sample("expanded", (x[:, :1].expand(5, 3, 7), r), _onto, OPTIONS),
            Sample("channels last", (last, last.flip(0)), _onto, OPTIONS),
            Sample("mixed layouts", (last, image), _onto, OPTIONS),
            Sample("mixed layouts, other way", (image, last), _onto, OPTIONS),
            Sample("volume", (volume_last, volume), _onto, OPTIONS),
            Sample("p = 0", (x, r), _onto, {**OPTIONS, "p": 0.0}),
            Sample("p = 1", (x, r), _onto, {**OPTIONS, "p": 1.0}),
        ]

    def empty(self, dtype):
        shapes = ((0, 3), (3, 0))
        return [Sample(str(s), (torch.empty(s, dtype=dtype),), row_gate, OPTIONS) for s in shapes]

    def operator_calls(self):
        x, r = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
        return [
            (ROW_GATE, (x, r, _rate(0.5), torch.tensor(1), 0, True)),
            (ROW_GATE, (x, None, _rate(0.5), torch.tensor(1), 1, False)),
        ]

    def bad_inputs(self):
        x = torch.ones(2, 3)
        return [
            (TypeError, "x must", lambda: row_gate([1.0], 0.1)),
            (TypeError, "x must", lambda: row_gate(x.long(), 0.1)),
            (ValueError, "x must", lambda: row_gate(torch.tensor(1.0), 0.1)),
            (ValueError, "p must", lambda: row_gate(x, 1.1)),
            (ValueError, "p must", lambda: row_gate(x, -0.1)),
            (ValueError, "p must", lambda: row_gate(x, _rate(float("nan")))),
            (ValueError, "p must", lambda: row_gate(x, torch.tensor([0.5]))),
            (TypeError, "residual must", lambda: row_gate(x, 0.1, 1.0)),
            (TypeError, "residual must", lambda: row_gate(x, 0.1, x.double())),
            (ValueError, "residual must", lambda: row_gate(x, 0.1, x[:1])),
            (ValueError, "residual must", lambda: row_gate(x, 0.1, x.to("meta"))),
            (ValueError, "stream must", lambda: row_gate(x, 0.1, stream=-1)),
            (ValueError, "stream must", lambda: row_gate(x, 0.1, stream=2**32)),
            (TypeError, "seed", lambda: row_gate(x, 0.1, seed=1.5)),
        ]


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 1.0])
def test_a_row_is_dropped_iff_its_word_lies_below_the_threshold(p):
    found = row_gate(torch.ones(301, 2), p, seed=7, stream=5, scale_by_keep=False)
    words = philox_words(torch.tensor(7), 301, stream=5)
    assert torch.equal(found[:, 0] != 0, words >= round(p * 2**32))
    assert torch.equal(kept_rows(301, _rate(p), torch.tensor(7), 5), found[:, 1] != 0)


def test_a_row_is_its_residual_or_residual_and_scaled_branch():
    x, r = torch.randn(2, 64, 10, dtype=torch.float64)
    found = row_gate(x, 0.5, r, seed=1)
    keep = kept_rows(64, _rate(0.5), torch.tensor(1))[:, None]
    torch.testing.assert_close(found, torch.where(keep, r + 2 * x, r))


def test_long_rows_and_many_rows_are_cut_into_the_same_tasks():
    for shape in ((3, 40_001), (40_001, 3)):
        x = torch.ones(shape)
        keep = kept_rows(shape[0], _rate(0.5), torch.tensor(2))
        assert torch.equal(row_gate(x, 0.5, seed=2), 2 * x * keep[:, None])


def test_branches_that_share_a_seed_draw_independently():
    one, two = (row_gate(torch.ones(20_000, 1), 0.3, seed=4, stream=s) == 0 for s in (0, 1))
    both = (one & two).sum().item()
    assert abs(both - 20_000 * 0.09) < 4 * (20_000 * 0.09 * 0.91) ** 0.5


def test_nan_of_a_dropped_row_leaks_neither_forward_nor_backward():
    keep = kept_rows(16, _rate(0.5), torch.tensor(3))[:, None]
    x = torch.where(keep, 1.0, float("nan")).expand(16, 4).clone().requires_grad_()
    result = row_gate(x, 0.5, seed=3)
    assert torch.equal(result, torch.where(keep, 2.0, 0.0).expand(16, 4))
    result.backward(torch.where(keep, 1.0, float("nan")).expand(16, 4))
    assert torch.equal(x.grad, result.detach())


def test_the_residual_takes_the_gradient_as_it_is():
    x, r = torch.randn(2, 8, 3, requires_grad=True).unbind()
    cotangent = torch.randn(8, 3)
    (grad,) = torch.autograd.grad(row_gate(x, 0.5, r, seed=1), r, cotangent)
    assert torch.equal(grad, cotangent)


def test_autocast_raises_both_to_the_wider_type():
    x, r = torch.randn(4, 3).bfloat16(), torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert row_gate(x, 0.5, r).dtype == torch.float32


def test_the_backward_pass_stores_no_tensor_of_the_data():
    x = torch.randn(4, 5, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, id):
        row_gate(x, 0.3, x.detach())
    assert saved == [1, 1]  # p and the seed
