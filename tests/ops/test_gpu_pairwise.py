"""pairwise_logsumexp on a CUDA device: the values of the CPU, repeatable bits, no peak of N x M."""

import pytest
import torch

from regularizers.ops import FalselyNear, SameLabel, nearest_neighbour, pairwise_logsumexp
from regularizers.ops.pairwise import KINDS
from tests.harness import DTYPES, TOLERANCES, forward_and_gradients

pytestmark = pytest.mark.gpu


def _randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _reduce(x, y=None, **options):
    found = pairwise_logsumexp(x, y, **options)
    return torch.stack([found.logsumexp, 1e-3 * found.total])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_and_gradients_are_those_of_the_cpu(dtype, kind):
    tensors = _randn(700, 48).to(dtype), _randn(500, 48, seed=1).to(dtype)
    # tf32x3 products keep nearly the digits of float32; 700 of them are added up.
    tolerance = TOLERANCES[dtype] if dtype.itemsize != 4 else {"rtol": 1e-4, "atol": 1e-4}
    for sides in (tensors, tensors[:1]):
        call = lambda *t: _reduce(*t, kind=kind, scale=-0.2)
        expected = forward_and_gradients(call, [t.clone().requires_grad_() for t in sides])
        found = forward_and_gradients(call, [t.cuda().requires_grad_() for t in sides])
        for have, want in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
            torch.testing.assert_close(have.cpu(), want, **tolerance)


def test_rules_are_those_of_the_cpu_and_repeat_bit_by_bit():
    x, targets, predictions = _randn(600, 32), _randn(600, seed=1), _randn(600, seed=2)
    labels = torch.arange(600) % 7
    rules = [
        (SameLabel(labels), SameLabel(labels.cuda())),
        (
            FalselyNear(targets, predictions, 0.5, 0.1),
            FalselyNear(targets.cuda(), predictions.cuda(), 0.5, 0.1),
        ),
    ]
    for here, there in rules:
        expected = pairwise_logsumexp(x, pairs=here)
        found, again = (pairwise_logsumexp(x.cuda(), pairs=there) for _ in range(2))
        assert torch.equal(found.pair_count.cpu(), expected.pair_count)
        torch.testing.assert_close(found.logsumexp.cpu(), expected.logsumexp, rtol=1e-4, atol=1e-4)
        assert all(map(torch.equal, found, again))


def test_memory_does_not_grow_with_the_pairs():
    x = _randn(16384, 64).cuda().requires_grad_()
    pairwise_logsumexp(x, kind="sqdist", scale=-0.1).logsumexp.sum().backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pairwise_logsumexp(x, kind="sqdist", scale=-0.1).logsumexp.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 64 << 20  # the scores would take 1 GiB


def test_nearest_neighbours_are_those_of_the_cpu():
    x = _randn(3000, 32)
    for found, expected in zip(nearest_neighbour(x.cuda()), nearest_neighbour(x), strict=True):
        torch.testing.assert_close(found.cpu(), expected)
