"""Similarity with unintended directions: its values, its gradients, its hard form, its effect."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.representation import (
    TopKSAE,
    UnintendedFeatureRegularizer,
    VariationalTopKSAE,
    feature_similarity_penalty,
    finetune_sae,
    project_out,
    unintended_directions,
)
from tests.harness import MethodContract


class Regularized(nn.Module):
    """The regularizer and the layer it acts on; the contract wants parameters."""

    def __init__(self, dtype):
        super().__init__()
        self.linear = nn.Linear(6, 3, bias=False, dtype=dtype)
        self.regularizer = UnintendedFeatureRegularizer(torch.randn(2, 6, dtype=dtype))

    def forward(self):
        return self.regularizer(self.linear)


class TestUnintendedFeatureRegularizerContract(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return Regularized(dtype)

    def call(self, module, dtype):
        return module().to(dtype)  # half types give float32

    def bad_inputs(self):
        penalty, weight, directions = feature_similarity_penalty, torch.ones(2, 4), torch.ones(3, 4)
        sae = TopKSAE(4, 8, 2)
        build = UnintendedFeatureRegularizer
        zero = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        return [
            (ValueError, "directions must", lambda: penalty(weight, torch.ones(3, 5))),
            (ValueError, "directions must", lambda: penalty(weight, torch.ones(0, 4))),
            (ValueError, "directions must", lambda: penalty(weight, torch.ones(4))),
            (ValueError, "directions must", lambda: penalty(torch.ones(2, 2), zero)),
            (TypeError, "directions must", lambda: penalty(weight, torch.ones(3, 4).long())),
            (TypeError, "weight must", lambda: penalty(weight.long(), directions)),
            (ValueError, "weight must", lambda: penalty(torch.ones(4), directions)),
            (ValueError, "weight must", lambda: penalty(weight[:1], directions, pairwise=True)),
            (ValueError, "form must", lambda: penalty(weight, directions, form="cube")),
            (ValueError, "reduction must", lambda: penalty(weight, directions, reduction="max")),
            (ValueError, "weight must", lambda: build(directions, weight=-1.0)),
            (ValueError, "directions must", lambda: build(zero)),
            (ValueError, "form must", lambda: build(directions, form="cube")),
            (TypeError, "linear must", lambda: build(directions)(nn.ReLU())),
            (ValueError, "directions must", lambda: build(directions)(nn.Linear(5, 2))),
            (ValueError, "directions must", lambda: project_out(weight, torch.ones(0, 4))),
            (ValueError, "rcond must", lambda: project_out(weight, directions, rcond=0.0)),
            (ValueError, "indices must", lambda: unintended_directions(sae, torch.tensor([8]))),
            (ValueError, "indices must", lambda: unintended_directions(sae, torch.tensor([-1]))),
            (ValueError, "indices must", lambda: unintended_directions(sae, torch.tensor([[1]]))),
            (
                ValueError,
                "indices must",
                lambda: unintended_directions(sae, torch.tensor([]).long()),
            ),
            (TypeError, "indices must", lambda: unintended_directions(sae, torch.tensor([1.0]))),
            (TypeError, "sae must", lambda: unintended_directions(nn.ReLU(), torch.tensor([1]))),
            (TypeError, "sae must", lambda: finetune_sae(nn.ReLU(), [weight], steps=1, lr=1.0)),
            (ValueError, "steps must", lambda: finetune_sae(sae, [weight], steps=0, lr=1.0)),
            (ValueError, "lr must", lambda: finetune_sae(sae, [weight], steps=1, lr=0.0)),
            (ValueError, "activations must", lambda: finetune_sae(sae, [], steps=1, lr=1.0)),
            (
                TypeError,
                "activations must",
                lambda: finetune_sae(sae, iter([weight]), steps=1, lr=1.0),
            ),
            (
                ValueError,
                "aux_weight must",
                lambda: finetune_sae(sae, [weight], steps=1, lr=1.0, aux_weight=-1.0),
            ),
        ]


@pytest.mark.parametrize(
    ("weight", "form", "expected"),
    [
        ([2.0, 0.0], "sq", 1.0),
        ([2.0, 0.0], "abs", 1.0),
        ([0.0, 3.0], "sq", 0.0),
        ([0.0, 3.0], "abs", 0.0),
        ([1.0, 1.0], "sq", 0.5),
        ([1.0, 1.0], "abs", 0.70711),
        ([-1.0, 1.0], "signed", -0.70711),
    ],
)
def test_known_values(weight, form, expected):
    direction = torch.tensor([[1.0, 0.0]])
    found = feature_similarity_penalty(torch.tensor([weight]), direction, form=form)
    assert found.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("form", ["sq", "abs", "signed"])
def test_rescaling_rows_changes_nothing(form):
    weight, directions = torch.randn(3, 8), torch.randn(4, 8)
    expected = feature_similarity_penalty(weight, directions, form=form)
    scaled = feature_similarity_penalty(
        weight * torch.tensor([[0.01], [3.0], [50.0]]), directions * torch.rand(4, 1), form=form
    )
    torch.testing.assert_close(scaled, expected)


def test_sign_of_a_direction_matters_only_to_the_signed_form():
    weight, directions = torch.randn(3, 8), torch.randn(4, 8)
    for form, sign in (("sq", 1), ("abs", 1), ("signed", -1)):
        torch.testing.assert_close(
            feature_similarity_penalty(weight, -directions, form=form),
            sign * feature_similarity_penalty(weight, directions, form=form),
        )


@pytest.mark.parametrize("form", ["sq", "abs", "signed"])
def test_gradient_is_orthogonal_to_every_row_and_absent_for_directions(form):
    weight = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    directions = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    feature_similarity_penalty(weight, directions, form=form).backward()
    assert (weight.grad * weight).sum(1).abs().max() < 1e-12
    assert weight.grad.norm() > 1e-3
    assert directions.grad is None


def test_gradient_is_that_of_finite_differences():
    weight = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    directions = torch.randn(4, 8, dtype=torch.float64)
    for pairwise in (False, True):
        assert torch.autograd.gradcheck(
            lambda w, p=pairwise: feature_similarity_penalty(w, directions, pairwise=p), weight
        )


@pytest.mark.parametrize("form", ["sq", "abs", "signed"])
def test_row_of_zeros_is_finite(form):
    weight = torch.zeros(2, 8, requires_grad=True)
    loss = feature_similarity_penalty(weight, torch.randn(4, 8), form=form)
    loss.backward()
    assert loss == 0
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().max() < 1


def test_reductions_agree():
    weight, directions = torch.randn(3, 8), torch.randn(4, 8)
    each = feature_similarity_penalty(weight, directions, reduction="none")
    assert each.shape == (3, 4)
    torch.testing.assert_close(feature_similarity_penalty(weight, directions), each.mean())
    torch.testing.assert_close(
        feature_similarity_penalty(weight, directions, reduction="sum"), each.sum()
    )


def test_pairs_are_differences_of_rows():
    weight, directions = torch.randn(3, 8), torch.randn(4, 8)
    differences = torch.stack([weight[1] - weight[0], weight[2] - weight[0], weight[2] - weight[1]])
    torch.testing.assert_close(
        feature_similarity_penalty(
            weight, directions, form="signed", pairwise=True, reduction="none"
        ),
        feature_similarity_penalty(differences, directions, form="signed", reduction="none"),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_added_up_in_float32(dtype):
    weight, directions = torch.randn(3, 8).to(dtype), torch.randn(4, 8).to(dtype)
    found = feature_similarity_penalty(weight, directions)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, feature_similarity_penalty(weight.float(), directions.float())
    )


def test_autocast_does_not_round_the_cosine():
    weight, directions = torch.randn(3, 80), torch.randn(4, 80)
    expected = feature_similarity_penalty(weight, directions)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(feature_similarity_penalty(weight, directions), expected)


def test_nan_reaches_the_penalty():
    weight = torch.randn(3, 8)
    weight[0, 0] = torch.nan
    assert feature_similarity_penalty(weight, torch.randn(4, 8)).isnan()


def test_module_gives_the_weighted_penalty_of_rows_of_norm_one():
    directions, linear = 3 * torch.randn(4, 8), nn.Linear(8, 3)
    module = UnintendedFeatureRegularizer(directions, weight=2.5, form="abs", pairwise=True)
    torch.testing.assert_close(module.directions.norm(dim=1), torch.ones(4))
    expected = 2.5 * feature_similarity_penalty(
        linear.weight, directions, form="abs", pairwise=True
    )
    torch.testing.assert_close(module(linear), expected)
    torch.testing.assert_close(module(linear.weight), expected)
    module(linear).backward()
    assert linear.bias.grad is None
    module.weight = 0.0
    assert module(linear) == 0


def test_projection_is_idempotent_and_ends_the_penalty():
    weight, directions = torch.randn(3, 16), torch.randn(4, 16)
    once = project_out(weight, directions)
    torch.testing.assert_close(project_out(once, directions), once)
    assert feature_similarity_penalty(once, directions) < 1e-10
    assert (once - weight).abs().max() > 0.1


@pytest.mark.parametrize("distance", [0.0, 1e-9, 1e-4])
def test_projection_takes_dependent_directions(distance):
    weight, directions = torch.randn(3, 16), torch.randn(4, 16)
    directions = torch.cat([directions, directions.sum(0, keepdim=True), 2 * directions[:1]])
    directions = directions + distance * torch.randn(6, 16)
    assert feature_similarity_penalty(project_out(weight, directions), directions) < 1e-10


def test_projection_of_a_row_in_the_span_is_exactly_zero():
    directions = torch.randn(4, 16)
    weight = torch.cat([torch.randn(2, 4) @ directions, torch.randn(1, 16)])
    left = project_out(weight, directions)
    assert torch.equal(left[:2], torch.zeros(2, 16))
    assert feature_similarity_penalty(left, directions) < 1e-10


def test_projection_leaves_the_orthogonal_part_and_is_differentiable():
    weight = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    directions = torch.tensor([[0.0, 1.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
    left = project_out(weight, directions)
    torch.testing.assert_close(left, torch.tensor([[1.0, 0.0, 3.0]], dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda w: project_out(w, directions), weight)


def test_projection_passes_nan_on():
    weight = torch.randn(2, 4)
    weight[0, 0] = torch.nan
    left = project_out(weight, torch.randn(1, 4))
    assert left[0].isnan().any()
    assert left[1].isfinite().all()


def test_directions_are_rows_of_the_decoder():
    sae = TopKSAE(4, 8, 2)
    with torch.no_grad():
        sae.encoder.weight.mul_(-1)
    found = unintended_directions(sae, torch.tensor([5, 1]))
    assert torch.equal(found, sae.decoder[[5, 1]])
    assert not found.requires_grad
    found.zero_()
    assert sae.decoder[5].any()


def _spurious(samples, agreement, generator):
    """Inputs [samples, 32] with the label along axis 0 and a louder copy of it along axis 1."""
    label = torch.randint(2, (samples,), generator=generator)
    sign = 2.0 * label - 1
    agrees = torch.rand(samples, generator=generator) < agreement
    x = torch.randn(samples, 32, generator=generator)
    x[:, 0] += sign
    x[:, 1] += 2 * torch.where(agrees, sign, -sign)
    return x, label


def test_penalty_moves_a_classifier_off_a_spurious_direction():
    # Sheet of paper 16: accuracy 0.774 without and 0.939 with weight 10 where the spurious
    # direction turns round.
    generator = torch.Generator().manual_seed(0)
    x, label = _spurious(500, 0.95, generator)
    test_x, test_label = _spurious(2000, 0.05, generator)
    direction = torch.zeros(1, 32)
    direction[0, 1] = 1.0

    def accuracy(weight):
        torch.manual_seed(0)
        head = nn.Linear(32, 2)
        regularizer = UnintendedFeatureRegularizer(direction, weight=weight)
        optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
        for _ in range(300):
            optimizer.zero_grad()
            (F.cross_entropy(head(x), label) + regularizer(head)).backward()
            optimizer.step()
        return (head(test_x).argmax(1) == test_label).double().mean().item()

    assert accuracy(10.0) > accuracy(0.0) + 0.1


def _pretrained():
    """A dictionary of 64 for one kind of data, and batches of another kind, where much is dead."""
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(48, 16, generator=generator), dim=1)

    def batches(which, count):
        def codes():
            draws = torch.rand(2, 64, len(which), generator=generator)
            return draws[0] * (draws[1] < 0.15)

        return [codes() @ directions[which] for _ in range(count)]

    torch.manual_seed(0)
    sae = TopKSAE(16, 64, 3, subtract_decoder_bias=True)
    finetune_sae(sae, batches(range(24), 20), steps=100, lr=1e-2, aux_weight=0.0)
    return sae, batches(range(24, 48), 4)


def _silent_on(sae, batches):
    active = torch.stack([(sae(batch).features != 0).any(0) for batch in batches]).any(0)
    return 1 - active.double().mean().item()


def test_finetuning_revives_latents_that_the_task_leaves_dead():
    torch.set_num_threads(1)
    sae, batches = _pretrained()
    plain, revived = copy.deepcopy(sae), copy.deepcopy(sae)
    finetune_sae(plain, batches, steps=150, lr=1e-2, aux_weight=0.0)
    finetune_sae(revived, batches, steps=150, lr=1e-2)
    assert _silent_on(revived, batches) < _silent_on(plain, batches) - 0.1


def test_finetuning_leaves_the_settings_as_they_were():
    sae = VariationalTopKSAE(4, 8, 2, aux_weight=0.25, dead_after=77).eval()
    before = sae.decoder.detach().clone()
    assert finetune_sae(sae, [torch.randn(16, 4)], steps=2, lr=0.1, aux_weight=1.0) is sae
    assert (sae.dead_after, sae.aux_weight.item(), sae.training) == (77, 0.25, False)
    assert not torch.equal(sae.decoder, before)
    assert all(parameter.grad is None for parameter in sae.parameters())
