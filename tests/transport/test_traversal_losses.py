"""Losses around potential flows: their formulas, and bad input."""

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn import functional as F

from regularizers.transport import (
    PotentialFlow,
    negative_elbo,
    traversal_classification_loss,
    vae_flow_loss,
)


def output_of_a_flow():
    return PotentialFlow(4, 1, num_steps=6).loss(torch.randn(5, 4), 0, 1)


def test_classification_loss_is_cross_entropy_with_the_index():
    logits, index = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    for reduction in ("mean", "sum", "none"):
        torch.testing.assert_close(
            traversal_classification_loss(logits, index, reduction=reduction),
            F.cross_entropy(logits, index, reduction=reduction),
        )
    torch.testing.assert_close(
        traversal_classification_loss(logits, 2), F.cross_entropy(logits, torch.full((5,), 2))
    )


def test_classification_loss_trains_potentials_through_the_pair():
    flow, generator, classifier = PotentialFlow(4, 2, 6), nn.Linear(4, 6), nn.Linear(12, 2)
    output = flow.loss(torch.randn(5, 4), 1, 0, generator)
    pair = torch.cat((generator(output.z1), generator(output.z2)), 1)
    traversal_classification_loss(classifier(pair), 1).backward()
    assert flow.nets[1].space.weight.grad.abs().sum() > 0


def test_negative_elbo_agrees_with_distributions():
    x, probability = torch.rand(5, 2, 3).round(), torch.rand(5, 2, 3)
    mean, log_var = torch.randn(5, 4), torch.randn(5, 4)
    code = Normal(mean, (log_var / 2).exp())
    divergence = kl_divergence(code, Normal(0.0, 1.0)).sum()
    misfit = -Bernoulli(probability).log_prob(x).sum()
    torch.testing.assert_close(
        negative_elbo(probability, x, mean, log_var), (misfit + divergence) / 5
    )
    gaussian = negative_elbo(probability, x, mean, log_var, likelihood="gaussian")
    constant = -Normal(0.0, 1.0).log_prob(torch.zeros(2, 3)).sum()
    misfit = -Normal(probability, 1.0).log_prob(x).sum()
    torch.testing.assert_close(gaussian + constant, (misfit + divergence) / 5)


def test_vae_loss_is_the_sum_of_its_parts():
    flow = output_of_a_flow()
    z_t, z_next = torch.randn(5, 4), torch.randn(5, 4)
    steps = F.mse_loss(z_next - z_t, flow.z2 - flow.z1)
    expected = 3.0 + 4.0 + 0.5 * flow.total + steps + F.mse_loss(z_t, flow.z1)
    found = vae_flow_loss(torch.tensor(3.0), torch.tensor(4.0), flow, z_t, z_next, lambda_pde=0.5)
    torch.testing.assert_close(found, expected)


def test_vae_loss_of_codes_on_the_flow_has_no_matching_terms():
    flow = output_of_a_flow()
    found = vae_flow_loss(torch.tensor(3.0), torch.tensor(4.0), flow, flow.z1, flow.z2)
    torch.testing.assert_close(found, 7.0 + flow.total)


PICTURE, CODE = torch.full((2, 3), 0.5), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("exception", "match", "call"),
    [
        (TypeError, "logits must", lambda: traversal_classification_loss([1.0], 0)),
        (ValueError, "logits must", lambda: traversal_classification_loss(torch.ones(3), 0)),
        (ValueError, "index must", lambda: traversal_classification_loss(CODE, 4)),
        (ValueError, "index must", lambda: traversal_classification_loss(CODE, -1)),
        (
            ValueError,
            "index must",
            lambda: traversal_classification_loss(CODE, torch.tensor([0, 4])),
        ),
        (ValueError, "index must", lambda: traversal_classification_loss(CODE, torch.tensor([0]))),
        (
            ValueError,
            "reduction must",
            lambda: traversal_classification_loss(CODE, 0, reduction="max"),
        ),
        (ValueError, "target must", lambda: negative_elbo(PICTURE, PICTURE[:1], CODE, CODE)),
        (ValueError, "log_var must", lambda: negative_elbo(PICTURE, PICTURE, CODE, CODE[:1])),
        (
            ValueError,
            "likelihood must",
            lambda: negative_elbo(PICTURE, PICTURE, CODE, CODE, likelihood="poisson"),
        ),
        (TypeError, "reconstruction must", lambda: negative_elbo(None, PICTURE, CODE, CODE)),
        (TypeError, "flow must", lambda: vae_flow_loss(CODE, CODE, CODE, CODE, CODE)),
        (ValueError, "z_t must", lambda: vae_flow_loss(CODE, CODE, output_of_a_flow(), CODE, CODE)),
    ],
)
def test_bad_input_names_the_argument(exception, match, call):
    with pytest.raises(exception, match=match):
        call()
