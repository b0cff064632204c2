"""Triton kernels of prefixes against the references: on a GPU, or in the interpreter."""

import pytest
import torch

import regularizers
from regularizers.ops import (
    expected_prefix_cross_entropy,
    prefix_accuracy,
    prefix_linear,
)
from tests.harness import DTYPES
from tests.triton_harness import DEVICE, assert_agree, randn

# Without Triton the line above skips this file.
# isort: split
from regularizers.ops.triton import prefix_scan as scan_kernels

pytestmark = pytest.mark.interpreter


def _classifier(rows, features, classes, dtype=torch.float32):
    return (
        randn(rows, features, dtype=dtype),
        randn(classes, features, dtype=dtype, seed=1) / 2,
        randn(classes, dtype=dtype, seed=2),
    )


def _integers(high, *shape):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 7, 3), (70, 40, 20)])
def test_layers_agree(dtype, sizes):
    rows, features, _ = sizes
    x, weight, bias = _classifier(*sizes, dtype)
    lengths = _integers(features, rows) + 1
    for k in (lengths, torch.tensor((features + 1) // 2, device=DEVICE), lengths // 8 + 1):
        k = k.clamp(max=features)
        assert_agree(lambda *t, k=k: prefix_linear(*t, k), x, weight, bias)
        assert_agree(lambda x, w, k=k: prefix_linear(x, w, None, k), x, weight)


def test_layers_longer_than_a_panel_agree():
    x, weight, bias = _classifier(40, 300, 5)
    k = _integers(260, 40) + 1
    assert_agree(lambda *t: prefix_linear(*t, k), x, weight, bias)


def test_second_derivatives_stay_on_the_kernels():
    x, weight, _ = _classifier(5, 7, 3, torch.float64)
    k = _integers(7, 5) + 1

    def slope(x, weight):
        y = prefix_linear(x, weight, None, k).square().sum()
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        return gradient

    assert_agree(slope, x, weight)


def test_a_dropped_nan_reaches_neither_result_nor_gradient():
    x, weight, bias = _classifier(20, 40, 3)
    k = _integers(39, 20) + 1
    kept = torch.arange(40, device=DEVICE) < k[:, None]
    with regularizers.use_backend("triton"):
        leaves = [torch.where(kept, x, torch.nan).requires_grad_(), weight.requires_grad_()]
        y = prefix_linear(*leaves, bias, k)
    y.sum().backward()
    assert y.isfinite().all()
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
    assert (leaves[0].grad[~kept] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 7, 3), (40, 9, 17)])
def test_expected_losses_agree(dtype, sizes):
    rows, features, classes = sizes
    x, weight, bias = _classifier(*sizes, dtype)
    target = _integers(classes, rows)
    target[3::4] = -100
    law = randn(features, seed=5).abs() / features
    law[1::3] = 0
    loss = lambda *t: expected_prefix_cross_entropy(*t, target, law, reduction="none")
    assert_agree(loss, x, weight, bias)
    assert_agree(
        lambda x, w: expected_prefix_cross_entropy(x, w, None, target, law, reduction="sum"),
        x, weight,
    )  # fmt: skip


def test_several_tiles_of_classes_groups_of_rows_and_checkpoints_agree(monkeypatch):
    monkeypatch.setattr(scan_kernels, "GRADIENT_CLASSES", 4)
    monkeypatch.setattr(scan_kernels, "GRADIENT_ROWS", 2)
    monkeypatch.setattr(scan_kernels, "FILLING_PROGRAMS", 6)
    monkeypatch.setattr(scan_kernels, "CHECKPOINT_STEPS", 3)
    x, weight, bias = _classifier(9, 11, 10)
    target, law = _integers(10, 9), torch.full((11,), 1 / 11, device=DEVICE)
    assert_agree(lambda *t: expected_prefix_cross_entropy(*t, target, law), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 7, 3), (40, 9, 150)])
def test_accuracies_agree(dtype, sizes):
    # Small integers: exact sums, and many level logits.
    rows, features, classes = sizes
    x = (_integers(3, rows, features) - 1).to(dtype)
    weight = (_integers(5, classes, features) - 2).to(dtype)
    target = _integers(classes, rows)
    found = []
    for backend in ("triton", "reference"):
        with regularizers.use_backend(backend):
            found.append(prefix_accuracy(x, weight, None, target))
    assert torch.equal(*found)
