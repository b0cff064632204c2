"""prefix_linear: the operator contract, and facts about what is kept."""

import pytest
import torch
from torch.nn import functional as F

import regularizers
from regularizers.ops import prefix_linear
from regularizers.ops.nested import PREFIX_LINEAR, PREFIX_LINEAR_BACKWARD
from tests.harness import GraphRecorder, OperatorContract, Sample


def _layer(rows, features, classes, dtype=torch.float32):
    return (
        torch.randn(rows, features, dtype=dtype),
        torch.randn(classes, features, dtype=dtype),
        torch.randn(classes, dtype=dtype),
    )


def _lengths(rows, features):
    return torch.randint(1, features + 1, (rows,), generator=torch.Generator().manual_seed(1))


def _masked(x, weight, bias, k):
    kept = torch.arange(x.shape[-1]) < k.unsqueeze(-1)
    return F.linear(torch.where(kept, x, 0), weight, bias)


def _call(x, weight, bias=None, *, k):
    return prefix_linear(x, weight, bias, k)


class TestContract(OperatorContract):
    bitwise_across_threads = False
    autocast_dtype = torch.bfloat16
    scheduled = {}

    def samples(self, dtype):
        x, weight, bias = _layer(5, 7, 3, dtype)
        k = _lengths(5, 7)
        batch = torch.randn(2, 3, 7, dtype=dtype)
        return [
            Sample("a length a row", (x, weight, bias), _call, {"k": k}),
            Sample("one length", (x, weight, bias), _call, {"k": torch.tensor(4)}),
            Sample("equal lengths", (x, weight, bias), _call, {"k": torch.full((5,), 4)}),
            Sample("all features", (x, weight, bias), _call, {"k": torch.full((5,), 7)}),
            Sample("no bias", (x, weight), _call, {"k": k}),
            Sample(
                "more dimensions", (batch, weight, bias), _call, {"k": _lengths(6, 7).reshape(2, 3)}
            ),
            Sample(
                "transposed", (x.T.contiguous().T, weight.T.contiguous().T, bias), _call, {"k": k}
            ),
            Sample("one of everything", _layer(1, 1, 1, dtype), _call, {"k": torch.ones(1).long()}),
        ]

    def empty(self, dtype):
        none = torch.ones(0, dtype=torch.int64)
        return [
            Sample("no rows", _layer(0, 4, 3, dtype), _call, {"k": none}),
            Sample("no rows, one length", _layer(0, 4, 3, dtype), _call, {"k": torch.tensor(2)}),
            Sample("no classes", _layer(3, 4, 0, dtype), _call, {"k": torch.tensor([1, 2, 4])}),
        ]

    def operator_calls(self):
        x, weight, bias = (t.requires_grad_() for t in _layer(5, 7, 3))
        grad = torch.randn(5, 3, requires_grad=True)
        k = _lengths(5, 7)
        return [
            (PREFIX_LINEAR, (x, weight, bias, k)),
            (PREFIX_LINEAR, (x, weight, None, torch.tensor(3))),
            (PREFIX_LINEAR_BACKWARD, (grad, x, weight, k, True, True)),
            (PREFIX_LINEAR_BACKWARD, (grad, x, weight, k, True, False)),
            (PREFIX_LINEAR_BACKWARD, (grad, x, weight, k, False, True)),
        ]

    def bad_inputs(self):
        x, weight, bias = _layer(2, 4, 3)
        k = torch.tensor([1, 2])
        return [
            (TypeError, "x must", lambda: prefix_linear([1.0], weight, bias, k)),
            (TypeError, "x must", lambda: prefix_linear(x.long(), weight, bias, k)),
            (TypeError, "weight must", lambda: prefix_linear(x, weight.double(), bias, k)),
            (ValueError, "weight must", lambda: prefix_linear(x, weight[:, :2], bias, k)),
            (ValueError, "bias must", lambda: prefix_linear(x, weight, bias[:1], k)),
            (TypeError, "bias must", lambda: prefix_linear(x, weight, [1.0, 2.0, 3.0], k)),
            (TypeError, "k must", lambda: prefix_linear(x, weight, bias, k.double())),
            (TypeError, "k must", lambda: prefix_linear(x, weight, bias, 1.5)),
            (ValueError, "k must", lambda: prefix_linear(x, weight, bias, 0)),
            (ValueError, "k must", lambda: prefix_linear(x, weight, bias, 5)),
            (ValueError, "k must", lambda: prefix_linear(x, weight, bias, k[None])),
            (ValueError, "k must", lambda: prefix_linear(x, weight, bias, torch.tensor([1, 2, 3]))),
            (ValueError, "k must", lambda: prefix_linear(x, weight, bias, torch.tensor([1, 5]))),
            (ValueError, "k must", lambda: PREFIX_LINEAR(x, weight, bias, torch.tensor([0, 1]))),
        ]


