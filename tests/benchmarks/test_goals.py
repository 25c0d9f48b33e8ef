"""The table of goals on rows that the test makes."""

import fnmatch

import pytest
import torch

from benchmarks import goals, run, run_models
from benchmarks.goals import Goal
from tests.benchmarks.cases import cases_on_a_gpu


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


def test_a_rival_that_did_not_match_is_no_comparison():
    rows = [row("a/f"), {**row("a/f", "flex", ratio_p50=1.3), "match": False}]
    assert goals.measured(Goal("a/f", "over flex", 1.1, 1.3), rows) is None
    rows = [{**row("a/dense N=1", tflop_per_s=100.0), "match": False}]
    rows += [row("a/causal N=1", tflop_per_s=80.0)]
    assert goals.measured(Goal("a/causal *", "rate of a/dense *", 0.87, 0.9), rows) is None


def test_microseconds_are_those_of_a_call():
    goal = Goal("a/*", "us", 6.0, 5.0, at_most=True)
    assert goals.measured(goal, [row("a/f", p50_ms=0.0055)]) == (5.5, "")
    assert goals.measured(goal, [{"case": "a/f", "rival": "fastvid", "match": True}]) is None


def test_the_table_says_what_was_reached(monkeypatch):
    wanted = [Goal("a/*", "of_copy", 0.85, 0.95), Goal("b/*", "of_copy", 0.85, 0.9)]
    wanted += [Goal("a/*", "peak_ratio", 0.7, 0.6, at_most=True), Goal("c/*", "of_copy", 1, 1)]
    wanted += [Goal("a/*", "us", 1200, 1100, at_most=True)]
    monkeypatch.setattr(goals, "GOALS", wanted)
    rows = [row("a/f", of_copy=0.9, peak_ratio=0.8), row("b/f", of_copy=0.8)]
    head, *says = goals.table(rows).splitlines()
    assert [word in head for word in ("goal", "stretch", "measured")] == [True] * 3
    verdicts = (">= 0.85 >= 0.95      0.90 yes", "0.80 NO", "<= 0.70 <= 0.60       0.80 NO")
    for line, verdict in zip(says, (*verdicts, "not measured", "1000.00 stretch"), strict=True):
        assert verdict in line


def test_cases_without_a_goal_come_last():
    first, last = goals.GOALS[0].case.replace("*", "B=1"), "modulate/sideways"
    assert goals.value_of(first) == 0 < goals.value_of(last) == len(goals.GOALS)


def test_every_goal_names_a_case_of_the_gpu(monkeypatch):
    cases = [case for room in run.rooms() for case in cases_on_a_gpu(room, monkeypatch)]
    labels = [case.label for case in cases]
    labels += [label.replace("float32", "bfloat16") for label in labels]
    for bench in map(run_models.bench, run_models.names()):
        labels += map(bench.label, bench.specs(torch.device("cuda"), False))
    for goal in goals.GOALS:
        for pattern in (goal.case, goal.column.removeprefix("rate of ")):
            assert "/" not in pattern or fnmatch.filter(labels, pattern), pattern


def test_every_room_and_model_has_a_goal():
    reached = {goal.case.partition("/")[0] for goal in goals.GOALS}
    assert {*run.rooms(), *run_models.names()} == reached
