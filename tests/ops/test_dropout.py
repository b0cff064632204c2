"""dropout_samples: the operator contract, and facts of its masks and memory layout."""

import pytest
import torch

import regularizers
from regularizers.ops import dropout_mask, dropout_samples
from regularizers.ops.dropout import DROPOUT_SAMPLES, DROPOUT_SAMPLES_ADJOINT
from tests.harness import RandomOperatorContract, Sample


def _rate(value):
    return torch.tensor(value, dtype=torch.float64)


class TestContract(RandomOperatorContract):
    bitwise_across_threads = True
    autocast_dtype = torch.float32  # dropout keeps its input's type under autocast
    scheduled = {"p": (0.0, 1.0)}

    def samples(self, dtype):
        base = torch.randn(3, 5, 7, dtype=dtype)
        image = torch.randn(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last)
        options = {"p": 0.4, "num_samples": 3, "seed": 12}
        return [
            Sample("odd sizes", (base,), dropout_samples, options),
            Sample("one element", (base[0, 0, 0],), dropout_samples, options),
            Sample("transposed", (base.transpose(0, 2),), dropout_samples, options),
            Sample("every second", (base[:, ::2, ::3],), dropout_samples, options),
            Sample("expanded", (base[:, :1].expand(3, 4, 7),), dropout_samples, options),
            Sample("channels last", (image,), dropout_samples, options),
            Sample("one sample", (base,), dropout_samples, {**options, "num_samples": 1}),
            Sample("p = 0", (base,), dropout_samples, {**options, "p": 0.0}),
            Sample("p = 1", (base,), dropout_samples, {**options, "p": 1.0}),
        ]

    def empty(self, dtype):
        options = {"seed": 1}
        return [
            Sample("no rows", (torch.empty(0, 4, dtype=dtype),), dropout_samples, options),
            Sample("no columns", (torch.empty(4, 0, dtype=dtype),), dropout_samples, options),
        ]

    def operator_calls(self):
        x = torch.randn(3, 5, requires_grad=True)
        y = torch.randn(2, 3, 5, requires_grad=True)
        return [
            (DROPOUT_SAMPLES, (x, _rate(0.5), torch.tensor(1), 2)),
            (DROPOUT_SAMPLES_ADJOINT, (y, _rate(0.5), torch.tensor(1))),
        ]

    def bad_inputs(self):
        x = torch.ones(2, 3)
        return [
            (TypeError, "x must", lambda: dropout_samples([1.0])),
            (TypeError, "x must", lambda: dropout_samples(torch.ones(2, dtype=torch.int64))),
            (TypeError, "x must", lambda: dropout_samples(torch.ones(2, dtype=torch.complex64))),
            (ValueError, "p must", lambda: dropout_samples(x, -0.1)),
            (ValueError, "p must", lambda: dropout_samples(x, 1.1)),
            (ValueError, "p must", lambda: dropout_samples(x, float("nan"))),
            (ValueError, "p must", lambda: dropout_samples(x, _rate(1.1))),
            (ValueError, "p must", lambda: dropout_samples(x, _rate(float("nan")))),
            (ValueError, "p must", lambda: dropout_samples(x, torch.tensor([0.5]))),
            (ValueError, "p must", lambda: dropout_samples(x, torch.tensor(1))),
            (ValueError, "p must", lambda: dropout_samples(x, torch.tensor(0.5, device="meta"))),
            (
                ValueError,
                "p must",
                lambda: dropout_samples(x, torch.tensor(0.5, requires_grad=True)),
            ),
            (TypeError, "p must", lambda: dropout_samples(x, "half")),
            (ValueError, "num_samples", lambda: dropout_samples(x, num_samples=0)),
            (TypeError, "num_samples", lambda: dropout_samples(x, num_samples=2.0)),
            (TypeError, "seed", lambda: dropout_samples(x, seed=1.5)),
            (ValueError, "seed", lambda: dropout_samples(x, seed=2**63)),
            (
                TypeError,
                "seed",
                lambda: dropout_samples(x, seed=torch.tensor(1, dtype=torch.int32)),
            ),
            (ValueError, "seed", lambda: dropout_samples(x, seed=torch.tensor([1]))),
            (ValueError, "seed", lambda: dropout_samples(x, seed=torch.tensor(1, device="meta"))),
            (ValueError, "seed", lambda: dropout_samples(x, seed=1, generator=torch.Generator())),
            (TypeError, "generator", lambda: dropout_samples(x, generator=3)),
        ]


def test_masks_are_those_of_the_reference_rule():
    x = torch.ones(5, 301)
    for p in (0.0, 0.25, 0.5, 0.9, 1.0):
        expected = dropout_mask((5, 301), _rate(p), torch.tensor(77), 4)
        assert torch.equal(dropout_samples(x, p, 4, seed=77) != 0, expected)


def test_masks_of_the_golden_seed():
    # Sheet of paper 30, fact 1b.
    kept = dropout_samples(torch.ones(2, 4), 0.5, 3, seed=42).bool().int()
    rows = ["".join(map(str, row)) for row in kept.flatten(0, 1).tolist()]
    assert rows == ["1000", "1010", "0001", "0100", "0101", "1111"]


def test_a_sample_does_not_depend_on_how_many_there_are():
    x = torch.randn(4, 33)
    assert torch.equal(dropout_samples(x, 0.5, 9, seed=5)[:4], dropout_samples(x, 0.5, 4, seed=5))


def test_mask_follows_logical_elements_in_every_memory_layout():
    x = torch.randn(2, 3, 4, 5)
    expected = dropout_samples(x, 0.5, 2, seed=5)
    for layout in (
        x.to(memory_format=torch.channels_last),
        x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    ):
        found = dropout_samples(layout, 0.5, 2, seed=5)
        assert torch.equal(found, expected)
        assert found[0].stride() == layout.stride()


def test_nan_under_a_dropped_element_leaks_neither_forward_nor_backward():
    keep = dropout_mask((64,), _rate(0.5), torch.tensor(3), 1)[0]
    x = torch.where(keep, 1.0, float("nan")).requires_grad_()
    result = dropout_samples(x, 0.5, 1, seed=3)
    assert torch.equal(result[0], torch.where(keep, 2.0, 0.0))
    cotangent = torch.where(keep, 1.0, float("nan"))
    result.backward(cotangent[None])
    assert torch.equal(x.grad, torch.where(keep, 2.0, 0.0))


def test_nan_under_a_kept_element_propagates():
    assert dropout_samples(torch.tensor([float("nan")]), 0.0, 1).isnan().all()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_kept_fraction_lies_within_four_standard_deviations(p):
    count = 400_000
    kept = (dropout_samples(torch.ones(count // 4), p, 4, seed=1) != 0).sum().item()
    assert abs(kept - count * (1 - p)) < 4 * (count * p * (1 - p)) ** 0.5


def test_samples_and_rows_are_uncorrelated():
    kept = (dropout_samples(torch.ones(2, 100_000), 0.5, 2, seed=8) != 0).double().flatten(0, 1)
    correlation = torch.corrcoef(kept) - torch.eye(4)
    assert correlation.abs().max() < 0.02  # six standard deviations of 1 / sqrt(1e5)


def test_a_process_wide_backend_is_checked():
    with pytest.raises(ValueError, match="backend"), regularizers.use_backend("fast"):
        pass
    with pytest.raises(RuntimeError, match="CUDA"), regularizers.use_backend("cuda"):
        pass


def test_more_samples_than_elements():
    assert dropout_samples(torch.ones(1), 0.5, 1000, seed=0).shape == (1000, 1)
