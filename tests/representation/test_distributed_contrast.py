"""Contrasts over two processes equal those of one process on the concatenated batch."""

import pytest
import torch
import torch.distributed as dist

from regularizers.representation import (
    batch_contrastive_loss,
    batch_softmax_loss,
    conr_loss,
    mnr_loss,
    mnr_plus_loss,
    spread_out_loss,
)
from tests.harness import found_by_processes

WORLD = 2
ROWS = 10


def _conr(a, b, extra, group):
    targets, predictions, weights = extra[:, :2], extra[:, 2:4], extra[:, 4].abs()
    return conr_loss(a, targets, predictions, weights=weights, temperature=0.5, process_group=group)


LOSSES = {
    "ConR": _conr,
    "MNR": lambda a, b, extra, group: mnr_loss(a, b, negatives=b.flip(1), process_group=group),
    "MNR+": lambda a, b, extra, group: mnr_plus_loss(a, b, process_group=group),
    "MNR+ soft": lambda a, b, extra, group: mnr_plus_loss(
        a, b, targets="soft", process_group=group
    ),
    "contrast": lambda a, b, extra, group: batch_contrastive_loss(
        a, b, symmetric=True, process_group=group
    ),
    "batch softmax": lambda a, b, extra, group: batch_softmax_loss(
        a, b, temperature=0.5, log_q=extra[:, 0], process_group=group
    ),
    "spread-out": lambda a, b, extra, group: spread_out_loss(a, process_group=group),
    "second moment": lambda a, b, extra, group: spread_out_loss(
        a, form="second_moment", process_group=group
    ),
}


def _batch():
    """Inputs, an encoder that makes embeddings of them, and what else the losses take."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    return draw(2, ROWS, 4), draw(ROWS, 5), draw(4, 6).requires_grad_()


def _results(x, extra, weight, group):
    """Loss and gradient of the encoder of every loss."""
    found = {}
    for name, loss_of in LOSSES.items():
        loss = loss_of(*(x @ weight), extra, group)
        (gradient,) = torch.autograd.grad(loss, weight)
        if group is not None:  # as DistributedDataParallel does
            dist.all_reduce(gradient, group=group)
            gradient /= WORLD
        found[name] = (loss.detach(), gradient)
    return found


def _process(rank):
    x, extra, weight = _batch()
    rows = slice(ROWS // WORLD * rank, ROWS // WORLD * (rank + 1))
    return _results(x[:, rows], extra[rows], weight, dist.group.WORLD)


@pytest.fixture(scope="module")
def processes():
    """What every process found; one spawn for the file."""
    return found_by_processes(_process, WORLD)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_the_concatenated_batch(processes, name):
    expected = _results(*_batch(), None)[name]
    assert expected[1].abs().max() > 1e-3
    for found in processes:
        torch.testing.assert_close(found[name], expected)
