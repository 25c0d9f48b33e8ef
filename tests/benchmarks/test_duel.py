"""Two contenders in turn, on a clock and with processes of the test's making."""

import io
import stat
import time

import pytest
import torch

from benchmarks import run_models
from benchmarks.models import bench_vdt, command, duel

SPECS = {name: {"device": "cpu"} for name in ("fastvid", "eager")}
PACE = {"turns": 1, "rounds": 3, "seconds": 0.0, "need_mib": 1.0}


@pytest.fixture
def clock(monkeypatch):
    """Contenders that take a second to start and a second a call."""
    now = [0.0]

    class Contender:
        alive = 0

        def __init__(self, module, spec, end):
            now[0] += 1
            Contender.alive += 1

        def __enter__(self):
            return self

        def __exit__(self, *error):
            Contender.alive -= 1

        def call(self):
            now[0] += 1
            return {"wall_s": 1.0, "cpu_s": 1.0}

        def finish(self):
            return {"first_call_s": 2.0, "baseline_mib": 10.0, "peak_mib": 20.0}

    monkeypatch.setattr(duel, "Contender", Contender)
    monkeypatch.setattr(duel.time, "monotonic", lambda: now[0])
    yield now
    assert Contender.alive == 0


def test_rounds_are_the_least_and_seconds_ask_for_more(clock):
    assert duel.duel("", SPECS, **PACE)["rounds"] == 3
    assert duel.duel("", SPECS, **(PACE | {"seconds": 20.0}))["rounds"] == 10
    assert duel.duel("", SPECS, **(PACE | {"turns": 2}))["rounds"] == 6


@pytest.mark.parametrize(("end", "rounds"), [(0.0, 1), (5.5, 1), (6.5, 2), (100.0, 3)])
def test_no_round_starts_that_would_not_be_done_in_time(clock, end, rounds):
    assert duel.duel("", SPECS, **PACE, end=end)["rounds"] == rounds


def test_two_that_do_not_fit_together_come_one_after_the_other(clock, monkeypatch):
    assert not duel.duel("", SPECS, **PACE)["apart"]
    assert duel.duel("", SPECS, **(PACE | {"need_mib": 1e12}))["apart"]
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**40))
    on_gpu = {name: {"device": "cuda"} for name in SPECS}
    assert not duel.duel("", on_gpu, **(PACE | {"need_mib": 512.0}))["apart"]
    assert duel.duel("", on_gpu, **(PACE | {"need_mib": 513.0}))["apart"]
    assert emptied


def test_a_contender_that_does_not_answer_is_ended(tmp_path, monkeypatch):
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(silent.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(duel.sys, "executable", str(silent))
    began = []
    popen = duel.subprocess.Popen
    monkeypatch.setattr(
        duel.subprocess, "Popen", lambda *args, **kw: began.append(popen(*args, **kw)) or began[0]
    )
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="seconds were over"):
        duel.Contender("module", {}, end=start + 0.2)
    assert time.monotonic() - start < 30
    assert began[0].poll() is not None


@pytest.mark.parametrize(("once", "calls"), [(True, 1), (False, 2)])
def test_a_contender_whose_result_alone_is_wanted_is_called_once(monkeypatch, once, calls):
    answers, called, kept = io.StringIO(), [], []
    monkeypatch.setattr(duel.sys, "stdout", answers)
    monkeypatch.setattr(duel.sys, "stdin", io.StringIO("finish\n"))
    duel.serve(lambda: (lambda: called.append(1), kept.append), torch.device("cpu"), once)
    assert len(called) == calls
    assert len(kept) == 1
    assert "first_call_s" in answers.getvalue().splitlines()[0]


def test_a_row_of_a_model_keeps_to_its_seconds(monkeypatch):
    assert command.within(60.0)["limit"] == 60.0
    assert command.within(0)["limit"] == float("inf")
    ends = []
    monkeypatch.setattr(command.time, "monotonic", lambda: 100.0)

    def stop(*_, end, **__):
        ends.append(end)
        raise RuntimeError("enough")

    monkeypatch.setattr(command, "duel", stop)
    for bench in map(run_models.bench, run_models.names()):
        (spec, *_) = bench.specs(torch.device("cpu"), True)
        with pytest.raises(RuntimeError, match="enough"):
            bench.within(spec, 7.0)
    assert ends == [107.0] * len(run_models.names())


@pytest.mark.parametrize("name", run_models.names())
def test_models_keep_to_as_many_cores_as_threads(name, monkeypatch, capsys):
    seen = []

    def measure(spec, **_):
        seen.append(len(command.machine.environment(torch.device("cpu"))["cores"]))
        return {"match": True, "wall_ratio_p50": 1.0}

    bench = run_models.bench(name)
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(command, "line", str)
    assert bench.main(["--quick", "--threads", "1", "--device", "cpu"]) == 0
    assert set(seen) == {1}


def test_rows_of_a_model_are_kept_under_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.rows, "RESULTS", tmp_path)
    monkeypatch.setattr(command.machine, "folder", lambda device: "here")
    monkeypatch.setattr(command, "line", str)
    ratios = {"match": True, "wall_ratio_p50": 1.0, "room": "vdt"}
    monkeypatch.setattr(
        bench_vdt, "measure", lambda spec, **_: {"case": bench_vdt.label(spec), **spec, **ratios}
    )
    arguments = [
        "--quick",
        "--size",
        "S",
        "--frames",
        "2",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--save",
    ]
    for _ in range(2):
        assert bench_vdt.main(arguments) == 0
        found = command.harness.read_rows(tmp_path / "here" / "vdt.jsonl")
        assert [row["job"] for row in found] == list(bench_vdt.JOBS)
