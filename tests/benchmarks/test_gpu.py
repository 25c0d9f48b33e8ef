"""The one run on a GPU machine, on the CPU."""

import json
import sys

import pytest
import torch

from benchmarks import goals, gpu, harness, run, run_models


@pytest.fixture
def short(monkeypatch):
    """One room and one small model; the tests of the GPU are taken to pass."""
    seen = []

    class Model:
        @staticmethod
        def specs(device, quick):
            assert quick
            return [{"job": "forward"}]

        label = staticmethod("toy/{job}".format_map)

        @staticmethod
        def within(spec, seconds):
            seen.append("model")
            ratios = dict.fromkeys([f"wall_ratio_p{p}" for p in (20, 50, 80)], 1.2)
            return {"case": "toy/forward", "match": True, **ratios}

    def tests(log, seconds):
        seen.append("tests")
        return {"case": gpu.TESTS, "rival": "tests", "match": True}

    monkeypatch.setattr(gpu, "_tests", tests)
    monkeypatch.setattr(gpu.command, "line", str)
    monkeypatch.setattr(gpu.run, "rooms", lambda: ["modulate"])
    monkeypatch.setattr(run_models, "names", lambda: ["toy"])
    monkeypatch.setattr(run_models, "bench", lambda name: Model)
    return seen


def test_a_dry_run_ends_with_the_goals_and_a_second_one_has_nothing_to_do(
    short, capsys, tmp_path, monkeypatch
):
    wanted = [goals.Goal("toy/*", "wall_ratio_p50", 1.1, 1.2)]
    monkeypatch.setattr(goals, "GOALS", wanted)
    arguments = ["--dry-run", "--out", str(tmp_path)]
    assert gpu.main(arguments) == 0
    assert short == ["tests", "model"]
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["copy_tb_per_s"] > 0
    assert {"torch", "driver", "power_w"} <= environment.keys()
    rows = harness.read_rows(tmp_path / "rows.jsonl")
    assert [rows[0]["case"], rows[1]["case"]] == [gpu.TESTS, "toy/forward"]  # it has a goal
    assert {row.get("room") for row in rows[2:]} == {"modulate"}
    assert "1.20 stretch" in capsys.readouterr().out.splitlines()[-1]
    assert gpu.main(arguments) == 0
    assert harness.read_rows(tmp_path / "rows.jsonl") == rows
    assert short == ["tests", "model"]


def test_a_run_that_was_cut_off_goes_on(short, capsys, tmp_path):
    arguments = ["--dry-run", "--out", str(tmp_path)]
    assert gpu.main([*arguments, "--minutes", "0"]) == 1
    left = len(run.cases("modulate", torch.device("cpu"), True)) + 1  # and the model
    assert f"out of time: {left} cases left" in capsys.readouterr().out
    assert len(harness.read_rows(tmp_path / "rows.jsonl")) == 1
    assert gpu.main(arguments) == 0
    assert short == ["tests", "model"]


def test_tests_that_failed_are_run_again(short, tmp_path, monkeypatch):
    arguments = ["--dry-run", "--out", str(tmp_path)]
    failing = {"case": gpu.TESTS, "rival": "tests", "match": False}
    passing = gpu._tests
    monkeypatch.setattr(gpu, "_tests", lambda log, seconds: failing)
    assert gpu.main(arguments) == 1
    monkeypatch.setattr(gpu, "_tests", passing)
    assert gpu.main([*arguments, "--keep-failed"]) == 1  # as after a device that died
    assert short == ["model"]
    assert gpu.main(arguments) == 0
    assert short == ["model", "tests"]


def test_what_failed_or_was_skipped_is_tried_once_more_after_the_rest(short, tmp_path, monkeypatch):
    measure, seen = harness.measure, []

    def faulty(case, *arguments, **options):
        seen.append(case.label)
        found = measure(case, *arguments, **options)
        if case is broken:
            raise RuntimeError("out of memory")
        if case is late:
            found[1] = {**found[0], "rival": "eager", "skipped": "the row's 1 s were over"}
        return found

    *cases, new = run.cases("modulate", torch.device("cpu"), True)[:5]
    broken, late = cases[:2]
    monkeypatch.setattr(harness, "measure", faulty)
    monkeypatch.setattr(gpu.run, "cases", lambda *_: cases)
    arguments = ["--dry-run", "--out", str(tmp_path)]
    assert gpu.main(arguments) == 1
    assert len(seen) == 4
    assert gpu.main([*arguments, "--keep-failed"]) == 1
    assert len(seen) == 4
    broken = late = None
    cases.append(new)
    assert gpu.main(arguments) == 0
    assert seen[4:] == [case.label for case in (new, *cases[:2])]
    assert gpu.main(arguments) == 0
    assert len(seen) == 7


