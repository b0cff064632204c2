"""The loss of a sparse autoencoder over two processes is that of one process on the whole batch."""

import pytest
import torch
import torch.distributed as dist

from regularizers.representation import TopKSAE, VariationalTopKSAE
from tests.harness import found_by_processes

WORLD = 2
TOKENS = 10

BUILDS = {
    "plain": lambda group: TopKSAE(4, 60, 3, dead_after=TOKENS, process_group=group),
    "variational": lambda group: VariationalTopKSAE(
        4, 60, 3, variance="none", dead_after=TOKENS, process_group=group
    ),
}


def _results(x, group):
    """Loss and gradients of every autoencoder, and its counters."""
    found = {}
    for name, build in BUILDS.items():
        torch.manual_seed(6)
        sae = build(group).double()
        sae.loss(x)  # now latents that were silent are dead
        loss = sae.loss(x)
        gradients = torch.autograd.grad(loss.total, list(sae.parameters()))
        if group is not None:  # as DistributedDataParallel does
            for gradient in gradients:
                dist.all_reduce(gradient, group=group)
                gradient /= WORLD
        found[name] = ([term.detach() for term in loss], gradients, sae.silent_tokens)
    return found


def _batch():
    return torch.randn(TOKENS, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _process(rank):
    x = _batch()
    return _results(x[:3] if rank == 0 else x[3:], dist.group.WORLD)


@pytest.fixture(scope="module")
def by_processes():
    return found_by_processes(_process, WORLD)


@pytest.mark.parametrize("name", BUILDS)
def test_two_processes_agree_with_one_on_the_whole_batch(name, by_processes):
    losses, gradients, silent = _results(_batch(), None)[name]
    assert losses[-1] > 0  # the auxiliary term is at work
    for found in by_processes:
        torch.testing.assert_close(found[name][0], losses)
        torch.testing.assert_close(found[name][1], gradients)
        assert torch.equal(found[name][2], silent)
