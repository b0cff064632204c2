"""Mixture weights by temperature: the facts of the sheet of paper 1."""

import math

import pytest
import torch

from regularizers.tasks import temperature_mixture_weights


def test_temperature_of_one_is_proportional():
    weights = temperature_mixture_weights([100, 1])
    torch.testing.assert_close(weights, torch.tensor([0.990099, 0.009901]), rtol=0, atol=1e-6)


def test_infinite_temperature_is_uniform():
    assert temperature_mixture_weights([100, 1], math.inf).tolist() == [0.5, 0.5]


def test_weights_follow_the_formula():
    sizes = torch.tensor([3.0, 50.0, 7.0], dtype=torch.float64)
    powers = sizes ** (1 / 3)
    torch.testing.assert_close(temperature_mixture_weights(sizes, 3.0), powers / powers.sum())


def test_low_temperature_goes_to_the_largest_without_overflow():
    assert temperature_mixture_weights([1e12, 1e11], 1e-3).tolist() == [1.0, 0.0]


def test_dtype_is_that_of_the_sizes():
    assert temperature_mixture_weights(torch.ones(2).double()).dtype == torch.float64
    assert temperature_mixture_weights(torch.ones(2).long()).dtype == torch.float32


@pytest.mark.parametrize(
    ("exception", "name", "sizes", "temperature"),
    [
        (ValueError, "temperature must", [1, 2], 0.0),
        (ValueError, "temperature must", [1, 2], -1.0),
        (ValueError, "temperature must", [1, 2], math.nan),
        (ValueError, "sizes must", [1, 0], 1.0),
        (ValueError, "sizes must", [1, -2], 1.0),
        (ValueError, "sizes must", [1, math.inf], 1.0),
        (ValueError, "sizes must", [], 1.0),
        (ValueError, "sizes must", 5.0, 1.0),
        (TypeError, "sizes must", [True, True], 1.0),
    ],
)
def test_bad_input_names_the_argument(exception, name, sizes, temperature):
    with pytest.raises(exception, match=name):
        temperature_mixture_weights(sizes, temperature)
