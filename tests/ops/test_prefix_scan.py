"""All prefixes of a classifier: the operator contract for logits and loss, facts of all three."""

import pytest
import torch
from torch.nn import functional as F

import regularizers
from regularizers.ops import expected_prefix_cross_entropy, prefix_accuracy, prefix_logits
from regularizers.ops.prefix_scan import (
    PREFIX_ACCURACY,
    PREFIX_CROSS_ENTROPY,
    PREFIX_CROSS_ENTROPY_BACKWARD,
    PREFIX_LOGITS,
)
from tests.harness import OperatorContract, Sample

NAN = float("nan")


def _classifier(rows, features, classes, dtype=torch.float32):
    return (
        torch.randn(rows, features, dtype=dtype),
        torch.randn(classes, features, dtype=dtype) / 2,
        torch.randn(classes, dtype=dtype),
    )


def _law(features):
    generator = torch.Generator().manual_seed(2)
    return torch.rand(features, dtype=torch.float64, generator=generator) / features


def _loss(x, weight, bias=None, *, target, probs, **options):
    return expected_prefix_cross_entropy(x, weight, bias, target, probs, **options)


def _loop(x, weight, bias, target):
    return torch.stack(
        [
            (F.linear(x[:, :k], weight[:, :k], bias).argmax(1) == target).sum()
            for k in range(1, x.shape[1] + 1)
        ]
    )


class TestLogitsContract(OperatorContract):
    bitwise_across_threads = True
    autocast_dtype = torch.bfloat16
    scheduled = {}

    def samples(self, dtype):
        def logits(x, weight, bias=None):
            return prefix_logits(x, weight, bias)

        x, weight, bias = _classifier(5, 7, 3, dtype)
        return [
            Sample("odd sizes", (x, weight, bias), logits),
            Sample("no bias", (x, weight), logits),
            Sample("transposed", (x.T.contiguous().T, weight.T.contiguous().T, bias), logits),
            Sample("one of everything", _classifier(1, 1, 1, dtype), logits),
        ]

    def empty(self, dtype):
        return [
            Sample("no rows", _classifier(0, 4, 3, dtype), prefix_logits),
            Sample("no features", _classifier(3, 0, 3, dtype), prefix_logits),
        ]

    def operator_calls(self):
        return [(PREFIX_LOGITS, tuple(t.requires_grad_() for t in _classifier(5, 7, 3)))]

    def bad_inputs(self):
        x, weight, bias = _classifier(2, 4, 3)
        return [
            (TypeError, "x must", lambda: prefix_logits([1.0], weight, bias)),
            (ValueError, "x must", lambda: prefix_logits(x[None], weight, bias)),
            (TypeError, "weight must", lambda: prefix_logits(x, weight.double(), bias)),
            (ValueError, "weight must", lambda: prefix_logits(x, weight[:, :2], bias)),
            (ValueError, "bias must", lambda: prefix_logits(x, weight, bias[:2])),
        ]


