"""The benchmark of VDT runs, agrees and writes its rows."""

import json

import pytest
import torch

from benchmarks.models import bench_vdt, command, duel

CPU = torch.device("cpu")


def test_quick_run(tmp_path, capsys):
    arguments = "--quick --size S --frames 2 --job step --threads 1 --device cpu --out"
    assert bench_vdt.main([*arguments.split(), str(tmp_path / "rows.jsonl")]) == 0
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["match"]
    assert row["rounds"] == 2
    assert row["fastvid_peak_mib"] > row["fastvid_baseline_mib"] > 0
    assert row["wall_ratio_p20"] <= row["wall_ratio_p50"] <= row["wall_ratio_p80"]
    assert "vdt/step S/2 frames=2 side=128 batch=1 float32 depth 2" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["result", "gradient of weight", "change of weight"])
def test_every_tensor_is_compared(name):
    exact = {key: torch.ones(8) for key in ("result", "gradient of weight", "change of weight")}
    none = command.errors(exact, exact)
    assert command.agree(none, none)
    for value in (0.0, torch.nan):
        wrong = command.errors(exact | {name: torch.full((8,), value)}, exact)
        assert not command.agree(wrong, none)
    with pytest.raises(RuntimeError, match=name):
        command.errors({k: v for k, v in exact.items() if k != name}, exact)


def test_twice_the_error_of_the_rival_is_allowed():
    theirs = {"result": 0.01, "gradient of weight": 0.02}
    assert command.agree({"result": 0.02, "gradient of weight": 0.04}, theirs)
    assert not command.agree({"result": 0.03, "gradient of weight": 0.01}, theirs)


def test_the_floor_and_the_match_decide(monkeypatch, capsys):
    row = {"match": True, "wall_ratio_p50": 1.2, "room": "vdt"}
    monkeypatch.setattr(bench_vdt, "measure", lambda *_, **__: row)
    monkeypatch.setattr(command, "line", str)
    arguments = ["--size=S", "--frames=2", "--job=forward", "--threads=1", "--device=cpu"]
    assert bench_vdt.main(arguments) == 0
    assert bench_vdt.main([*arguments, "--floor", "1.2"]) == 0
    assert bench_vdt.main([*arguments, "--floor", "1.3"]) == 1
    row["match"] = False
    assert bench_vdt.main(arguments) == 1


def test_the_first_call_is_the_timed_one(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("sys.stdin", [])
    clock = iter(range(100))
    monkeypatch.setattr(duel.time, "perf_counter", lambda: next(clock) if len(calls) < 2 else 0)
    duel.serve(lambda: (lambda: calls.append("call"), lambda _: calls.append("kept")), CPU)
    assert calls == ["call", "kept", "call"]
    assert json.loads(capsys.readouterr().out)["first_call_s"] == 1
