"""Triton kernels of drop_block and row_gate against the references: on a GPU, or interpreted."""

import pytest
import torch

import regularizers
from regularizers.ops import drop_block, row_gate
from tests.harness import DTYPES
from tests.triton_harness import DEVICE, assert_agree, randn

# Without Triton the line above skips this file.
# isort: split
from regularizers.ops.triton import drop_block as kernels

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def _short_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 64)  # the interpreter scans a tile element by element


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_blocks_agree(dtype, shared):
    x = randn(2, 2, 5, 7, dtype=dtype)
    call = lambda t, **o: drop_block(t, 0.4, 3, shared_channels=shared, seed=3, **o)
    assert_agree(call, x)
    assert_agree(call, x.to(memory_format=torch.channels_last))
    assert_agree(lambda t: call(t, gamma="exact", normalize="sample"), x.transpose(2, 3))


@pytest.mark.parametrize("shape", [(2, 1, 12, 11), (1, 2, 2, 90), (5, 1, 1, 1)])
@pytest.mark.parametrize("block_size", [1, 3, 19])
def test_tiles_and_halos_agree(shape, block_size):
    for p, shared in ((0.0, True), (0.2, False), (0.9, True)):
        call = lambda t, p=p, s=shared: drop_block(t, p, block_size, shared_channels=s, seed=5)
        assert_agree(call, randn(*shape))


def test_nothing_kept_gives_zeros_and_nothing_comes_of_nan_under_a_block():
    with regularizers.use_backend("triton"):
        ones = torch.ones(30, 1, 3, 3, device=DEVICE)
        found = drop_block(ones, 0.5, 3, gamma="exact", normalize="sample", seed=1)
        assert set(found.sum((1, 2, 3)).tolist()) == {0.0, 9.0}
        nan = torch.where(found == 0, torch.nan, ones)
        assert drop_block(nan, 0.5, 3, gamma="exact", seed=1).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_agree(dtype):
    x, r = randn(7, 3, 2, 5, dtype=dtype), randn(7, 3, 2, 5, dtype=dtype, seed=1)
    last = x.to(memory_format=torch.channels_last)
    for options in ({"p": 0.4}, {"p": 0.4, "stream": 2**32 - 1}, {"p": 0.0}, {"p": 1.0}):
        for scale in (True, False):
            call = lambda t, *r, o=options, s=scale: row_gate(
                t, residual=r[0] if r else None, seed=9, scale_by_keep=s, **o
            )
            assert_agree(call, x)
            assert_agree(call, x, r)
            assert_agree(call, last, r)


def test_rows_longer_than_a_block_agree():
    assert_agree(lambda t: row_gate(t, 0.5, seed=2), randn(5, 2500))


def test_dropped_rows_are_not_read():
    with regularizers.use_backend("triton"):
        x = torch.ones(16, 3, device=DEVICE)
        keep = row_gate(x, 0.5, seed=2) != 0
        assert row_gate(torch.where(keep, x, torch.nan), 0.5, seed=2).isfinite().all()
