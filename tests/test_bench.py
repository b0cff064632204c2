"""The benchmark framework on synthetic times and toy cases; nothing here depends on the clock."""

import contextlib
import dataclasses
import io
import json
import types

import pytest
import torch

from regularizers._bench import Case, Goal, ScalingCurve, run, runner
from regularizers._bench.floors import copy, fresh_fill, fresh_fill_huge_pages
from regularizers._bench.measure import (
    MIN_ROUNDS,
    Samples,
    interleave,
    peak_allocated,
    peak_resident,
    trim_heap,
)
from regularizers._bench.results import FORMAT, Report, Spread, summarise

MEBIBYTE = 2**20


def _nothing():
    pass


def _case(**options):
    return Case("toy", _nothing, **{"peers": {"eager": _nothing}, **options})


def _summary(case, seconds, **options):
    samples = {
        name: Samples(times, [0] * len(times), [0] * len(times)) for name, times in seconds.items()
    }
    found = {"missing": {}, "peak_bytes": {}, "resident_bytes": {}, **options}
    return summarise(case, samples=samples, **found)


def test_spread_is_median_and_quartiles():
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)


def test_spread_of_one_number_is_that_number():
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_ratio_is_taken_round_by_round():
    # A machine that is four times slower in two rounds changes both candidates alike, and no ratio.
    result = _summary(_case(), {"ours": [1.0, 4.0, 1.0, 4.0], "eager": [2.0, 8.0, 2.0, 8.0]})
    assert result["eager"].time_ratio == Spread(0.5, 0.5, 0.5)
    assert result["eager"].seconds.median == 5.0


def test_best_of_stands_for_the_floor_with_the_least_median():
    case = _case(
        floors={"whole": _nothing, "blocked": _nothing},
        best_of={"products": ["whole", "blocked"]},
        goals=[Goal("products", at_most=1.0)],
    )
    result = _summary(case, {"ours": [3.0], "eager": [9.0], "whole": [4.0], "blocked": [2.0]})
    assert result.best == {"products": "blocked"}
    assert result.goals[0].ratio.median == 1.5


@pytest.mark.parametrize(("times", "met"), [([2.0, 2.0, 9.0], True), ([2.0, 3.0, 9.0], False)])
def test_goal_is_met_up_to_its_bound_by_the_median(times, met):
    result = _summary(
        _case(goals=[Goal("eager", at_most=2.0)]), {"ours": times, "eager": [1.0] * 3}
    )
    assert result.goals[0].met is met


def test_goal_of_memory_compares_peaks():
    case = _case(goals=[Goal("eager", at_most=1.2, quantity="memory")], timed=False)
    result = _summary(case, {}, peak_bytes={"ours": 130, "eager": 100})
    assert (result.goals[0].ratio.median, result.goals[0].met) == (1.3, False)


def test_goal_against_a_missing_candidate_is_neither_met_nor_missed():
    case = _case(goals=[Goal("eager", at_most=2.0)])
    result = _summary(case, {"ours": [1.0]}, missing={"eager": "not installed"})
    assert result.goals[0].met is None


def test_goal_reads_as_a_sentence():
    assert str(Goal("eager", at_most=1 / 7)) == "at least 7x faster than eager"
    assert str(Goal("fill", at_most=1.15)) == "at most 1.15x the time of fill"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"goals": [Goal("jax", at_most=1.0)]}, "goals must name a peer or a floor, got 'jax'"),
        ({"best_of": {"products": ["whole"]}}, "best_of must name floors, got 'whole'"),
        ({"floors": {"eager": _nothing}}, "candidates must have different names"),
    ],
)
def test_case_that_names_what_it_lacks_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        _case(**options)


def test_every_round_runs_every_candidate_once_in_changing_order():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = interleave(calls, seconds=0.0)
    rounds = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == MIN_ROUNDS
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 1
    assert all(len(found.seconds) == MIN_ROUNDS for found in samples.values())


