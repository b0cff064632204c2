"""Batch statistics over two processes equal those of one process on the concatenated batch."""

import pytest
import torch
import torch.distributed as dist

from regularizers.representation import (
    intra_image_contrastive_loss,
    prototype_contrastive_loss,
    repa_loss,
    soft_mining_cosine_loss,
)
from tests.harness import found_by_processes

WORLD, BATCH = 2, 6


def _soft_mining(group):
    return lambda x, tables: soft_mining_cosine_loss(
        [tables["map"]], [x.view(-1, 4, 2, 3)], process_group=group
    )


def _repa(similarity):
    def make(group):
        return lambda x, tables: repa_loss(
            x.view(-1, 6, 4), tables["target"], similarity=similarity, process_group=group
        )

    return make


def _prototypes(group):
    return lambda x, tables: prototype_contrastive_loss(
        x.view(-1, 6, 4),
        tables["bank"],
        tables["table"],
        present=tables["present"],
        num_negatives=2,
        seed=5,
        process_group=group,
    )


def _intra(group):
    return lambda x, tables: intra_image_contrastive_loss(
        x.view(-1, 6, 4), tables["other"], tables["table"], process_group=group
    )


LOSSES = {
    "soft mining": _soft_mining,
    "REPA, cosine": _repa("cosine"),
    "REPA, nt_xent": _repa("nt_xent"),
    "prototypes": _prototypes,
    "intra-image": _intra,
}
# Means over entries and images: processes need not have equally many.
UNEVEN = ("soft mining", "REPA, cosine", "intra-image")


def _batch():
    """Inputs, the encoder that makes features of them, and what the losses compare with."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    x, weight = normal(BATCH, 5), normal(5, 24).requires_grad_()
    table = torch.randint(-1, 2, (BATCH, 6, 8), generator=generator)
    table[..., :2], table[..., 2] = 0, 1
    # The processes have different numbers of known entries, and of concepts that are present.
    table[:2, 1:, 3:] = -1
    present = torch.rand(BATCH, 6, generator=generator) < 0.6
    tables = {
        "map": normal(BATCH, 4, 2, 3),
        "target": normal(BATCH, 6, 4),
        "bank": normal(8, 4),
        "table": table,
        "present": present,
        "other": normal(BATCH, 8, 4),
    }
    return x, weight, tables


def _result(name, rows, group):
    x, weight, tables = _batch()
    tables = {key: value if key == "bank" else value[rows] for key, value in tables.items()}
    loss = LOSSES[name](group)(x[rows] @ weight, tables)
    (gradient,) = torch.autograd.grad(loss, weight)
    if group is not None:  # as DistributedDataParallel does
        dist.all_reduce(gradient, group=group)
        gradient /= WORLD
    return loss.detach(), gradient


def _process(rank):
    group = dist.group.WORLD
    half = slice(3 * rank, 3 * (rank + 1))
    part = slice(0, 2) if rank == 0 else slice(2, BATCH)
    return {
        "even": {name: _result(name, half, group) for name in LOSSES},
        "uneven": {name: _result(name, part, group) for name in UNEVEN},
    }


@pytest.fixture(scope="module")
def processes():
    """What every process found; one spawn for the file."""
    return found_by_processes(_process, WORLD)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_the_concatenated_batch(processes, name):
    expected = _result(name, slice(None), None)
    for found in processes:
        torch.testing.assert_close(found["even"][name], expected)


@pytest.mark.parametrize("name", UNEVEN)
def test_batches_may_differ_in_size(processes, name):
    expected = _result(name, slice(None), None)
    for found in processes:
        torch.testing.assert_close(found["uneven"][name], expected)


@pytest.mark.parametrize("name", ["soft mining", "REPA, nt_xent", "prototypes", "intra-image"])
def test_mean_of_the_losses_of_parts_is_another_loss(name):
    # Else the tests above would pass without any collective.
    whole = _result(name, slice(None), None)
    halves = [_result(name, rows, None) for rows in (slice(0, 3), slice(3, 6))]
    gradient = (halves[0][1] + halves[1][1]) / 2
    assert (gradient - whole[1]).abs().max() > 1e-3
