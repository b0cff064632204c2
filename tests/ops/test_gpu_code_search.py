"""The codebook search on a CUDA device: the codes of the CPU, repeatable bits, no peak of n x K."""

import pytest
import torch

from regularizers.ops import nearest_code, sample_code
from tests.harness import DTYPES

pytestmark = pytest.mark.gpu


def _randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearest_codes_are_those_of_the_cpu(dtype):
    z, codebook = _randn(2000, 48).to(dtype), _randn(3000, 48, seed=1).to(dtype)
    found = nearest_code(z.cuda(), codebook.cuda()).cpu()
    # Ties within rounding may fall differently; half types have many.
    distance = (z[:, None].double() - codebook.double()).square().sum(-1)
    gap = distance.gather(1, found[:, None])[:, 0] - distance.amin(1)
    assert gap.max() < 1e-4


def test_draws_are_those_of_the_cpu_and_repeat_bit_by_bit():
    codebook, index = _randn(3000, 48), torch.arange(5000) % 3000
    selected = torch.rand(5000, generator=torch.Generator().manual_seed(2)) < 0.1
    expected = sample_code(index, codebook, selected=selected, temperature=20.0, seed=5)
    arguments = index.cuda(), codebook.cuda()
    found, again = (
        sample_code(*arguments, selected=selected.cuda(), temperature=20.0, seed=5)
        for _ in range(2)
    )
    assert torch.equal(found, again)
    # Gumbel variables differ by the rounding of the logarithms: ties may fall differently.
    assert (found.cpu() != expected).sum() <= 2


def test_memory_does_not_grow_with_tokens_times_codes():
    z, codebook = _randn(16384, 64).cuda(), _randn(16384, 64, seed=1).cuda()
    nearest_code(z, codebook)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nearest_code(z, codebook)
    assert torch.cuda.max_memory_allocated() - before < 64 << 20  # the distances would take 1 GiB