def test_rows_of_another_commit_are_measured_anew(short, tmp_path, monkeypatch):
    arguments = ["--dry-run", "--out", str(tmp_path)]
    environment = gpu.machine.environment
    for commit in ("aa", "bb"):
        monkeypatch.setattr(
            gpu.machine,
            "environment",
            lambda device, commit=commit: {**environment(device), "commit": commit},
        )
        monkeypatch.setattr(harness, "environment", gpu.machine.environment)
        assert gpu.main(arguments) == 0
    assert short == ["tests", "model"] * 2
    found = harness.read_rows(tmp_path / "rows.jsonl")
    assert [row["commit"] for row in found if row["case"] == gpu.TESTS] == ["aa", "bb"]


def test_a_model_that_failed_is_tried_once_more(short, tmp_path, monkeypatch):
    arguments = ["--dry-run", "--out", str(tmp_path)]
    model = run_models.bench("toy")
    within = model.within

    def fails(spec, seconds):
        raise RuntimeError("the row's seconds were over before a contender answered")

    monkeypatch.setattr(model, "within", fails)
    assert gpu.main(arguments) == 1
    monkeypatch.setattr(model, "within", within)
    assert gpu.main(arguments) == 0
    assert short == ["tests", "model"]


def test_a_case_that_raises_is_a_row_and_the_run_goes_on(short, tmp_path, monkeypatch):
    measure = harness.measure

    def faulty(case, *arguments, **options):
        if case.name == "forward":
            raise RuntimeError("out of memory")
        return measure(case, *arguments, **options)

    monkeypatch.setattr(harness, "measure", faulty)
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 1
    rows = harness.read_rows(tmp_path / "rows.jsonl")
    assert sum(row.get("failed") == "RuntimeError: out of memory" for row in rows) == 2
    assert any(row.get("name") == "backward" and row["match"] for row in rows if "p50_ms" in row)


def test_a_device_that_died_is_started_again(short, tmp_path, monkeypatch):
    started = []

    def execv(path, command):
        started.append(command)
        raise SystemExit

    monkeypatch.setattr(gpu, "_device_works", lambda device: False)
    monkeypatch.setattr(gpu.os, "execv", execv)
    monkeypatch.setattr(gpu.os, "chdir", lambda path: None)
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--out", str(tmp_path), "--minutes", "2"])
    (command,) = started
    assert command[:4] == [sys.executable, "-m", "benchmarks", "gpu"]
    assert 0 < float(command[command.index("--minutes") + 1]) < 2
    assert "--keep-failed" in command  # else it would break on the same case for ever
    kept = {row["case"] for row in harness.read_rows(tmp_path / "rows.jsonl")}
    assert kept == {gpu.TESTS, "modulate/forward B=1 N=64 D=384 float32"}


def test_cases_get_what_is_left_of_the_time_at_most(short, tmp_path, monkeypatch):
    budgets = []
    monkeypatch.setattr(
        harness, "measure", lambda case, device, budget, **_: budgets.append(budget) or []
    )
    monkeypatch.setattr(harness, "table", str)
    gpu.main(["--dry-run", "--out", str(tmp_path / "a"), "--row-seconds", "3"])
    gpu.main(["--dry-run", "--out", str(tmp_path / "b"), "--minutes", "0.03"])
    cases = len(run.cases("modulate", torch.device("cpu"), True))
    assert budgets[:cases] == [3.0] * cases
    assert all(0 < budget < 1.8 for budget in budgets[cases:])


def test_the_tests_of_the_gpu_are_run_and_their_end_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.sys, "executable", "false")
    assert not gpu._tests(tmp_path / "tests.log", 60)["match"]
    monkeypatch.setattr(gpu.sys, "executable", "true")
    assert gpu._tests(tmp_path / "tests.log", 60)["match"]


def test_it_refuses_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
