"""The demo trains all ways alike, and its verdict follows the figures."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch

from regularizers import _bench, _demo
from regularizers._demo import ACCURACY, FUSED, HAND, NONE, ONE, SECONDS, STEPS

for _package in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(_package)

SMALL = _demo.Setting(seeds=2, epochs=2, train_images=50, batch=20, hidden=16, num_samples=3)


@pytest.fixture(autouse=True)
def _one_thread(_seeded):  # as run() does; _seeded gives the threads back
    torch.set_num_threads(1)


def same_figures(**changes):
    """Equal figures for all ways over six seeds, but for the changes of the fused way."""
    equal = {quantity: np.full(6, 10.0) for quantity in _demo.QUANTITIES}
    fused = {q: np.array(changes.get(q.name, equal[q])) for q in _demo.QUANTITIES}
    return {NONE: equal, ONE: equal, FUSED: fused, HAND: equal}


def curves(train_loss, accuracy=(90.0, 91.0)):
    rows = [10.0, 20.0], [1.0, 3.0], train_loss, [1.0, 1.0], accuracy
    return _demo.Curves(*np.array(rows)[:, None])


def test_every_way_records_every_epoch_of_every_seed():
    found = _demo.train(SMALL)
    assert list(found) == [NONE, ONE, FUSED, HAND]
    for way in found.values():
        for values in vars(way).values():
            assert values.shape == (2, 2)
            assert np.isfinite(values).all()


def test_progress_ticks_once_an_epoch():
    ticks = []
    _demo.train(SMALL, on_epoch=lambda: ticks.append(None))
    assert len(ticks) == SMALL.seeds * SMALL.epochs


def test_seconds_only_grow():
    assert all((np.diff(way.seconds) > 0).all() for way in _demo.train(SMALL).values())


def test_all_ways_start_from_equal_parameters_that_they_do_not_share():
    first, *others = _demo.networks(SMALL, seed=0).values()
    for other in others:
        for a, b in zip(first.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()


def test_seeds_start_from_different_parameters():
    a, b = (_demo.networks(SMALL, seed)[NONE].head.weight for seed in (0, 1))
    assert not torch.equal(a, b)


def test_equal_seeds_give_equal_losses_and_accuracies():
    first, second = _demo.train(SMALL), _demo.train(SMALL)
    for way in first:
        for name in ("train_loss", "test_loss", "accuracy"):
            assert np.array_equal(getattr(first[way], name), getattr(second[way], name))


def test_all_ways_agree_without_dropout_so_they_see_the_same_batches():
    plain, *others = _demo.train(replace(SMALL, p=0.0)).values()
    for other in others:  # up to the rounding of another order of sums
        np.testing.assert_allclose(other.train_loss, plain.train_loss, rtol=1e-4)


def test_fused_loss_and_loss_by_hand_have_one_mean():
    net = _demo.networks(replace(SMALL, num_samples=1000), seed=0)[NONE]
    x, y, _, _ = _demo._digits(20, seed=0)
    with torch.no_grad():
        net.head.weight *= 10  # so that averaging anything but losses would show
        single = torch.stack([_demo.LOSSES[ONE](net, x, y) for _ in range(100)])
        difference = _demo.LOSSES[FUSED](net, x, y) - _demo.LOSSES[HAND](net, x, y)
    assert difference.abs() < 5 * single.std() * (2 / 1000) ** 0.5  # five standard errors


def test_images_split_without_overlap_and_with_every_class():
    x, y, test_x, test_y = _demo._digits(50, seed=0)
    assert len(x) + len(test_x) == 1797
    assert y.unique().tolist() == test_y.unique().tolist() == list(range(10))
    assert x.amax() == test_x.amax() == 1


def test_target_counts_at_the_first_epoch_that_reaches_it():
    figures = _demo.summarise(curves([0.5, 0.04]), target=0.05)
    assert figures[STEPS].tolist() == [20.0]
    assert figures[SECONDS].tolist() == [3.0]


def test_missed_target_is_infinite_and_shown_as_not_reached():
    figures = _demo.summarise(curves([0.5, 0.4]), target=0.05)
    assert np.isinf([figures[STEPS], figures[SECONDS]]).all()
    assert STEPS.show(figures[STEPS]) == "not reached in 1 of 1"


def test_accuracy_is_that_of_the_last_epoch():
    assert _demo.summarise(curves([0.5, 0.4], (95.0, 93.0)), target=0.05)[ACCURACY].tolist() == [
        93.0
    ]


def test_equal_figures_are_within_the_noise():
    *sentences, _ = _demo.verdict(same_figures())
    for sentence in sentences:
        assert "better in" not in sentence
        assert "worse in" not in sentence
        assert "within the noise in test accuracy" in sentence


def test_difference_in_five_of_six_seeds_is_within_the_noise():
    figures = same_figures(**{"test accuracy": [50, 50, 50, 50, 50, 9]})
    assert "within the noise in test accuracy" in _demo.verdict(figures)[0]


def test_difference_in_all_seeds_is_told_in_its_direction():
    better = same_figures(**{"test accuracy": np.full(6, 12.0)})
    worse = same_figures(**{"test accuracy": np.full(6, 8.0)})
    assert "is better in test accuracy (12.0% against 10.0%);" in _demo.verdict(better)[0]
    assert "is worse in test accuracy (8.0% against 10.0%);" in _demo.verdict(worse)[0]


def test_lower_is_better_for_times_and_the_ratio_is_told():
    figures = same_figures(**{"time of a step": np.full(6, 2.5)})
    expected = "better in time of a step (2.50 ms against 10.00 ms, 4.00 times)"
    assert expected in _demo.verdict(figures)[2]


def test_target_missed_in_every_seed_is_worse():
    figures = same_figures(**{"steps to the target": np.full(6, np.inf)})
    expected = "worse in steps to the target (not reached in 6 of 6 against 10)"
    assert expected in _demo.verdict(figures)[1]


def test_chance_of_a_false_difference_follows_the_number_of_seeds():
    assert "each of the 6 seeds" in _demo.verdict(same_figures())[-1]
    assert "one of 32 comparisons" in _demo.verdict(same_figures())[-1]


def test_run_writes_curves_prints_table_and_ends_with_the_quick_bench(
    tmp_path, monkeypatch, capsys
):
    calls = []

    def bench(*args, **options):
        calls.append((args, options))
        return 5

    monkeypatch.setattr(_bench, "run", bench)
    output = tmp_path / "new"
    assert _demo.run(output, SMALL) == 5
    assert calls == [(("dropout",), {"device": "cpu", "quick": True, "output": output})]
    assert (output / "learning-curves.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for part in (NONE, ONE, FUSED, HAND, "Against no dropout", "learning-curves.png"):
        assert part in printed


def test_missing_package_is_named_with_its_cure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _demo.run(tmp_path) == 1
    message = "demo: matplotlib, rich, sklearn missing: pip install 'regularizers[bench]'\n"
    assert capsys.readouterr().err == message