# Sizes at which the C++ kernel cuts the features into several panels.
@pytest.mark.parametrize("law", ["spread", "short", "two lengths"])
def test_panels_agree_with_masking(law):
    x, weight, bias = _layer(300, 1024, 200, torch.float64)
    k = {
        "spread": _lengths(300, 1024),
        "short": _lengths(300, 9),
        "two lengths": torch.where(torch.arange(300) % 3 == 0, 1024, 1),
    }[law]
    found, expected = [], []
    for call, results in ((prefix_linear, found), (_masked, expected)):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = call(*leaves, k)
        y.backward(torch.cos(torch.arange(y.numel()).double()).reshape(y.shape))
        results += [y, *(leaf.grad for leaf in leaves)]
    torch.testing.assert_close(found, expected)


def test_an_int_a_tensor_and_a_length_a_row_give_the_same_layer():
    x, weight, bias = _layer(6, 8, 3, torch.float64)
    expected = F.linear(x[:, :5], weight[:, :5], bias)
    for k in (5, torch.tensor(5), torch.full((6,), 5)):
        torch.testing.assert_close(prefix_linear(x, weight, bias, k), expected)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_gradients_of_what_is_dropped_are_exactly_zero(backend):
    x, weight, bias = _layer(40, 64, 3)
    k = _lengths(40, 50)
    for tensor in (x, weight):
        tensor.requires_grad_()
    with regularizers.use_backend(backend):
        prefix_linear(x, weight, bias, k).sum().backward()
    kept = torch.arange(64) < k[:, None]
    assert (x.grad[~kept] == 0).all()
    assert (x.grad[kept] != 0).all()
    assert (weight.grad[:, k.max() :] == 0).all()
    assert (weight.grad[:, : k.max()] != 0).all()


def test_a_dropped_nan_reaches_neither_result_nor_gradient():
    x, weight, bias = _layer(40, 64, 3)
    k = _lengths(40, 63)
    kept = torch.arange(64) < k[:, None]
    x = torch.where(kept, x, float("nan")).requires_grad_()
    weight.requires_grad_()
    y = prefix_linear(x, weight, bias, k)
    y.sum().backward()
    for tensor in (y, x.grad, weight.grad):
        assert tensor.isfinite().all()


def test_a_gradient_is_computed_only_for_what_asks():
    x, weight, bias = _layer(4, 8, 3)
    k = torch.tensor([1, 8, 3, 3])
    weight.requires_grad_()
    prefix_linear(x, weight, bias, k).sum().backward()
    assert x.grad is None
    grad_x, grad_weight = PREFIX_LINEAR_BACKWARD(
        torch.ones(4, 3), x, weight.detach(), k, False, True
    )
    assert grad_x.numel() == 0
    torch.testing.assert_close(grad_weight, weight.grad)


def test_lengths_may_change_in_one_compiled_graph(fresh_dynamo):
    x, weight, bias = _layer(6, 8, 3)
    graphs = GraphRecorder()
    compiled = torch.compile(prefix_linear, fullgraph=True, backend=graphs)
    for length in range(1, 9):
        torch.testing.assert_close(
            compiled(x, weight, bias, torch.tensor(length)),
            F.linear(x[:, :length], weight[:, :length], bias),
        )
    assert len(graphs) == 1


def test_half_types_accumulate_in_float32():
    # 4096 terms of 1/4096 sum to 1; in bfloat16 the sum would stop growing at 256 / 4096.
    x = torch.full((2, 4096), 1 / 64, dtype=torch.bfloat16)
    result = prefix_linear(x, x, None, torch.tensor([4096, 2048]))
    assert result.tolist() == [[1.0, 1.0], [0.5, 0.5]]
