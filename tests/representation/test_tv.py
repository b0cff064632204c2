"""Total-variation denoising: the minimiser, what it keeps, and its limits."""

import pytest
import torch

from regularizers.representation import tv_denoise

FORMS = [
    {"isotropic": isotropic, "channelwise": channelwise}
    for isotropic in (True, False)
    for channelwise in (True, False)
]


def _total_variation(u, isotropic=True, channelwise=True):
    """TV of every image, written out."""
    gradient = torch.zeros(2, *u.shape, dtype=u.dtype)
    gradient[0, ..., :-1, :] = u[..., 1:, :] - u[..., :-1, :]
    gradient[1, ..., :-1] = u[..., 1:] - u[..., :-1]
    if not isotropic:
        return gradient.abs().sum((0, 2, 3, 4))
    return gradient.square().sum(0 if channelwise else (0, 2)).sqrt().flatten(1).sum(1)


def _energy(u, x, weight, **form):
    return _total_variation(u, **form) + weight * (u - x).square().sum((1, 2, 3))


def _images(*shape):
    return torch.rand(*shape, dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_other_image_has_less_energy(form):
    # Around a minimiser of a convex function every direction rises.
    x = _images(2, 3, 9, 7)
    u = tv_denoise(x, weight=1.5, max_iter=3000, eps=1e-6, **form)
    least = _energy(u, x, 1.5, **form)
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(20):
            other = u + size * torch.randn_like(u)
            assert (_energy(other, x, 1.5, **form) > least).all()
        assert (_energy(u + size * (x - u), x, 1.5, **form) > least).all()


def test_minimiser_agrees_with_a_general_solver():
    # Smoothed total variation by L-BFGS: another method altogether.
    x = _images(1, 1, 6, 5)
    u = x.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [u], max_iter=500, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def energy():
        optimizer.zero_grad()
        dy, dx = u.diff(dim=2), u.diff(dim=3)
        square = torch.nn.functional.pad(dy, (0, 0, 0, 1)).square()
        square = square + torch.nn.functional.pad(dx, (0, 1)).square()
        value = (square + 1e-10).sqrt().sum() + 2.0 * (u - x).square().sum()
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(energy)
    found = tv_denoise(x, weight=2.0, max_iter=3000, eps=1e-7)
    torch.testing.assert_close(found, u.detach(), rtol=0, atol=2e-3)  # the smoothing moves it


def test_sides_of_an_edge_move_by_the_closed_form():
    # Minimising 2 w (W / 2) m^2 - 2 m a row gives m = 1 / (w W).
    x = torch.zeros(1, 1, 8, 10, dtype=torch.float64)
    x[..., 5:] = 1
    u = tv_denoise(x, weight=0.5, max_iter=2000, eps=1e-8)
    torch.testing.assert_close(u, x * 0.6 + 0.2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_constant_image_is_a_fixed_point(form):
    x = torch.full((2, 3, 5, 6), 0.7)
    assert torch.equal(tv_denoise(x, weight=0.1, **form), x)


@pytest.mark.parametrize("weight", [0.05, 0.5, 5.0, 50.0])
def test_variation_falls_and_the_mean_stays(weight):
    x = _images(2, 3, 16, 16)
    u = tv_denoise(x, weight=weight)
    assert (_total_variation(u) < _total_variation(x)).all()
    torch.testing.assert_close(u.mean((2, 3)), x.mean((2, 3)), rtol=0, atol=1e-12)


def test_larger_weights_smooth_less():
    x = _images(1, 1, 16, 16)
    variations = [_total_variation(tv_denoise(x, weight=w)).item() for w in (0.2, 1.0, 5.0, 25.0)]
    assert variations == sorted(variations)


def test_limits_are_the_input_and_the_mean():
    x = _images(1, 2, 8, 8)
    torch.testing.assert_close(tv_denoise(x, weight=1e9), x, rtol=0, atol=1e-8)
    flat = tv_denoise(x, weight=1e-4, max_iter=2000)
    torch.testing.assert_close(flat, x.mean((2, 3), keepdim=True).expand_as(x), rtol=0, atol=1e-3)


def test_result_is_as_near_as_was_asked():
    x = _images(3, 1, 16, 16) * torch.tensor([1.0, 100.0, 0.01]).view(3, 1, 1, 1)
    exact = tv_denoise(x, weight=20.0, max_iter=5000, eps=1e-8)
    for eps in (1e-1, 1e-2, 1e-3):
        distance = (tv_denoise(x, weight=20.0, max_iter=1000, eps=eps) - exact).square()
        assert (distance.mean((1, 2, 3)).sqrt() < eps * x.std((1, 2, 3))).all()


def test_iteration_ends_early_when_the_result_is_near():
    x = _images(1, 1, 16, 16)
    short, long = (tv_denoise(x, weight=20.0, max_iter=n, eps=1e-2) for n in (200, 4000))
    assert torch.equal(short, long)


def test_weight_is_in_units_of_one_over_a_pixel():
    x = _images(1, 1, 12, 12)
    torch.testing.assert_close(
        tv_denoise(255 * x, weight=0.01), 255 * tv_denoise(x, weight=2.55), rtol=0, atol=1e-6
    )


def test_channels_are_coupled_on_request_only():
    x = _images(1, 2, 10, 10)
    apart = torch.cat([tv_denoise(x[:, i : i + 1], weight=5.0, eps=1e-6) for i in (0, 1)], 1)
    found = tv_denoise(x, weight=5.0, eps=1e-6)
    torch.testing.assert_close(found, apart, rtol=0, atol=1e-3)
    coupled = tv_denoise(x, weight=5.0, eps=1e-6, channelwise=False)
    assert (coupled - apart).abs().max() > 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_compute_in_float32(dtype):
    x = torch.rand(1, 1, 8, 8).to(dtype)
    assert torch.equal(tv_denoise(x, weight=1.0), tv_denoise(x.float(), weight=1.0).to(dtype))


def test_nan_is_not_cleaned_and_stays_in_its_image():
    x = torch.rand(2, 1, 8, 8)
    x[0, 0, 2, 2] = torch.nan
    u = tv_denoise(x, weight=1.0)
    assert u[0].isnan().any()
    assert u[1].isfinite().all()


def test_empty_batch_stays_empty():
    assert tv_denoise(torch.empty(0, 3, 4, 4), weight=1.0).shape == (0, 3, 4, 4)


def test_one_pixel_comes_back():
    x = torch.rand(1, 3, 1, 1)
    assert torch.equal(tv_denoise(x, weight=1.0), x)


def test_bad_input_names_the_argument():
    x = torch.ones(1, 1, 4, 4)
    for exception, name, call in [
        (TypeError, "x must", lambda: tv_denoise(x.long(), weight=1.0)),
        (ValueError, "x must", lambda: tv_denoise(x[0], weight=1.0)),
        (ValueError, "weight must", lambda: tv_denoise(x, weight=0.0)),
        (ValueError, "max_iter must", lambda: tv_denoise(x, weight=1.0, max_iter=0)),
        (ValueError, "eps must", lambda: tv_denoise(x, weight=1.0, eps=0.0)),
    ]:
        with pytest.raises(exception, match=name):
            call()
