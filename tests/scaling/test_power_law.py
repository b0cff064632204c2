"""Saturating power laws (sheet of paper 18)."""

import math
import warnings

import pytest
import torch

from regularizers.scaling import (
    JointFit,
    PowerLawFit,
    data_efficiency,
    fit_joint_asymptote,
    fit_power_law,
)

SIZES = torch.tensor([0.15, 0.3, 0.6, 1.4], dtype=torch.float64)
LAW = PowerLawFit(E=3.43, A=0.05, alpha=1.02)


def test_four_points_without_noise_recover_the_law():
    fit = fit_power_law(SIZES, LAW.predict(SIZES))
    for got, expected in ((fit.E, 3.43), (fit.A, 0.05), (fit.alpha, 1.02)):
        assert abs(got - expected) < 1e-8
    assert fit.identifiable
    assert fit.asymptote == fit.E


@pytest.mark.parametrize(("alpha", "A", "unit"), [(0.05, 2.0, 1e9), (0.3, 2.0, 1e6), (3.0, 9, 1)])
def test_laws_of_any_exponent_and_unit_are_recovered(alpha, A, unit):
    x = unit * torch.tensor([1.0, 2, 4, 8, 16], dtype=torch.float64)
    law = PowerLawFit(E=1.5, A=A * unit**alpha, alpha=alpha)
    fit = fit_power_law(x, law.predict(x))
    # A flat law leaves E loose: 1e-15 of rounding in the losses counts 1e4-fold.
    assert abs(fit.E - 1.5) < 1e-8
    assert abs(fit.alpha - alpha) < 1e-8
    assert abs(fit.A / law.A - 1) < 1e-6


def test_three_points_are_met_exactly_and_two_with_a_known_exponent():
    fit = fit_power_law(SIZES[:3], LAW.predict(SIZES[:3]))
    assert abs(fit.E - 3.43) < 1e-8
    assert all(math.isnan(error) for error in fit.stderr)
    fit = fit_power_law(SIZES[:2], LAW.predict(SIZES[:2]), alpha=1.02)
    assert abs(fit.E - 3.43) < 1e-8
    assert fit.alpha == pytest.approx(1.02, abs=1e-15)


def _noisy(seed, sigma=2e-3, n=12):
    generator = torch.Generator().manual_seed(seed)
    x = torch.logspace(-1, 1, n, dtype=torch.float64)
    noise = sigma * torch.randn(n, generator=generator, dtype=torch.float64)
    return x, (0.5 * x**-0.5 + 3) * noise.exp()


def test_standard_errors_are_the_spread_of_fits_to_fresh_data():
    fits = [fit_power_law(*_noisy(seed), num_bootstrap=0) for seed in range(60)]
    spread = torch.tensor([[fit.E, fit.A, fit.alpha] for fit in fits]).std(0)
    errors = torch.tensor([fit_power_law(*_noisy(seed)).stderr for seed in range(10)]).mean(0)
    # Either is known to some 10 %, and a bootstrap of 12 points is rough.
    assert torch.all((errors / spread - 1).abs() < 0.4)


def test_bootstrap_is_reproducible_and_leaves_the_global_generator():
    state = torch.get_rng_state()
    first, second = (fit_power_law(*_noisy(0)) for _ in range(2))
    assert first == second
    assert fit_power_law(*_noisy(0), seed=1).stderr != first.stderr
    assert torch.equal(torch.get_rng_state(), state)


def test_huber_ignores_an_outlier_that_least_squares_follow():
    x, loss = _noisy(0, sigma=1e-4)
    loss[5] *= 1.1
    robust, plain = fit_power_law(x, loss, huber_delta=1e-3), fit_power_law(x, loss)
    assert abs(robust.E - 3) < 0.01
    assert abs(plain.E - 3) > 0.02


def test_points_of_no_weight_do_not_count():
    x, loss = _noisy(0)
    weights = torch.ones(12, dtype=torch.float64)
    weights[3] = 0
    loss_bad = loss.clone()
    loss_bad[3] = 9.0
    one = fit_power_law(x, loss_bad, weights=weights, num_bootstrap=0)
    other = fit_power_law(x[weights > 0], loss[weights > 0], num_bootstrap=0)
    assert pytest.approx(other.E, rel=1e-7) == one.E


def test_weights_repeat_points():
    x, loss = _noisy(1)
    twice = fit_power_law(torch.cat([x, x[:4]]), torch.cat([loss, loss[:4]]), num_bootstrap=0)
    weights = [2.0] * 4 + [1.0] * 8
    assert (
        pytest.approx(twice.E, rel=1e-7)
        == fit_power_law(x, loss, weights=weights, num_bootstrap=0).E
    )


def test_asymptote_on_a_bound_warns_and_is_flagged():
    with pytest.warns(UserWarning, match="not identifiable"):
        fit = fit_power_law(SIZES, SIZES**-0.5)
    assert not fit.identifiable
    assert fit.E == 0
    assert abs(fit.alpha - 0.5) < 1e-8


@pytest.mark.parametrize("losses", [[1.0, 2, 3, 4], [2.0, 2, 2, 2]])
def test_losses_that_do_not_fall_warn_and_are_flagged(losses):
    with pytest.warns(UserWarning, match="not identifiable"):
        assert not fit_power_law([1.0, 2, 3, 4], losses).identifiable


def test_bounds_are_respected():
    with pytest.warns(UserWarning, match="not identifiable"):
        fit = fit_power_law(SIZES, LAW.predict(SIZES), asymptote_bounds=(0.0, 3.4))
    assert fit.E == 3.4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = fit_power_law(SIZES, LAW.predict(SIZES), asymptote_bounds=(3.4, 3.45))
    assert abs(fit.E - 3.43) < 1e-8


