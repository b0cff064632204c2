"""The Triton kernel of gradient_gate against the reference: on a GPU, or interpreted."""

import pytest
import torch

from regularizers.ops import gradient_gate
from tests.harness import DTYPES
from tests.triton_harness import assert_agree, randn

# Without Triton the line above skips this file.
# isort: split
from regularizers.ops.triton import gradient_gate as kernels

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def _short_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_gates_agree(dtype, strength):
    a, b = randn(7, 3, 5, dtype=dtype), randn(7, 3, 5, dtype=dtype, seed=1)
    for options in ({"seed": 1}, {"seed": -5, "stream": 2**32 - 1}, {"seed": 2, "eps": 0.0}):
        assert_agree(lambda t, o=options: gradient_gate(t, b, strength, **o), a)
    other = b.transpose(0, 2)
    assert_agree(lambda t: gradient_gate(t, other, strength, seed=4), a.transpose(0, 2))


def test_what_is_not_finite_agrees():
    a = torch.tensor([float("inf"), float("nan"), 1.0, 0.0, 0.0, -1.0]).to(randn(1).device)
    for b in (a.flip(0), -a, torch.zeros_like(a)):
        assert_agree(lambda t, b=b: gradient_gate(t, b, 0.5, seed=3), a)


def test_nothing_is_gated_to_nothing():
    assert_agree(lambda t: gradient_gate(t, t.detach(), seed=1), randn(0, 3))
