"""Blind trials in groups: the facts of the sheet of paper 1."""

import math
import random
from collections import Counter

import pytest

from regularizers.tasks import GroupedBlindTrial

POLICIES, TASKS = ("a", "b", "c"), ("pick", "place", "pour", "fold")


def _trial(**options):
    return GroupedBlindTrial(POLICIES, TASKS, 6, **{"seed": 3, **options})


def _record_all(trial, outcome):
    for entry in trial.schedule():
        trial.record(entry.code, outcome(trial.policy_of(entry.code), entry))


@pytest.mark.parametrize("group_size", [None, 1, 2, 4])
def test_every_policy_meets_every_task_equally_often(group_size):
    trial = _trial(group_size=group_size)
    counts = Counter((trial.policy_of(t.code), t.task) for t in trial.schedule())
    assert set(counts) == {(policy, task) for policy in POLICIES for task in TASKS}
    assert set(counts.values()) == {6}


@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_every_group_has_every_policy_once_per_task(group_size):
    trial = _trial(group_size=group_size)
    assert trial.num_groups == 6 * len(TASKS) // group_size
    for group in range(trial.num_groups):
        entries = [t for t in trial.schedule() if t.group == group]
        tasks = {t.task for t in entries}
        assert len(tasks) == group_size
        met = Counter((trial.policy_of(t.code), t.task) for t in entries)
        assert met == dict.fromkeys(((p, t) for p in POLICIES for t in tasks), 1)


def test_groups_are_run_one_after_the_other_in_random_order_within():
    trial = _trial()
    groups = [t.group for t in trial.schedule()]
    assert groups == sorted(groups)
    orders = {
        tuple((trial.policy_of(t.code), t.task) for t in trial.schedule() if t.group == group)
        for group in range(trial.num_groups)
    }
    assert len(orders) == trial.num_groups


def test_codes_are_different_and_carry_no_name():
    codes = [t.code for t in _trial().schedule()]
    assert len(set(codes)) == len(codes) == 72
    assert all(code.isalpha() and code.isupper() and len(code) == 5 for code in codes)
    assert sorted(codes) != codes


def test_the_seed_decides_everything():
    assert _trial().schedule() == _trial().schedule()
    assert _trial().schedule() != _trial(seed=4).schedule()
    assert [_trial().policy_of(t.code) for t in _trial().schedule()] == [
        _trial().policy_of(t.code) for t in _trial().schedule()
    ]


def test_position_within_a_group_favours_no_policy():
    # First place of 900 groups: 4 standard deviations of a third of them.
    trial = GroupedBlindTrial(POLICIES, ["pick"], 900, seed=0)
    first = Counter(trial.policy_of(t.code) for t in trial.schedule()[::3])
    assert all(abs(count - 300) < 4 * math.sqrt(200) for count in first.values())


def test_unblinding_waits_for_every_outcome():
    trial = _trial()
    for entry in trial.schedule()[:-1]:
        trial.record(entry.code, 1)
    with pytest.raises(RuntimeError, match="1 of 72 are missing"):
        trial.unblind()
    assert trial.pending == trial.schedule()[-1:]
    trial.record(trial.pending[0].code, 0)
    assert trial.unblind().identities[trial.schedule()[0].code] in POLICIES


def test_scores_are_means_within_groups_then_over_groups():
    trial = GroupedBlindTrial(["a", "b"], ["x", "y"], 2, seed=0)
    values = {("a", "x", 0): 1, ("a", "y", 0): 3, ("a", "x", 1): 5, ("a", "y", 1): 11}
    _record_all(trial, lambda policy, t: values.get((policy, t.task, t.group), -1))
    result = trial.unblind()
    assert result.scores["a"].mean == ((1 + 3) / 2 + (5 + 11) / 2) / 2
    assert result.scores["b"] == (-1, -1, -1)
    assert result.differences["a", "b"].mean == 6


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    # 95 % percentile intervals of 30 groups; 200 trials: 4 standard deviations are 6 %, and the
    # percentile method is known to cover a little less than it says.
    generator = random.Random(1)
    covered = 0
    for seed in range(200):
        trial = GroupedBlindTrial(["a", "b"], ["x"], 30, seed=seed)
        _record_all(trial, lambda policy, t: generator.random() < (0.6 if policy == "a" else 0.3))
        low, high = trial.unblind(num_resamples=500).differences["a", "b"][1:]
        covered += low <= 0.3 <= high
    assert 0.87 <= covered / 200 <= 1.0


def test_drift_between_groups_cancels_in_the_differences():
    trial = GroupedBlindTrial(["a", "b"], ["x"], 10, seed=0)
    _record_all(trial, lambda policy, t: 10 * t.group + (policy == "a"))
    result = trial.unblind()
    assert result.differences["a", "b"] == (1, 1, 1)
    assert result.scores["a"].high - result.scores["a"].low > 20


def test_a_wider_confidence_gives_a_wider_interval():
    trial = GroupedBlindTrial(["a", "b"], ["x"], 20, seed=0)
    _record_all(trial, lambda policy, t: t.group % 3)
    narrow, wide = (trial.unblind(confidence=c).scores["a"] for c in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high
    assert trial.unblind() == trial.unblind()


def test_one_group_gives_no_interval():
    trial = GroupedBlindTrial(["a", "b"], ["x"], 1, seed=0)
    _record_all(trial, lambda policy, t: 1.0)
    score = trial.unblind().scores["a"]
    assert score.mean == 1.0
    assert math.isnan(score.low)
    assert math.isnan(score.high)


def test_outcomes_recorded_again_continue_a_trial():
    first, second = _trial(), _trial()
    for entry in first.schedule()[:5]:
        first.record(entry.code, True)
    for code, outcome in first.outcomes.items():
        second.record(code, outcome)
    assert second.pending == first.pending


def test_bad_input_names_the_argument():
    trial = _trial()
    code = trial.schedule()[0].code
    trial.record(code, 1)
    other = trial.schedule()[1].code
    build = GroupedBlindTrial
    for exception, name, call in [
        (ValueError, "policies must", lambda: build(["a"], TASKS, 2, seed=0)),
        (ValueError, "policies must", lambda: build(["a", "a"], TASKS, 2, seed=0)),
        (TypeError, "policies must", lambda: build("ab", TASKS, 2, seed=0)),
        (ValueError, "tasks must", lambda: build(POLICIES, [], 2, seed=0)),
        (ValueError, "trials_per_task must", lambda: build(POLICIES, TASKS, 0, seed=0)),
        (ValueError, "group_size must", lambda: _trial(group_size=3)),
        (ValueError, "group_size must", lambda: _trial(group_size=0)),
        (TypeError, "seed must", lambda: _trial(seed=None)),
        (ValueError, "code must", lambda: trial.record(code, 0)),
        (ValueError, "code must", lambda: trial.record("XXXX", 0)),
        (ValueError, "code must", lambda: trial.policy_of("XXXX")),
        (ValueError, "outcome must", lambda: trial.record(other, math.nan)),
        (TypeError, "outcome must", lambda: trial.record(other, "yes")),
        (ValueError, "confidence must", lambda: trial.unblind(confidence=1.0)),
        (ValueError, "num_resamples must", lambda: trial.unblind(num_resamples=0)),
    ]:
        with pytest.raises(exception, match=name):
            call()
    assert trial.outcomes == {code: 1.0}
