"""Contrast by label, the latent split and the game over two processes equal the whole batch."""

import pytest
import torch
import torch.distributed as dist

from regularizers.information import MCR, XFactorsLoss, nt_xent, supervised_info_nce
from tests.harness import found_by_processes

WORLD = 2
LABELS = torch.tensor([0, 1, 0, 2, 1, 2, -1, 0])
PERMUTATIONS = [(torch.arange(8).roll(k), torch.arange(8)) for k in (1, 3)]


def _supervised(rows, group):
    return lambda z, head: supervised_info_nce(
        z[0], LABELS[rows], temperature=0.5, ignore_index=-1, process_group=group
    )


def _nt_xent(rows, group):
    return lambda z, head: nt_xent(z[0], LABELS[rows], process_group=group)


def _split(rows, group):
    labels = torch.stack([LABELS, LABELS.flip(0)], 1)[rows]
    loss = XFactorsLoss([2, 2], kl_weight=0.1, cov_weight=0.5, process_group=group)
    call = lambda z, head: loss(z[0], z[1], z[2], z[3], z[0], labels, recon=z[1].square().mean())
    return lambda z, head: call(z, head).total


def _game(strategy):
    def make(rows, group):
        def call(z, head):
            fusion = lambda latents: torch.cat(list(latents), 1).tanh() @ head
            game = MCR(fusion, strategy=strategy, contrast_weight=0.3, process_group=group)
            latents = [z[0], z[1]]
            labels = LABELS[rows].clamp_min(0)
            return game(latents, fusion(latents), labels, permutations=PERMUTATIONS).total

        return call

    return make


LOSSES = {
    "supervised": _supervised,
    "NT-Xent": _nt_xent,
    "split": _split,
    "greedy game": _game("greedy"),
    "collaborative game": _game("collaborative"),
}


def _batch():
    """Four kinds of rows, the encoder that makes latents of them, and a head."""
    generator = torch.Generator().manual_seed(0)
    x, weight, head = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((4, 8, 4), (4, 4), (8, 3))
    )
    return x, weight.requires_grad_(), head.requires_grad_()


def _results(rows, group):
    """Loss and gradients of encoder and head of every loss."""
    x, weight, head = _batch()
    found = {}
    for name, make in LOSSES.items():
        loss = make(rows, group)(x[:, rows] @ weight, head)
        gradients = torch.autograd.grad(loss, (weight, head), materialize_grads=True)
        for gradient in gradients if group is not None else ():  # as DistributedDataParallel does
            dist.all_reduce(gradient, group=group)
            gradient /= WORLD
        found[name] = (loss.detach(), *gradients)
    return found


def _process(rank):
    group = dist.group.WORLD
    rows = slice(4 * rank, 4 * (rank + 1))
    found = {"losses": _results(rows, group)}
    x, weight, head = _batch()
    torch.manual_seed(rank)  # draws differ, the permutations do not
    fusion = lambda latents: torch.cat(list(latents), 1) @ head
    latents = list(x[:2, rows] @ weight)
    found["influence"] = MCR(fusion, process_group=group)(latents, fusion(latents)).influence
    return found


@pytest.fixture(scope="module")
def processes():
    """What every process found; one spawn for the file."""
    return found_by_processes(_process, WORLD)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_those_of_the_concatenated_batch(processes, name):
    expected = _results(slice(None), None)[name]
    for found in processes:
        torch.testing.assert_close(found["losses"][name], expected)


def test_processes_agree_on_permutations_whatever_their_seeds(processes):
    assert torch.equal(processes[0]["influence"], processes[1]["influence"])