class TestLossContract(OperatorContract):
    bitwise_across_threads = False  # the ranges of rows are one a thread
    autocast_dtype = torch.float32
    scheduled = {}

    def samples(self, dtype):
        tensors = _classifier(5, 7, 3, dtype)
        target = torch.tensor([0, 2, -100, 1, 1])
        options = {"target": target, "probs": _law(7)}
        cut = {**options, "probs": torch.where(torch.arange(7) % 4 == 1, _law(7), 0)}
        x, weight, bias = tensors
        return [
            Sample("odd sizes", tensors, _loss, options),
            Sample("sum", tensors, _loss, {**options, "reduction": "sum"}),
            Sample("none", tensors, _loss, {**options, "reduction": "none"}),
            Sample("no bias", tensors[:2], _loss, options),
            Sample("lengths of probability 0", tensors, _loss, cut),
            Sample(
                "transposed", (x.T.contiguous().T, weight.T.contiguous().T, bias), _loss, options
            ),
            Sample(
                "one of everything",
                _classifier(1, 1, 1, dtype),
                _loss,
                {"target": torch.zeros(1).long(), "probs": torch.ones(1)},
            ),
        ]

    def empty(self, dtype):
        none = torch.zeros(0, dtype=torch.int64)
        return [
            Sample(
                "no rows", _classifier(0, 4, 3, dtype), _loss, {"target": none, "probs": _law(4)}
            ),
            Sample(
                "no row counts",
                _classifier(2, 4, 3, dtype),
                _loss,
                {"target": torch.tensor([-100, -100]), "probs": _law(4), "reduction": "sum"},
            ),
        ]

    def operator_calls(self):
        x, weight, bias = (t.requires_grad_() for t in _classifier(5, 7, 3))
        target, law = torch.tensor([0, 2, -100, 1, 1]), _law(7)
        _, shift = PREFIX_CROSS_ENTROPY(x, weight, bias, target, law, -100)
        grad = torch.rand(5, requires_grad=True)
        return [
            (PREFIX_CROSS_ENTROPY, (x, weight, bias, target, law, -100)),
            (PREFIX_CROSS_ENTROPY, (x, weight, None, target, law, -100)),
            (
                PREFIX_CROSS_ENTROPY_BACKWARD,
                (grad, x, weight, bias, target, law, shift.detach(), -100),
            ),
        ]

    def bad_inputs(self):
        x, weight, bias = _classifier(2, 4, 3)
        y, law = torch.tensor([0, 2]), _law(4)
        loss = expected_prefix_cross_entropy
        return [
            (TypeError, "x must", lambda: loss([1.0], weight, bias, y, law)),
            (ValueError, "weight must", lambda: loss(x, weight[:, :2], bias, y, law)),
            (TypeError, "target must", lambda: loss(x, weight, bias, y.float(), law)),
            (ValueError, "target must", lambda: loss(x, weight, bias, y[:1], law)),
            (ValueError, "target must", lambda: loss(x, weight, bias, y + 1, law)),
            (ValueError, "target must", lambda: loss(x, weight, bias, y - 1, law)),
            (TypeError, "probs must", lambda: loss(x, weight, bias, y, [0.5] * 4)),
            (TypeError, "probs must", lambda: loss(x, weight, bias, y, law.long())),
            (ValueError, "probs must", lambda: loss(x, weight, bias, y, law[:3])),
            (ValueError, "probs must", lambda: loss(x, weight, bias, y, -law)),
            (ValueError, "probs must", lambda: loss(x, weight, bias, y, law * NAN)),
            (ValueError, "probs must", lambda: loss(x, weight, bias, y, law.requires_grad_())),
            (
                ValueError,
                "reduction must",
                lambda: loss(x, weight, bias, y, _law(4), reduction="x"),
            ),
        ]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("shape", [(5, 7, 3), (37, 130, 50), (1, 1, 1), (16, 8, 40)])
def test_accuracy_equals_the_loop_over_prefixes(backend, shape):
    x, weight, bias = _classifier(*shape, torch.float64)
    target = torch.randint(shape[2], (shape[0],))
    with regularizers.use_backend(backend):
        found = prefix_accuracy(x, weight, bias, target)
    assert torch.equal(found, _loop(x, weight, bias, target))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("classes", [3, 100])
