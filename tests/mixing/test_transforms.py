"""The transforms of the default attack suite: values, shapes, derivatives."""

import pytest
import torch
from torch.nn import functional as F

from regularizers.mixing import TransformFamily, default_families

FAMILIES = {family.name: family for family in default_families()}


def _images(batch=2, channels=3, height=20, width=27, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, channels, height, width, generator=generator, dtype=torch.float64).to(
        dtype
    )


def _apply(name, x, strength, seed=0):
    strengths = torch.full(x.shape[:1], float(strength), dtype=x.dtype)
    return FAMILIES[name](x, strengths, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (2, 1, 9, 21), (3, 4, 8, 5)], ids=str)
def test_shape_and_dtype_are_kept_and_results_finite(name, shape):
    for dtype in (torch.float32, torch.float64):
        x = _images(*shape, dtype=dtype)
        found = FAMILIES[name](x)
        assert (found.shape, found.dtype) == (x.shape, x.dtype)
        assert found.isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_are_transformed_for_themselves(name):
    x, family = _images(3), FAMILIES[name]
    strength = family.strength(torch.tensor([0.1, 0.5, 0.9]))
    draw = lambda: torch.Generator().manual_seed(3)
    whole = family(x, strength, generator=draw())
    changed = x.clone()
    changed[1] = 0.3
    found = family(changed, strength, generator=draw())
    torch.testing.assert_close(found[[0, 2]], whole[[0, 2]])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "jpeg"])
def test_derivative_with_respect_to_the_image_is_right(name):
    x, family = _images(1, 3, 6, 5, torch.float64), FAMILIES[name]
    strength = family.strength(torch.tensor([0.7], dtype=torch.float64))
    call = lambda x: family(x, strength, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(call, x.requires_grad_())


@pytest.mark.parametrize("name", ["brightness", "gaussian_blur", "resize", "rotation"])
def test_derivative_with_respect_to_the_strength_is_right(name):
    x, family = _images(2, 1, 6, 5, torch.float64), FAMILIES[name]
    share = torch.tensor([0.31, 0.77], dtype=torch.float64)
    strength = family.strength(share).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: family(x, s), strength)


@pytest.mark.parametrize(
    ("name", "strength"),
    [
        ("identity", 0.0),
        ("brightness", 1.0),
        ("contrast", 1.0),
        ("saturation", 1.0),
        ("gaussian_blur", 0.05),
        ("gaussian_noise", 0.0),
        ("resize", 1.0),
        ("crop", 1.0),
        ("rotation", 0.0),
        ("masking", 0.0),
    ],
)
def test_the_neutral_strength_changes_nothing(name, strength):
    x = _images()
    torch.testing.assert_close(_apply(name, x, strength), x, rtol=0, atol=2e-5)


