"""Hyperbolic contrast and uncertainty over two processes equal those of the whole batch."""

import pytest
import torch
import torch.distributed as dist

from regularizers.representation import (
    MultiGrainedUncertaintyLoss,
    hyperbolic_info_nce,
    poincare_expmap0,
    uncertainty_matching_loss,
)
from tests.harness import found_by_processes

WORLD = 2
IDS = torch.tensor([0, 1, 0, 2, 1, 2, 2, 0])


def _hyperbolic(rows, group):
    return lambda z: hyperbolic_info_nce(
        poincare_expmap0(z[0]), IDS[rows], temperature=0.5, process_group=group
    )


def _uncertain(per):
    return lambda rows, group: (
        lambda z: uncertainty_matching_loss(z[0], z[1], per=per, process_group=group)
    )


def _annealed(rows, group):
    loss = MultiGrainedUncertaintyLoss(total_epochs=4, process_group=group)
    return lambda z: loss(z[0], z[1], z[2], epoch=1)


LOSSES = {
    "hyperbolic": _hyperbolic,
    "uncertain by batch": _uncertain("batch"),
    "uncertain by sample": _uncertain("sample"),
    "annealed": _annealed,
}


def _batch():
    """Three kinds of rows, and the encoder that makes embeddings of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, 4, generator=generator, dtype=torch.float64)
    weight = 0.3 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    return x, weight.requires_grad_()


def _results(rows, group):
    """Loss and gradient of the encoder of every loss."""
    x, weight = _batch()
    found = {}
    for name, make in LOSSES.items():
        loss = make(rows, group)(x[:, rows] @ weight)
        (gradient,) = torch.autograd.grad(loss, weight)
        if group is not None:  # as DistributedDataParallel does
            dist.all_reduce(gradient, group=group)
            gradient /= WORLD
        found[name] = (loss.detach(), gradient)
    return found


def _process(rank):
    return _results(slice(4 * rank, 4 * (rank + 1)), dist.group.WORLD)


@pytest.fixture(scope="module")
def processes():
    """What every process found; one spawn for the file."""
    return found_by_processes(_process, WORLD)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_the_concatenated_batch(processes, name):
    expected = _results(slice(None), None)[name]
    for found in processes:
        torch.testing.assert_close(found[name], expected)
