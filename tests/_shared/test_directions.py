"""Directions and cosines: those of PyTorch, but for vectors of no length and half types."""

import math

import torch
from torch.nn import functional as F

from regularizers._shared.directions import cosine, unit


def test_directions_and_cosines_are_those_of_pytorch():
    a, b = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(unit(a), F.normalize(a, dim=-1))
    torch.testing.assert_close(cosine(a, b), F.cosine_similarity(a, b, dim=-1))
    torch.testing.assert_close(cosine(a, b, dim=1), F.cosine_similarity(a, b, dim=1))


def test_derivatives_are_right():
    a, b = (x.clone().requires_grad_() for x in torch.randn(2, 3, 4, dtype=torch.float64))
    for call, inputs in ((unit, (a,)), (cosine, (a, b))):
        assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(call, inputs)


def test_a_vector_of_no_length_has_no_direction_and_no_gradient():
    zero = torch.zeros(3, requires_grad=True)
    for value in (unit(zero).sum(), cosine(zero, torch.ones(3))):
        (gradient,) = torch.autograd.grad(value, zero)
        assert value == 0
        assert (gradient == 0).all()
    # What the eps of F.normalize gives in its place.
    (steep,) = torch.autograd.grad(F.normalize(zero, dim=0).sum(), zero)
    assert steep.min() > 1e11


def test_nan_stays_nan():
    a = torch.tensor([math.nan, 1.0])
    assert unit(a).isnan().all()
    assert cosine(a, torch.ones(2)).isnan()


def test_half_types_become_float32():
    a = torch.full((4,), 1e-4, dtype=torch.float16)  # its square is 0 in float16
    assert unit(a).dtype == torch.float32
    torch.testing.assert_close(unit(a), torch.full((4,), 0.5))
    torch.testing.assert_close(cosine(a, -a), torch.tensor(-1.0))