def test_brightness_contrast_and_saturation_scale_what_they_should():
    x = _images()
    grey = (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    mean = grey.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(_apply("brightness", x, 0.5), x / 2)
    torch.testing.assert_close(_apply("contrast", x, 0.0), mean.expand_as(x))
    torch.testing.assert_close(_apply("saturation", x, 0.0), grey.expand_as(x))


def test_blur_keeps_constants_and_is_the_normal_kernel_inside():
    torch.testing.assert_close(
        _apply("gaussian_blur", torch.full((1, 1, 9, 9), 0.4), 1.5), torch.full((1, 1, 9, 9), 0.4)
    )
    point = torch.zeros(1, 1, 31, 31)
    point[..., 15, 15] = 1
    at = torch.arange(31) - 15.0
    kernel = (-at.square() / 2).exp()
    expected = torch.outer(kernel, kernel) / kernel.sum() ** 2
    torch.testing.assert_close(_apply("gaussian_blur", point, 1.0)[0, 0], expected)


def test_noise_has_its_standard_deviation():
    found = _apply("gaussian_noise", torch.zeros(1, 1, 300, 300), 0.1)
    assert found.std().item() == pytest.approx(0.1, rel=0.02)  # 90000 draws


def test_resizing_keeps_constants_and_loses_fine_stripes():
    flat = torch.full((1, 1, 16, 16), 0.4)
    torch.testing.assert_close(_apply("resize", flat, 0.45), flat)
    stripes = (torch.arange(32) % 2).float().expand(1, 1, 32, 32)
    coarse = (torch.arange(32) // 16).float().expand(1, 1, 32, 32)
    assert _apply("resize", stripes, 0.4).std() < 0.15 * stripes.std()
    assert (_apply("resize", coarse, 0.4) - coarse).abs().mean() < 0.06


def test_a_crop_of_a_linear_image_is_linear_and_inside_of_it():
    ramp = torch.linspace(0, 1, 40).expand(5, 1, 40, 40)
    found = _apply("crop", ramp, 0.6)
    steps = found[..., 1:] - found[..., :-1]
    # 0.6 of the slope but where the border is repeated.
    assert (steps[..., 2:-2] - 0.6 / 39).abs().max() < 1e-4
    assert found.amin() >= 0
    assert found.amax() <= 1
    assert found[:, 0, 0, 0].unique().numel() == 5  # every sample has a place of its own


def test_a_quarter_turn_is_that_of_torch():
    x = _images(height=12, width=12)
    found = _apply("rotation", x, 90.0)
    torch.testing.assert_close(found, x.rot90(1, (2, 3)), rtol=0, atol=1e-4)


def test_rotation_of_a_wide_image_keeps_distances():
    disc = (torch.arange(21)[:, None] - 10.0).square() + (torch.arange(41) - 20.0).square() < 64
    x = disc.float()[None, None]
    assert (_apply("rotation", x, 15.0) - x).abs().mean() < 0.02


def test_flip_is_its_own_inverse():
    x = _images()
    torch.testing.assert_close(_apply("horizontal_flip", x, 0.0), x.flip(-1))


def test_jpeg_error_falls_with_quality_and_grey_levels_stay():
    x = F.interpolate(_images(1, 3, 8, 8), (40, 40), mode="bicubic")
    errors = [(_apply("jpeg", x, q) - x).square().mean().item() for q in (10, 30, 60, 95)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4
    # A block of one grey level has one coefficient, 8 times it: half a step of it is lost at most.
    flat = torch.full((1, 1, 16, 16), 0.6)
    assert (_apply("jpeg", flat, 50) - flat).abs().max() <= 16 / 2 / 8 / 255 + 1e-6


def test_jpeg_passes_its_gradient_straight_through_the_rounding():
    x = _images(1, 3, 16, 16, torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(_apply("jpeg", x, 40).sum(), x)
    # Without rounding the transform is the identity, up to the six digits of the color matrices.
    torch.testing.assert_close(gradient, torch.ones_like(gradient), rtol=0, atol=1e-4)


def test_masking_turns_its_share_of_cells_black():
    found = _apply("masking", torch.ones(200, 3, 16, 16), 0.3)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    # 12800 cells: deviation 0.004.
    assert found.mean().item() == pytest.approx(0.7, abs=0.02)
    cells = found.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2)
    assert torch.equal(cells.amin(-1), cells.amax(-1))


def test_strengths_are_uniform_in_the_range_and_reproducible():
    family = TransformFamily("gain", lambda x, s: x * s[:, None], (2.0, 6.0))
    draw = lambda: family.draw_strength(torch.ones(10_000, 1), torch.Generator().manual_seed(0))
    strength = draw()
    assert torch.equal(strength, draw())
    assert strength.amin() >= 2
    assert strength.amax() <= 6
    assert strength.mean().item() == pytest.approx(4, abs=0.05)  # deviation 0.012


def test_bad_input_names_the_argument():
    gain = lambda x, s: x
    family = TransformFamily("cut", lambda x, s: x[:, :1], (0.0, 1.0))
    for exception, name, call in (
        (TypeError, "fn", lambda: TransformFamily("gain", 3, (0.0, 1.0))),
        (ValueError, "strength_range", lambda: TransformFamily("gain", gain, (1.0, 0.0))),
        (
            ValueError,
            "strength_range",
            lambda: TransformFamily("gain", gain, (0.0, float("inf"))),
        ),
        (ValueError, "fn of family 'cut'", lambda: family(torch.ones(2, 3))),
        (ValueError, "strength", lambda: family(torch.ones(2, 3), torch.ones(3))),
        (TypeError, "x must", lambda: family(torch.ones(2, 3).long())),
    ):
        with pytest.raises(exception, match=name):
            call()
