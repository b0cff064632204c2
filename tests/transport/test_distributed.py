"""Batch statistics over two processes equal those of one process on the concatenated batch."""

import pytest
import torch
import torch.distributed as dist

from regularizers.transport import (
    CramerVonMises,
    Moments,
    SIGReg,
    SlicedRegularizer,
    SubspaceSIGReg,
    VISReg,
    sliced_gaussian_wasserstein,
    vicreg_loss,
)
from tests.harness import found_by_processes

WORLD = 2
DIM = 6


def _sliced_wasserstein(group):
    # An odd number of slices: the processes' shares differ.
    return lambda z: sliced_gaussian_wasserstein(z, num_slices=7, process_group=group)


def _subspaces(group):
    generator = torch.Generator().manual_seed(2)
    module = SubspaceSIGReg(
        DIM, 2, num_slices=8, generator=generator, process_group=group, dtype=torch.float64
    )
    return lambda z: module(z.transpose(0, 1))


LOSSES = {
    "SIGReg": lambda group: SIGReg(num_slices=8, process_group=group),
    "VISReg": lambda group: VISReg(num_slices=8, process_group=group),
    "sliced Wasserstein": _sliced_wasserstein,
    "VICReg": lambda group: lambda z: vicreg_loss(z, process_group=group),
    "Cramer-von Mises": lambda group: SlicedRegularizer(
        CramerVonMises(), num_slices=8, process_group=group
    ),
    "Moments": lambda group: SlicedRegularizer(Moments(), num_slices=8, process_group=group),
    "subspaces": _subspaces,
}


def _batch():
    """Views x batch x features, and the encoder that makes embeddings of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 10, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, DIM, generator=generator, dtype=torch.float64)
    return x, weight.requires_grad_()


def _results(x, weight, group):
    """Loss and gradient of the encoder of every loss, with equal slices everywhere."""
    found = {}
    for name, make in LOSSES.items():
        torch.manual_seed(6)
        loss = make(group)(x @ weight)
        (gradient,) = torch.autograd.grad(loss, weight)
        if group is not None:  # as DistributedDataParallel does
            dist.all_reduce(gradient, group=group)
            gradient /= WORLD
        found[name] = (loss.detach(), gradient)
    return found


def _process(rank):
    x, weight = _batch()
    rows = slice(5 * rank, 5 * (rank + 1))
    group = dist.group.WORLD
    found = {"even": _results(x[:, rows], weight, group)}
    rows = slice(0, 3) if rank == 0 else slice(3, 10)
    z = x[:, rows] @ weight
    torch.manual_seed(6)
    found["uneven"] = SIGReg(num_slices=8, process_group=group)(z).detach()
    torch.manual_seed(rank)
    found["seeds"] = SIGReg(num_slices=8, process_group=group)(z).detach()
    try:
        sliced_gaussian_wasserstein(x[:, :5], num_slices=1, process_group=group)
    except ValueError as error:
        found["error"] = str(error)
    return found


@pytest.fixture(scope="module")
def processes():
    """What every process found; one spawn for the family."""
    return found_by_processes(_process, WORLD)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_the_concatenated_batch(processes, name):
    expected = _results(*_batch(), None)[name]
    for found in processes:
        torch.testing.assert_close(found["even"][name], expected)


def test_batches_of_sigreg_may_differ_in_size(processes):
    x, weight = _batch()
    torch.manual_seed(6)
    expected = SIGReg(num_slices=8)(x @ weight).detach()
    for found in processes:
        torch.testing.assert_close(found["uneven"], expected)


def test_processes_agree_on_slices_whatever_their_seeds(processes):
    assert torch.equal(processes[0]["seeds"], processes[1]["seeds"])


def test_fewer_slices_than_processes_are_refused(processes):
    for found in processes:
        assert found["error"] == "num_slices must be at least the number of processes, 2, got 1"
