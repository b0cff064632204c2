"""State and losses over two processes equal those of one process on the whole batch."""

import pytest
import torch
import torch.distributed as dist

from regularizers.mixing import AdaWAC
from tests.harness import found_by_processes

WORLD = 2
MODES = ("adawac", "trim_sparse", "trim_ratio", "reweight", "dro")


def _batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 3, generator=generator, dtype=torch.float64)
    weight = torch.rand(3, generator=generator, dtype=torch.float64).requires_grad_()
    index = torch.tensor([0, 5, 2, 5, 7, 1, 5, 2])  # 5 in both halves, 2 as well
    density = torch.tensor([0, 1, 1, 1, 0, 0, 1, 0])
    return x, weight, index, density


def _results(x, weight, index, density, group):
    """Loss and gradient of two steps of each mode, and the weights of the samples after them."""
    found = {}
    for mode in MODES:
        criterion = AdaWAC(9, mode=mode, weight_lr=1.0, process_group=group)
        for _ in range(2):
            losses, features = x @ weight, (x * weight, x)
            loss = criterion(losses, None, *features, index, label_density=density)
        (gradient,) = torch.autograd.grad(loss, weight)
        loss = loss.detach().clone()
        if group is not None:  # as DistributedDataParallel does
            dist.all_reduce(gradient, group=group)
            dist.all_reduce(loss, group=group)
            gradient, loss = gradient / WORLD, loss / WORLD
        found[mode] = (loss, gradient, criterion.weights.logit)
    return found


def _process(rank):
    x, weight, index, density = _batch()
    rows = slice(4 * rank, 4 * (rank + 1))
    return _results(x[rows], weight, index[rows], density[rows], dist.group.WORLD)


@pytest.fixture(scope="module")
def processes():
    """What every process found; one spawn for the family."""
    return found_by_processes(_process, WORLD)


@pytest.mark.parametrize("mode", MODES)
def test_loss_gradient_and_weights_are_those_of_the_whole_batch(processes, mode):
    expected = _results(*_batch(), None)[mode]
    for found in processes:
        for have, want in zip(found[mode], expected, strict=True):
            torch.testing.assert_close(have, want)


@pytest.mark.parametrize("mode", MODES)
def test_processes_hold_the_same_weights_bit_by_bit(processes, mode):
    assert torch.equal(processes[0][mode][2], processes[1][mode][2])
