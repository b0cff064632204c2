"""Losses of a batch that two processes share equal those of one process on the whole batch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from regularizers._shared.distributed import add_up
from regularizers._shared.moments import covariance
from regularizers.representation import (
    DispersiveRegularizer,
    GroupWhiteningColoring,
    MSBReg,
    coloring_loss,
    dispersive_loss,
    energy_confusion,
    group_covariance,
    singular_value_loss,
    whitening_loss,
)
from tests.harness import found_by_processes

WORLD = 2
BATCH, DIM = 10, 6
LABELS = torch.tensor([0, 0, 1, 2, 1, 2, 2, 0, 1, 1])


def _dispersive(variant, **options):
    return lambda z, rows, group: dispersive_loss(
        z, variant=variant, margin=9.0, process_group=group, **options
    )


def _tapped(z, rows, group):
    model = nn.Sequential(nn.Identity(), nn.Tanh())
    _, penalty = DispersiveRegularizer(model, ["1"], process_group=group)(z)
    return penalty


def _confusion(**options):
    return lambda z, rows, group: energy_confusion(z, LABELS[rows], process_group=group, **options)


def _msbreg(z, rows, group):
    views = torch.stack([z, z.roll(1, 1)], 1)
    generator = torch.Generator().manual_seed(1)
    kicks = torch.randn(BATCH, 1, DIM, generator=generator, dtype=torch.float64)
    regularizer = MSBReg(lambda_brownian=0.5, process_group=group)
    return regularizer(views, views.square(), directions=kicks[rows]).total


def _coloring(z, rows, group):
    torch.manual_seed(0)
    layer = GroupWhiteningColoring(
        DIM, groups=2, style_dim=4, mlp_dim=5, process_group=group, dtype=torch.float64
    )
    style = torch.linspace(-1, 1, 4 * BATCH, dtype=torch.float64).view(BATCH, 4)[rows]
    found = layer(z[..., None], style)
    # What a training loop does with the output and the bases: a mean over its own samples.
    own = found.out.square().mean() + coloring_loss(found.basis)
    if group is not None:
        own = add_up(own, group) / WORLD
    return own + whitening_loss(found.covariance)


LOSSES = {
    **{variant: _dispersive(variant) for variant in ("infonce_l2", "infonce_cosine", "hinge")},
    "covariance": _dispersive("covariance", diag_target=2.0),
    "tapped layers": _tapped,
    "confusion of classes": _confusion(),
    "confusion of pairs": _confusion(weighting="pair"),
    "singular values": lambda z, rows, group: singular_value_loss(z, process_group=group),
    "centred singular values": lambda z, rows, group: singular_value_loss(
        z, center=True, form="smooth_l1", process_group=group
    ),
    "MSBReg": _msbreg,
    "whitening and coloring": _coloring,
}


def _batch():
    """The batch, and the encoder that makes embeddings of it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, DIM, generator=generator, dtype=torch.float64)
    return x, weight.requires_grad_()


def _results(rows, group):
    """Loss and gradient of the encoder of every loss."""
    x, weight = _batch()
    found = {}
    for name, loss_of in LOSSES.items():
        loss = loss_of(x[rows] @ weight, rows, group)
        (gradient,) = torch.autograd.grad(loss, weight)
        if group is not None:  # as DistributedDataParallel does
            dist.all_reduce(gradient, group=group)
            gradient /= WORLD
        found[name] = (loss.detach(), gradient)
    return found


def _process(rank):
    group = dist.group.WORLD
    found = {"even": _results(slice(5 * rank, 5 * (rank + 1)), group)}
    x, weight = _batch()
    rows = slice(0, 3) if rank == 0 else slice(3, 10)
    z = (x[rows] @ weight).detach()
    found["uneven"] = (
        covariance(z, process_group=group),
        group_covariance(z[..., None], groups=2, process_group=group),
    )
    torch.manual_seed(rank)
    rows = slice(5 * rank, 5 * (rank + 1))
    z = (x[rows] @ weight).detach()
    found["random"] = energy_confusion(z, LABELS[rows], pairs="random", process_group=group)
    return found


@pytest.fixture(scope="module")
def processes():
    """What every process found; one spawn for the file."""
    return found_by_processes(_process, WORLD)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_the_concatenated_batch(processes, name):
    expected = _results(slice(0, BATCH), None)[name]
    for found in processes:
        torch.testing.assert_close(found["even"][name], expected)


def test_covariances_take_batches_of_different_sizes(processes):
    x, weight = _batch()
    z = (x @ weight).detach()
    expected = covariance(z), group_covariance(z[..., None], groups=2)
    for found in processes:
        torch.testing.assert_close(found["uneven"], expected)


def test_processes_agree_on_the_random_pair_whatever_their_seeds(processes):
    assert torch.equal(processes[0]["random"], processes[1]["random"])