@pytest.mark.parametrize(
    ("exception", "match", "arguments", "options"),
    [
        (ValueError, "x must have at least 3", ([1.0, 2.0], [2.0, 1.0]), {}),
        (ValueError, "x must have at least 3", ([1.0, 2.0, 2.0], [2.0, 1.0, 1.0]), {}),
        (ValueError, "x must have at least 2", ([1.0], [2.0]), {"alpha": 1.0}),
        (ValueError, "x must be finite and above 0", ([0.0, 1.0, 2.0], [3.0, 2.0, 1.0]), {}),
        (ValueError, "x must be finite and above 0", ([-1.0, 1.0, 2.0], [3.0, 2.0, 1.0]), {}),
        (ValueError, "loss must be finite", ([1.0, 2.0, 3.0], [3.0, math.nan, 1.0]), {}),
        (ValueError, "loss must be finite", ([1.0, 2.0, 3.0], [3.0, math.inf, 1.0]), {}),
        (ValueError, "loss must have 3", ([1.0, 2.0, 3.0], [3.0, 2.0]), {}),
        (ValueError, "x must have shape", (1.0, [3.0]), {}),
        (ValueError, "weights must be", ([1.0, 2, 3], [3.0, 2, 1]), {"weights": [1.0, -1, 1]}),
        (ValueError, "alpha must", ([1.0, 2, 3], [3.0, 2, 1]), {"alpha": 0.0}),
        (ValueError, "huber_delta must", ([1.0, 2, 3], [3.0, 2, 1]), {"huber_delta": -1.0}),
        (ValueError, "num_restarts must", ([1.0, 2, 3], [3.0, 2, 1]), {"num_restarts": 0}),
        (TypeError, "num_bootstrap must", ([1.0, 2, 3], [3.0, 2, 1]), {"num_bootstrap": 1.5}),
        (
            ValueError,
            "asymptote_bounds must",
            ([1.0, 2, 3], [3.0, 2, 1]),
            {"asymptote_bounds": (2.0, 3.0)},
        ),
    ],
)
def test_bad_input_names_the_argument(exception, match, arguments, options):
    with pytest.raises(exception, match=match):
        fit_power_law(*arguments, **options)


def _joint(n, k):
    return 3.17 + 0.1 * n**-0.8 + (0.2 + 0.05 * n) / k


def test_joint_asymptote_is_the_iterated_limit():
    losses = {(n, k): _joint(n, k) for n in SIZES.tolist() for k in (1, 2, 3, 5)}
    fit = fit_joint_asymptote(losses)
    assert isinstance(fit, JointFit)
    assert fit.identifiable
    assert abs(fit.E - 3.17) < 1e-8
    assert fit.asymptote == fit.E
    for size, law in fit.by_members.items():
        assert abs(law.E - (3.17 + 0.1 * size**-0.8)) < 1e-8
        assert abs(law.A - (0.2 + 0.05 * size)) < 1e-8
    assert abs(fit.by_size.alpha - 0.8) < 1e-7


def test_free_member_exponents_are_fitted_for_each_size():
    losses = {
        (n, k): 3.0 + 0.1 / n + 0.2 * k ** -(0.5 + 0.2 * n)
        for n in (0.5, 1.0, 2.0)
        for k in (1, 2, 4, 8)
    }
    fit = fit_joint_asymptote(losses, member_exponent=None)
    assert abs(fit.E - 3.0) < 1e-6
    assert abs(fit.by_members[2.0].alpha - 0.9) < 1e-6


def test_bad_losses_of_ensembles_are_named():
    losses = {(n, k): _joint(n, k) for n in (1.0, 2.0) for k in (1, 2)}
    with pytest.raises(ValueError, match="3 sizes"):
        fit_joint_asymptote(losses)
    with pytest.raises(ValueError, match="size N = 4"):
        fit_joint_asymptote({**losses, (4.0, 1): 3.0})
    with pytest.raises(ValueError, match="size N = 4"):
        fit_joint_asymptote({**losses, (4.0, 1): math.nan, (4.0, 2): 3.0})
    with pytest.raises(TypeError, match="losses must"):
        fit_joint_asymptote([1.0])


def test_data_efficiency_has_the_value_of_the_sheet():
    law = PowerLawFit(E=3.0, A=2.0, alpha=0.3)
    assert law.predict(0.2).item() - 0.3 == pytest.approx(2 * 0.2**-0.3 + 2.7, rel=1e-6)
    assert abs(data_efficiency(2 * 0.2**-0.3 + 2.7, law, 0.2).item() - 1.38) < 5e-3
    assert data_efficiency(law.predict(0.7), law, 0.7).item() == pytest.approx(1, rel=1e-5)


def test_data_efficiency_is_infinite_from_the_asymptote_down():
    law = PowerLawFit(E=3.0, A=2.0, alpha=0.3)
    result = data_efficiency(torch.tensor([3.0, 2.0, math.nan]), law, 0.2)
    assert result[:2].tolist() == [math.inf, math.inf]
    assert result[2].isnan()


def test_bad_input_of_data_efficiency_names_the_argument():
    law = PowerLawFit(E=3.0, A=2.0, alpha=0.3)
    with pytest.raises(ValueError, match="tokens must"):
        data_efficiency(4.0, law, 0.0)
    with pytest.raises(TypeError, match="baseline must"):
        data_efficiency(4.0, (3.0, 2.0, 0.3), 1.0)


def test_inverse_undoes_prediction():
    x = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    torch.testing.assert_close(LAW.inverse(LAW.predict(x)), x)
