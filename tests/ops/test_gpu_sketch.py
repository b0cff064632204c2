"""The sliced statistics on a CUDA device: values of the CPU, no waiting, memory."""

import pytest
import torch

from regularizers.ops import sliced_characteristic, sliced_epps_pulley, sliced_quantile
from regularizers.transport import random_slices, sigreg, visreg
from tests.harness import DTYPES, TOLERANCES, forward_and_gradients

pytestmark = pytest.mark.gpu

STATISTICS = {
    "epps_pulley": sliced_epps_pulley,
    "characteristic": sliced_characteristic,
    "quantile": lambda z, a: sliced_quantile(
        z, a, torch.linspace(-3, 3, z.shape[1], dtype=a.dtype, device=a.device)
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [100, 5000])
@pytest.mark.parametrize("name", STATISTICS)
def test_results_and_gradients_agree_with_the_cpu(name, rows, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z = torch.randn(2, rows, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
    slices = random_slices(70, 100, seed=1, dtype=wide)
    results = []
    for device in ("cpu", "cuda"):
        a = slices.to(device)
        leaf = z.to(device).requires_grad_()
        loss, (gradient,) = forward_and_gradients(lambda z, a=a: STATISTICS[name](z, a), (leaf,))
        results.append((loss.cpu() / max(1, loss.abs().max().item()), gradient.cpu()))
    torch.testing.assert_close(*results, **TOLERANCES[dtype])


def test_slices_of_a_seed_are_those_of_the_cpu():
    found = random_slices(33, 50, seed=7, device="cuda")
    torch.testing.assert_close(found.cpu(), random_slices(33, 50, seed=7))


@pytest.mark.parametrize("loss", [sigreg, visreg])
def test_nothing_waits_for_the_device(loss):
    z = torch.randn(2, 64, 32, device="cuda", requires_grad=True)
    loss(z).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(z).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert z.grad.isfinite().all()


def test_no_array_of_batch_times_slices():
    z = torch.randn(1, 4096, 256, device="cuda", requires_grad=True)
    slices = random_slices(256, 16384, seed=1, device="cuda")
    sliced_epps_pulley(z, slices).backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sliced_epps_pulley(z, slices).backward()
    assert torch.cuda.max_memory_allocated() - before < 4096 * 16384 * 4 / 2
