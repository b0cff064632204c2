"""The ways to q: search, gradient, bound, least squares."""

import math

import pytest
import torch

from regularizers.optim import (
    StateDelta,
    analytic_layer_q,
    analytic_q,
    drop_delta,
    learn_q,
    mse_q,
    search_q,
    seeded_score,
)
from regularizers.optim.delta_scale import sub_gaussian_factor


def test_sub_gaussian_factor_at_given_rates():
    assert sub_gaussian_factor(0.9) == pytest.approx(0.364096, abs=5e-7)
    assert sub_gaussian_factor(0.99) == pytest.approx(0.213270, abs=5e-7)
    assert sub_gaussian_factor(0.5) == 0.5
    assert sub_gaussian_factor(0.5 + 1e-6) == pytest.approx(0.5)
    assert sub_gaussian_factor(0.0) == 0.0


def objective(c, p, q, eta, gamma):
    first = (1 - (1 - p) / q) * sum(c)
    factor = (1 - 2 * p) / math.log((1 - p) / p)
    second = eta**2 * factor * sum(x * x for x in c) / (4 * q * q) + math.log(2 / (1 - gamma))
    return abs(eta * first + second)


@pytest.mark.parametrize("p", [0.9, 0.99])
def test_q_of_a_row_is_the_least_of_the_grid(p):
    torch.manual_seed(0)
    c = torch.randn(5, 30, dtype=torch.float64)
    have = analytic_q(c, p, eta=0.8, gamma=0.9)
    grid = [1 - p + 0.001 * i for i in range(round((0.998 - 1 + p) / 0.001) + 1)]
    for row, q in zip(c.tolist(), have.tolist(), strict=True):
        want = min(grid, key=lambda g: objective(row, p, g, 0.8, 0.9))
        assert q == pytest.approx(want, abs=1e-9)


def test_search_of_the_authors_code_is_the_loop():
    torch.manual_seed(1)
    c, p = torch.randn(20, 40, dtype=torch.float64), 0.9
    best, found = [math.inf] * 20, [0.0] * 20
    passed = [False] * 20
    q = 1 - p
    while q < 0.9985:
        for i, row in enumerate(c.tolist()):
            value = objective(row, p, q, 0.45, 0.95)
            if value < best[i]:
                best[i], found[i] = value, q
            else:
                passed[i] = True
        if sum(passed) >= 0.8 * 20:
            break
        q += 0.001
    have = analytic_q(c, p, match_reference=True)
    torch.testing.assert_close(have, torch.tensor(found, dtype=torch.float64), rtol=0, atol=1e-9)
    assert (have <= analytic_q(c, p)).all()


def test_layer_q_counts_the_bias_as_an_input():
    torch.manual_seed(0)
    before = {
        "fc.weight": torch.zeros(4, 6),
        "fc.bias": torch.zeros(4),
        "norm.weight": torch.ones(6),
    }
    after = {name: x + torch.randn(x.shape) for name, x in before.items()}
    mean = torch.randn(6)
    q = analytic_layer_q(StateDelta(after, before), {"fc": mean, "other": mean}, 0.9)
    c = torch.cat((after["fc.weight"] * mean, after["fc.bias"][:, None]), 1)
    assert q == {"fc": pytest.approx(analytic_q(c, 0.9).mean().item())}


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_least_squares_q_has_the_least_error(p):
    torch.manual_seed(0)
    c = torch.randn(200, 30, dtype=torch.float64) + 0.2
    s2, v = c.sum(1).square().mean(), c.square().sum(1).mean()
    error = lambda q: s2 * (1 - (1 - p) / q) ** 2 + v * p * (1 - p) / q**2
    best = mse_q(s2, v, p)
    assert error(best) < min(error(best * 0.99), error(best * 1.01))
    # The formula of the error against masks, within five standard deviations.
    out = torch.stack([drop_delta(c, p, q=0.6, seed=s).sum(1) for s in range(200)])
    squares = (out - c.sum(1)).square().mean(1)
    tolerance = 5 * squares.std().item() / 200**0.5
    assert squares.mean().item() == pytest.approx(error(0.6).item(), abs=tolerance)