def test_of_level_logits_the_first_wins_as_in_argmax(backend, classes):
    # Small integers: sums are exact, and level logits frequent.
    x = torch.randint(-1, 2, (50, 20)).float()
    weight = torch.randint(-1, 2, (classes, 20)).float()
    target = torch.randint(classes, (50,))
    with regularizers.use_backend(backend):
        found = prefix_accuracy(x, weight, None, target)
    assert torch.equal(found, _loop(x, weight, None, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy_in_every_type_equals_the_reference(dtype):
    x, weight, bias = _classifier(50, 40, 20, dtype)
    target = torch.randint(20, (50,))
    with regularizers.use_backend("reference"):
        expected = prefix_accuracy(x, weight, bias, target)
    assert (prefix_accuracy(x, weight, bias, target) - expected).abs().max() <= 1  # near ties


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_row_with_nan_is_wrong_from_there_on(backend):
    x = torch.tensor([[1.0, NAN, 1.0], [1.0, 1.0, 1.0]])
    weight = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    with regularizers.use_backend(backend):
        assert prefix_accuracy(x, weight, None, torch.tensor([0, 0])).tolist() == [2, 1, 1]


def test_accuracy_of_nothing_is_empty_or_zero():
    _, weight, bias = _classifier(1, 4, 3)
    none = torch.zeros(0, dtype=torch.int64)
    assert prefix_accuracy(torch.empty(0, 4), weight, bias, none).tolist() == [0, 0, 0, 0]
    found = prefix_accuracy(torch.empty(2, 0), torch.empty(3, 0), bias, torch.tensor([0, 1]))
    assert found.shape == (0,)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_accuracy_refuses_targets_out_of_range(backend):
    x, weight, bias = _classifier(2, 4, 3)
    with regularizers.use_backend(backend):
        for bad in (torch.tensor([0, 3]), torch.tensor([-100, 1])):
            with pytest.raises(ValueError, match="target must"):
                prefix_accuracy(x, weight, bias, bad)


def test_accuracy_passes_opcheck_compiles_and_carries_no_gradient(fresh_dynamo):
    x, weight, bias = _classifier(9, 7, 3)
    target = torch.randint(3, (9,))
    results = torch.library.opcheck(PREFIX_ACCURACY.kernel(None), (x, weight, bias, target))
    assert set(results.values()) == {"SUCCESS"}
    compiled = torch.compile(prefix_accuracy, fullgraph=True, backend="aot_eager")
    found = compiled(x.requires_grad_(), weight, bias, target)
    assert not found.requires_grad
    assert torch.equal(found, prefix_accuracy(x, weight, bias, target))


def test_logits_of_prefix_k_are_those_of_the_linear_layer_on_it():
    x, weight, bias = _classifier(4, 6, 3, torch.float64)
    z = prefix_logits(x, weight, bias)
    for k in range(1, 7):
        torch.testing.assert_close(z[k - 1], F.linear(x[:, :k], weight[:, :k], bias))


def test_expected_loss_is_the_mean_of_the_losses_of_all_prefixes():
    x, weight, bias = _classifier(8, 6, 3, torch.float64)
    target, law = torch.randint(3, (8,)), _law(6)
    z = prefix_logits(x, weight, bias)
    expected = sum(law[k] * F.cross_entropy(z[k], target) for k in range(6))
    torch.testing.assert_close(
        expected_prefix_cross_entropy(x, weight, bias, target, law), expected
    )


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_features_behind_the_last_length_that_counts_get_no_gradient(backend):
    x, weight, bias = _classifier(8, 6, 3)
    for tensor in (x, weight):
        tensor.requires_grad_()
    law = torch.tensor([0.2, 0.0, 0.8, 0.0, 0.0, 0.0])
    with regularizers.use_backend(backend):
        loss = expected_prefix_cross_entropy(x, weight, bias, torch.randint(3, (8,)), law)
    loss.backward()
    for gradient in (x.grad, weight.grad):
        assert (gradient[:, 3:] == 0).all()
        assert (gradient[:, :3] != 0).all()


def test_walking_down_by_subtraction_stays_within_rounding_of_float64():
    # 1000 features: 15 stored sets of logits, and steps between them.
    x, weight, bias = _classifier(16, 1000, 12, torch.float64)
    target, law = torch.randint(12, (16,)), torch.full((1000,), 1e-3)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        loss = expected_prefix_cross_entropy(*leaves, target, law)
        gradients.append([g.double() for g in torch.autograd.grad(loss, leaves)])
    for narrow, wide in zip(*gradients, strict=True):
        # Logits of size 30 carry 2^-19 each in float32, and gradients inherit it relatively.
        assert (narrow - wide).abs().max() < 2e-5 * wide.abs().max()


def test_small_tails_of_the_law_keep_their_relative_precision():
    # Summed from the last feature down, G_d is not the difference of large numbers.
    x, weight, bias = _classifier(8, 40, 5, torch.float64)
    law = torch.exp(-torch.arange(1.0, 41.0).double())
    target = torch.randint(5, (8,))
    columns = []
    for dtype in (torch.float32, torch.float64):
        leaf = weight.to(dtype).requires_grad_()
        expected_prefix_cross_entropy(x.to(dtype), leaf, bias.to(dtype), target, law).backward()
        columns.append(leaf.grad[:, 30:].double())
    torch.testing.assert_close(*columns, rtol=1e-3, atol=0)
