"""The harness on a clock that the test turns by hand."""

import json

import pytest
import torch

from benchmarks import gpu, harness, run

CPU = torch.device("cpu")


class Clock:
    """Stands still until somebody works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def make_case(clock, ours=1e-3, theirs=3e-3, error=0.0):
    def bind(seconds, error):
        def rival(x):
            def thunk():
                clock.work(seconds)
                return x * 2 + error

            return thunk

        return rival

    return harness.Case(
        room="room",
        name="double",
        shape={"N": 1000},
        dtype=torch.float32,
        make_inputs=lambda device: (torch.ones(1000, device=device),),
        rivals={"fastvid": bind(ours, error), "eager": bind(theirs, 0.0)},
        oracle=bind(0.0, 0.0),
        nbytes=8000,
        flops=1000,
        missing={"other": "pip install other"},
    )


def test_quantiles_lie_on_straight_lines():
    times = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [harness.quantile(times, s) for s in (0, 0.2, 0.5, 0.8, 1)] == [1, 1.8, 3, 4.2, 5]
    assert harness.quantile([7.0], 0.8) == 7.0


def test_a_row_holds_time_rate_and_match(clock):
    case = make_case(clock)
    rows = harness.measure(case, CPU, clock=clock, ceilings={"copy_tb_per_s": 16e-6})
    ours, theirs, missing = rows
    assert ours["p50_ms"] == pytest.approx(1.0)
    assert theirs["p20_ms"] == pytest.approx(3.0)
    assert ours["tb_per_s"] == pytest.approx(8000 / 1e-3 / 1e12)
    assert ours["tflop_per_s"] == pytest.approx(1000 / 1e-3 / 1e12)
    assert ours["of_copy"] == pytest.approx(0.5)
    assert ours["match"]
    assert missing["install"] == "pip install other"
    assert {"machine", "torch", "commit", "threads", "date"} <= ours.keys()
    text = harness.table(rows)
    assert "3.00x" in text
    assert "not here: pip install other" in text


def test_a_wrong_result_does_not_match(clock):
    row = harness.measure(make_case(clock, error=1e-3), CPU, clock=clock)[0]
    assert not row["match"]
    assert row["error"] == pytest.approx(5e-4, rel=1e-3)
    assert "NO MATCH" in harness.table([row])


def test_many_small_errors_do_not_match(clock):
    """Each is within one rounding; their root mean square is not."""
    row = harness.measure(make_case(clock, error=2**-22), CPU, clock=clock)[0]
    assert row["error"] <= torch.finfo(torch.float32).eps
    assert not row["match"]


def test_rounds_interleave_and_change_who_goes_first(clock):
    order = []

    def timed(name):
        def once():
            order.append(name)
            clock.work(0.125)
            return [0.125]

        return once

    times = harness.interleave({n: timed(n) for n in "abc"}, 1.0, clock, rounds=3)
    assert "".join(order[-9:]) == "abcbcacab"
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_inputs_rotate_through_more_than_the_cache(clock, monkeypatch):
    monkeypatch.setattr(harness, "_cache_bytes", lambda device: 6000)
    made = []
    case = make_case(clock)
    monkeypatch.setitem(
        case.__dict__, "make_inputs", lambda device: made.append(1) or (torch.ones(1000),)
    )
    harness.measure(case, CPU, clock=clock)
    assert len(made) == 5  # 3 x 6000 bytes in sets of 4000


def test_rows_are_appended(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    harness.append(path, [{"a": 1}])
    harness.append(path, [{"a": 2}])
    assert [json.loads(line)["a"] for line in path.open()] == [1, 2]


def test_quick_run_over_all_rooms(capsys, tmp_path):
    assert run.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "rows.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "modulate/backward" in printed
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").open()]
    assert all(row["match"] for row in rows if row["rival"] in ("fastvid", "eager"))


def test_gpu_dry_run_goes_on_where_it_stopped(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_tests_pass", lambda log, seconds: True)
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    rows = (tmp_path / "rows.jsonl").read_text()
    assert json.loads((tmp_path / "environment.json").read_text())["copy_tb_per_s"] > 0
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "rows.jsonl").read_text() == rows
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "late"), "--minutes", "0"]) == 1
    assert "out of time" in capsys.readouterr().out


def test_gpu_refuses_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