def test_least_squares_q_where_nothing_adds_up():
    assert mse_q(0.0, 1.0, 0.9) == math.inf
    assert mse_q(0.0, 0.0, 0.9) == pytest.approx(0.1)
    assert drop_delta(torch.ones(8), 0.5, q=mse_q(0.0, 1.0, 0.5), seed=0).abs().sum() == 0


def test_search_finds_a_peak_to_the_fine_step():
    q = search_q(lambda q: -abs(q - 0.437), low=0.01)
    assert q == pytest.approx(0.44, abs=1e-9)


def test_search_stops_at_the_fourth_worse_score_in_a_row():
    seen = []

    def score(q):
        seen.append(round(q, 6))
        return -q

    assert search_q(score, low=0.1, patience=3, refine=1.0) == pytest.approx(0.1)
    assert seen == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_search_stays_between_its_bounds():
    seen = []
    search_q(lambda q: seen.append(q) or q, low=0.05, high=0.62)
    assert min(seen) == 0.05
    assert 0.61 < max(seen) <= 0.62


def test_score_over_seeds_leaves_one_outlier_out_and_repeats_its_seeds():
    calls = []

    def evaluate(q, seed):
        calls.append((q, seed))
        return {5: 1.0, 6: 2.0, 7: -50.0, 8: 3.0}[seed]

    score = seeded_score(evaluate, seed=5)
    assert score(0.1) == score(0.2) == 2.0
    assert [seed for _, seed in calls] == [5, 6, 7, 8] * 2
    assert seeded_score(lambda q, seed: seed, num_seeds=2)(0.0) == 0.5


def test_learned_q_lowers_the_loss_and_stays_in_range():
    q = learn_q(lambda q: (q["a"] - 0.15) ** 2 + (q["b"] + 5.0), ["a", "b"], p=0.9)
    assert q["a"] == pytest.approx(0.15, abs=0.05)
    assert q["b"] == pytest.approx(0.1)


def test_learning_stops_after_losses_that_are_no_better():
    calls = []

    def loss(q):
        calls.append(q["a"].item())
        return (q["a"] * 0).sum() + len(calls)

    assert learn_q(loss, ["a"], p=0.9, patience=5) == {"a": pytest.approx(0.1)}
    assert len(calls) == 6


def test_bad_input_names_the_argument():
    c = torch.ones(2, 3)
    nothing = StateDelta({}, {})
    for exception, name, call in [
        (ValueError, "c must", lambda: analytic_q(c[0], 0.9)),
        (TypeError, "c must", lambda: analytic_q(c.long(), 0.9)),
        (ValueError, "p must", lambda: analytic_q(c, 1.0)),
        (ValueError, "eta", lambda: analytic_q(c, 0.9, eta=0.0)),
        (ValueError, "gamma", lambda: analytic_q(c, 0.9, gamma=1.0)),
        (ValueError, "stop_fraction", lambda: analytic_q(c, 0.9, stop_fraction=0.0)),
        (ValueError, "means", lambda: analytic_layer_q(nothing, {"fc": c[0]}, 0.9)),
        (ValueError, "p must", lambda: mse_q(1.0, 1.0, 1.0)),
        (ValueError, "low", lambda: search_q(lambda q: q, low=0.0)),
        (ValueError, "high", lambda: search_q(lambda q: q, low=0.5, high=0.4)),
        (ValueError, "step", lambda: search_q(lambda q: q, low=0.5, step=0.0)),
        (ValueError, "refine", lambda: search_q(lambda q: q, low=0.5, refine=2.0)),
        (ValueError, "patience", lambda: search_q(lambda q: q, low=0.5, patience=-1)),
        (ValueError, "NaN", lambda: search_q(lambda q: math.nan, low=0.5)),
        (ValueError, "num_seeds", lambda: seeded_score(lambda q, s: q, num_seeds=0)),
        (ValueError, "layers", lambda: learn_q(lambda q: q, [])),
        (ValueError, "lr", lambda: learn_q(lambda q: q, ["a"], lr=0.0)),
    ]:
        with pytest.raises(exception, match=name):
            call()
