"""The table of goals on rows that the test makes."""

import fnmatch

import pytest

from benchmarks import goals
from benchmarks.goals import Goal
from benchmarks.kernels import bench_masked_attention


def row(case, rival="fastvid", **columns):
    return {"case": case, "rival": rival, "match": True, "p50_ms": 1.0, **columns}


def test_measured_takes_the_case_that_comes_off_worst():
    rows = [row("a/forward N=1", of_copy=0.9), row("a/forward N=2", of_copy=0.8)]
    assert goals.measured(Goal("a/forward *", "of_copy", 0.85, 0.9), rows) == (0.8, "")
    most = Goal("a/forward *", "of_copy", 0.85, 0.9, at_most=True)
    assert goals.measured(most, rows) == (0.9, "")
    assert goals.measured(Goal("b/*", "of_copy", 0.85, 0.9), rows) is None


def test_a_result_that_does_not_match_is_no_result():
    rows = [{**row("a/forward N=1", of_copy=0.9), "match": False}]
    assert goals.measured(Goal("a/*", "of_copy", 0.85, 0.9), rows) is None
    failed = [{"case": "a/forward N=1", "rival": "fastvid", "failed": "RuntimeError: no"}]
    assert goals.measured(Goal("a/*", "of_copy", 0.85, 0.9), failed) is None


def test_over_a_rival_is_its_time_over_ours():
    rows = [row("a/f", ratio_p50=1.0), row("a/f", "flex", ratio_p50=1.3)]
    rows += [row("a/f", "sliced", ratio_p50=1.2)]
    rows += [{**row("a/f", "dense", ratio_p50=0.5), "match": False}]  # computes something else
    assert goals.measured(Goal("a/f", "over flex", 1.1, 1.3), rows) == (1.3, "sliced 1.20x")
    assert goals.measured(Goal("a/f", "over cudnn", 1.1, 1.3), rows) is None


def test_rate_of_another_case():
    rows = [row("a/dense N=1", tflop_per_s=100.0), row("a/causal N=1", tflop_per_s=80.0)]
    goal = Goal("a/causal *", "rate of a/dense *", 0.87, 0.9)
    assert goals.measured(goal, rows) == (pytest.approx(0.8), "")
    assert goals.measured(goal, rows[1:]) is None


def test_the_table_says_what_was_reached(monkeypatch):
    wanted = [Goal("a/*", "of_copy", 0.85, 0.9), Goal("b/*", "of_copy", 0.85, 0.9)]
    wanted += [Goal("a/*", "peak_ratio", 0.7, 0.6, at_most=True), Goal("c/*", "of_copy", 1, 1)]
    monkeypatch.setattr(goals, "GOALS", wanted)
    rows = [row("a/f", of_copy=0.9, peak_ratio=0.8), row("b/f", of_copy=0.8)]
    says = goals.table(rows).splitlines()[1:]
    assert ["0.90 yes" in says[0], "0.80 NO" in says[1], "0.80 NO" in says[2]] == [True] * 3
    assert "not measured" in says[3]


def test_cases_without_a_goal_come_last():
    first, last = goals.GOALS[0].case.replace("*", "B=1"), "modulate/sideways"
    assert goals.value_of(first) == 0 < goals.value_of(last) == len(goals.GOALS)


def test_goals_of_masked_attention_name_its_cases():
    names = [
        f"{name} {way} B=" for name in bench_masked_attention.GPU for way in ("forward", "backward")
    ]
    for goal in goals.GOALS:
        for pattern in (goal.case, goal.column.removeprefix("rate of ")):
            room, _, name = pattern.partition("/")
            if room == "masked_attention":
                assert fnmatch.filter(names, name), pattern
