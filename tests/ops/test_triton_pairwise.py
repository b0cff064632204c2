"""Triton kernels of pairwise_logsumexp against the reference: on a GPU, or in the interpreter."""

import pytest
import torch

import regularizers
from regularizers.ops import FalselyNear, LabelWindow, OtherLabel, SameLabel, pairwise_logsumexp
from regularizers.ops.pairwise import KINDS
from tests.harness import DTYPES
from tests.triton_harness import DEVICE, assert_agree, randn

pytestmark = pytest.mark.interpreter
SIZES = [(1, 1, 1), (9, 6, 3), (37, 70, 35), (70, 20, 17)]


def reduce(x, y=None, column_bias=None, **options):
    """Give one tensor; rows without pairs give 0."""
    found = pairwise_logsumexp(x, y, column_bias=column_bias, **options)
    logsumexp = torch.where(found.pair_count > 0, found.logsumexp, 0)
    return torch.stack([logsumexp, 0.1 * found.total, found.pair_count.to(logsumexp.dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_two_sides_agree(dtype, kind):
    for n, m, d in SIZES:
        tensors = randn(n, d, dtype=dtype), randn(m, d, dtype=dtype, seed=1), randn(m, seed=2)
        assert_agree(lambda *t, k=kind: reduce(*t, kind=k, scale=-0.2), *tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_side_agrees(dtype, kind):
    for n, _, d in SIZES:
        for exclude in (None, False):
            options = {"kind": kind, "scale": -0.2, "exclude_self": exclude}
            tensors = randn(n, d, dtype=dtype), randn(n, seed=2)
            assert_agree(lambda x, b, o=options: reduce(x, None, b, **o), *tensors)


@pytest.mark.parametrize("values", [1, 3])
def test_rules_agree(values):
    n = 37
    x, bias = randn(n, 5), randn(n, seed=1)
    targets, predictions = 2 * randn(n, values, seed=2), 2 * randn(n, values, seed=3)
    labels = torch.arange(n, device=DEVICE) % 5
    rules = [
        SameLabel(labels),
        OtherLabel(labels, labels.roll(3)),
        LabelWindow(targets, 1.0),
        FalselyNear(targets, predictions, 1.0, 0.3),
        FalselyNear(targets, predictions, 1.0, 0.3, "linear"),
        FalselyNear(targets, predictions, 1.0, 0.0, "linear"),
    ]
    for pairs in rules:
        assert_agree(lambda x, b, p=pairs: reduce(x, None, b, pairs=p), x, bias)


def test_labels_of_two_sides_agree():
    n, m = 37, 70
    labels = torch.arange(n, device=DEVICE) % 5, torch.arange(m, device=DEVICE) % 7 + 2**40
    pairs = OtherLabel(labels[0] + 2**40, labels[1])
    call = lambda x, y: reduce(x, y, kind="dist", scale=-1.0, pairs=pairs)
    assert_agree(call, randn(n, 5), randn(m, 5, seed=1))


def test_features_shared_out_over_programs_agree():
    # 150 features take two programs, which both make the scores.
    assert_agree(lambda x: reduce(x, kind="sqdist", scale=-0.01), randn(20, 150))


def test_no_rows_no_columns_and_no_features_agree():
    x, y = randn(5, 3), randn(4, 3)
    for tensors in ((x[:0], y), (x, y[:0]), (x[:, :0], y[:, :0])):
        with regularizers.use_backend("triton"):
            found = pairwise_logsumexp(*tensors)
        with regularizers.use_backend("reference"):
            torch.testing.assert_close(found, pairwise_logsumexp(*tensors))


def test_nan_gives_nan():
    x = randn(20, 3)
    x[5, 1] = torch.nan
    with regularizers.use_backend("triton"):
        leaf = x.clone().requires_grad_()
        found = pairwise_logsumexp(leaf)
        found.logsumexp.sum().backward()
    assert found.logsumexp.isnan().all()
    assert leaf.grad.isnan().all()
