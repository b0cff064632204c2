"""Batch statistics over two processes equal those of one process on the concatenated batch."""

import pytest
import torch
import torch.distributed as dist

from regularizers._shared.distributed import gather_batch
from regularizers.information import (
    ManifoldEntropy,
    NoisyRegressor,
    fccov,
    fccov_kernel,
    fccov_loss,
    gaussian_output_information,
    kde_information,
    metric_distances,
    nn_entropy_loss,
)
from tests.harness import found_by_processes

WORLD = 2
DIM = 3


def _entropy_terms(group):
    """The entropy of the second of two steps: the ring must have got the whole first batch."""
    terms = ManifoldEntropy(
        DIM,
        bank_size=16,
        process_group=group,
        generator=torch.Generator().manual_seed(3),
        dtype=torch.float64,
    )

    def loss(z, labels):
        terms.generator_terms(lambda x: x + 0.1, z.detach(), 0)
        return terms.generator_terms(lambda x: x, z, 0).entropy

    return loss


def _regression(group):
    # The bound alone: the error of the predictions is a mean over each process's own rows.
    regressor = NoisyRegressor(torch.nn.Identity(), noise_std=0.5)
    seeded = lambda: torch.Generator().manual_seed(1)

    def loss(z, labels):
        losses = [
            regressor.loss(z, z, lambda_mi=lam, process_group=group, generator=seeded())
            for lam in (1.0, 0.0)
        ]
        return losses[0] - losses[1]

    return loss


def _bank():
    return torch.randn(20, DIM, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def _kernel(labels, group):
    return fccov_kernel(metric_distances(labels[:, None].double(), process_group=group))


def _by_columns(group):
    """Gathered rows whose gradient comes back transposed."""
    weight = torch.arange(10 * DIM, dtype=torch.float64).reshape(DIM, 10).cos()
    return lambda z, labels: (gather_batch(z, group).T.contiguous() * weight).square().sum()


LOSSES = {
    "rows read by columns": _by_columns,
    "kernel information": lambda group: (
        lambda z, labels: sum(kde_information(z, labels, process_group=group))
    ),
    "output information": lambda group: (
        lambda z, labels: gaussian_output_information(
            z, noise_std=0.5, estimator="moment", process_group=group
        )
    ),
    "regression": _regression,
    "cumulative covariance": lambda group: (
        lambda z, labels: fccov(z, _kernel(labels, group), process_group=group)
    ),
    "predictors": lambda group: (
        lambda z, labels: fccov_loss(z, _kernel(labels, group), process_group=group)
    ),
    "entropy of the mean": lambda group: (
        lambda z, labels: nn_entropy_loss(z, _bank(), process_group=group)
    ),
    "terms of the generator": _entropy_terms,
}


def _batch():
    """Inputs, labels, and the encoder that makes embeddings."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, DIM, generator=generator, dtype=torch.float64)
    return x, torch.arange(10) % 3, weight.requires_grad_()


def _results(x, labels, weight, group):
    """Loss and gradient of the encoder of every loss."""
    found = {}
    for name, make in LOSSES.items():
        loss = make(group)(x @ weight, labels)
        (gradient,) = torch.autograd.grad(loss, weight)
        if group is not None:  # as DistributedDataParallel does
            dist.all_reduce(gradient, group=group)
            gradient /= WORLD
        found[name] = (loss.detach(), gradient)
    return found


def _process(rank):
    x, labels, weight = _batch()
    rows = slice(5 * rank, 5 * (rank + 1))
    return _results(x[rows], labels[rows], weight, dist.group.WORLD)


@pytest.fixture(scope="module")
def processes():
    """What every process found; one spawn for the file."""
    return found_by_processes(_process, WORLD)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_the_concatenated_batch(processes, name):
    expected = _results(*_batch(), None)[name]
    for found in processes:
        torch.testing.assert_close(found[name], expected)
