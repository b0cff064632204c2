"""Inversion attacks: what they find of inputs that are, and are not, in the predictions."""

import pytest
import torch
from torch import nn

from regularizers.information import (
    VIBHead,
    gradient_inversion_attack,
    linear_inversion_attack,
)


def test_an_invertible_linear_map_is_inverted():
    x = torch.randn(300, 5, dtype=torch.float64)
    pred = x @ torch.randn(5, 5, dtype=torch.float64) + 2
    assert linear_inversion_attack(pred, x) > 0.999


def test_predictions_that_ignore_the_input_reveal_nothing():
    x = torch.randn(2000, 5)
    assert linear_inversion_attack(torch.randn(2000, 3), x).abs() < 0.02
    assert linear_inversion_attack(torch.ones(2000, 3), x).abs() < 0.02


def test_half_of_the_input_gives_half_of_its_variance():
    x = torch.randn(4000, 4)
    assert linear_inversion_attack(x[:, :2], x) == pytest.approx(0.5, abs=0.03)


def test_images_are_taken_as_vectors_and_the_division_is_the_generators():
    x = torch.randn(40, 1, 3, 3)
    draws = [
        linear_inversion_attack(x[:, 0, 0], x, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_gradient_attack_finds_an_input_of_each_class():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    target = torch.tensor([0, 1, 2, 3])
    found = gradient_inversion_attack(model, target, shape=(6,), steps=200)
    assert torch.equal(model(found).argmax(1), target)
    assert not found.requires_grad


def test_gradient_attack_leaves_the_model_alone():
    model = nn.Linear(3, 2)
    gradient_inversion_attack(model, 1, shape=(3,), steps=3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_prior_holds_the_input_back():
    model = nn.Linear(3, 2)
    norms = [
        gradient_inversion_attack(
            model, 1, shape=(3,), steps=200, prior=prior, generator=torch.Generator().manual_seed(0)
        ).norm()
        for prior in (None, lambda x: 10 * x.square().sum(1))
    ]
    assert norms[1] < 0.1 < norms[0]


def test_gradient_attack_reads_the_logits_of_a_bottleneck():
    found = gradient_inversion_attack(VIBHead(6, 3), 2, shape=(6,), steps=2)
    assert found.shape == (1, 6)


def test_bad_input_names_the_argument():
    x = torch.randn(10, 3)
    model = nn.Linear(3, 2)
    attack = lambda **changed: gradient_inversion_attack(
        **{"model": model, "target_class": 0, "shape": (3,)} | changed
    )
    for exception, name, call in [
        (TypeError, "pred must", lambda: linear_inversion_attack(x.int(), x)),
        (TypeError, "x must", lambda: linear_inversion_attack(x, x.double())),
        (ValueError, "pred and x must", lambda: linear_inversion_attack(x[:5], x)),
        (ValueError, "fraction must", lambda: linear_inversion_attack(x, x, fraction=1.0)),
        (ValueError, "ridge must", lambda: linear_inversion_attack(x, x, ridge=-1.0)),
        (TypeError, "model must", lambda: attack(model=lambda x: x)),
        (ValueError, "steps must", lambda: attack(steps=0)),
        (ValueError, "lr must", lambda: attack(lr=0.0)),
        (ValueError, "target_class must", lambda: attack(target_class=-1)),
        (TypeError, "target_class must", lambda: attack(target_class=torch.ones(2))),
        (ValueError, "target_class must", lambda: attack(target_class=torch.zeros(2, 2).long())),
    ]:
        with pytest.raises(exception, match=name):
            call()