def test_page_faults_of_a_fresh_tensor_are_counted():
    fresh = fresh_fill(64 * MEBIBYTE, dtype=torch.uint8)  # above the heap's threshold: always new
    kept = copy(2 * MEBIBYTE)
    samples = interleave({"fresh": fresh, "kept": kept}, seconds=0.0)
    # One fault a page of at most 2 MiB; the copy's own tensors were touched when they were made.
    assert min(samples["fresh"].minor_faults) >= 32
    assert sorted(samples["kept"].minor_faults)[MIN_ROUNDS // 2] < 32


def test_fresh_memory_makes_every_call_pay_for_its_pages():
    if not trim_heap():
        pytest.skip("needs glibc")
    small = fresh_fill(8 * MEBIBYTE, dtype=torch.uint8)  # the heap recycles a result of this size
    samples = interleave({"small": small}, seconds=0.0, fresh_memory=True)
    assert min(samples["small"].minor_faults) >= 4


def test_peak_allocated_is_exact():
    def call():
        first = torch.ones(64 * MEBIBYTE, dtype=torch.uint8)
        second = torch.ones(32 * MEBIBYTE, dtype=torch.uint8)
        del first
        return second, torch.ones(16 * MEBIBYTE, dtype=torch.uint8)

    assert peak_allocated(call) == 96 * MEBIBYTE


def test_peak_resident_sees_what_a_call_touches_and_frees():
    found = peak_resident(fresh_fill(64 * MEBIBYTE, dtype=torch.uint8))
    if found is None:
        pytest.skip("needs Linux with glibc")
    assert found == pytest.approx(
        64 * MEBIBYTE, abs=8 * MEBIBYTE
    )  # other threads, rounding of counters


def test_peak_resident_does_not_count_what_was_freed_before():
    def leave_a_free_heap():
        return [torch.ones(MEBIBYTE // 16, dtype=torch.uint8) for _ in range(1024)]

    leave_a_free_heap()
    found = peak_resident(_nothing)
    if found is None:
        pytest.skip("needs Linux with glibc")
    assert found < 8 * MEBIBYTE


def test_peak_resident_sees_memory_taken_past_the_allocator():
    found = peak_resident(lambda: b"x" * (64 * MEBIBYTE))
    if found is None:
        pytest.skip("needs Linux with glibc")
    assert found >= 56 * MEBIBYTE


def test_candidate_that_raises_is_missing_with_its_reason():
    def broken():
        raise RuntimeError("no compiler")

    result = runner.measure_case(_case(peers={"broken": broken}), seconds=0.0)
    assert result["broken"].missing == "RuntimeError: no compiler"
    assert result["broken"].seconds is None
    assert result["ours"].missing is None


def test_case_that_is_not_timed_has_memory_only():
    result = runner.measure_case(_case(timed=False), seconds=0.0)
    assert result.rounds == 0
    assert result["eager"].seconds is None
    assert result["eager"].peak_bytes == 0


def test_floors_write_what_they_say():
    assert torch.equal(fresh_fill(3, 5)(), torch.ones(3, 5))
    assert torch.equal(fresh_fill_huge_pages(3, MEBIBYTE)(), torch.ones(3, MEBIBYTE))
    assert copy(128)().nbytes == 64


def _toy_case(size):
    return Case(
        f"toy {size}",
        ours=lambda: torch.ones(size),
        peers={"eager": lambda: torch.zeros(size)},
        floors={"fill": fresh_fill(size), "absent": lambda: 1 / 0},
        goals=[Goal("eager", at_most=1e9)],
        bytes_moved=4 * size,
    )


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """One whole run: its status, its folder and what it printed."""
    curves = [
        ScalingCurve("time", "toy", "size", (1000, 4000), _toy_case),
        ScalingCurve(
            "memory", "toy", "size", (1000, 4000),
            lambda size: dataclasses.replace(_toy_case(size), timed=False),
        ),
    ]  # fmt: skip
    module = types.SimpleNamespace(
        cases=lambda device, quick: [_toy_case(1000)], scaling=lambda device, quick: curves
    )
    folder = tmp_path_factory.mktemp("bench") / "new"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(runner, "discover", lambda family: {"toy": module})
        status = run("toy", output=folder, seconds=0.0)
    return status, folder, printed.getvalue()


def test_run_writes_json_and_a_plot_for_every_curve(toy_run):
    status, folder, _ = toy_run
    assert status == 0
    names = ["toy-cpu-memory.png", "toy-cpu-time.png", "toy-cpu.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in folder.glob("*.png"))


def test_curve_may_drop_a_candidate_at_some_sizes(monkeypatch, tmp_path):
    def case(size):
        peers = {"slow": lambda: torch.ones(size)} if size < 200 else {}
        return Case("toy", ours=lambda: torch.ones(size), peers=peers)

    curve = ScalingCurve("dropped", "a toy", "size", (100, 200), case)
    module = types.SimpleNamespace(cases=lambda *_: [], scaling=lambda *_: [curve])
    monkeypatch.setattr(runner, "discover", lambda family: {"toy": module})
    assert run("toy", output=tmp_path, seconds=0.01) == 0
    report = Report.load(tmp_path / "toy-cpu.json")
    assert [found.get("slow") is None for found in report.curves[0].cases] == [False, True]
    assert (tmp_path / "toy-cpu-dropped.png").stat().st_size > 0


def test_run_prints_candidates_missing_ones_and_goals(toy_run):
    _, _, printed = toy_run
    for text in ("ours", "eager", "absent is missing: ZeroDivisionError", "1 of 1 goals met"):
        assert text in printed


def test_json_comes_back_as_the_report_that_was_saved(toy_run, tmp_path):
    _, folder, _ = toy_run
    report = Report.load(folder / "toy-cpu.json")
    report.save(tmp_path / "again.json")
    assert Report.load(tmp_path / "again.json") == report
    assert report.machine["torch"] == torch.__version__
    assert report.cases[0].goals[0].met is True
    assert report.curves[0].cases[1]["absent"].missing == "ZeroDivisionError: division by zero"


def test_json_of_another_format_is_refused(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"format": FORMAT + 1}))
    with pytest.raises(ValueError, match=f"must have format {FORMAT}, got {FORMAT + 1}"):
        Report.load(path)


def test_failure_of_ours_is_the_exit_status(monkeypatch, tmp_path):
    case = Case("toy", ours=lambda: 1 / 0, peers={"eager": _nothing})
    module = types.SimpleNamespace(cases=lambda device, quick: [case])
    monkeypatch.setattr(runner, "discover", lambda family: {"toy": module})
    assert run("toy", output=tmp_path, seconds=0.0) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "dropuot"}, "family must be one of"),
        ({"family": "dropout", "device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_unknown_names_are_reported_and_nothing_is_written(arguments, message, tmp_path, capsys):
    assert run(**arguments, output=tmp_path / "new") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_missing_packages_are_named_with_the_extra_that_brings_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: None)
    assert run("dropout", output=tmp_path) == 2
    assert "pip install 'regularizers[bench]'" in capsys.readouterr().err


def test_every_benchmark_file_lists_cases_and_curves():
    # The quick cases only: the others allocate what they measure, and solve it for their peers.
    for module in runner.discover(None).values():
        assert all(isinstance(case, Case) for case in module.cases("cpu", True))
        for quick in (True, False):
            assert all(isinstance(curve, ScalingCurve) for curve in module.scaling("cpu", quick))
