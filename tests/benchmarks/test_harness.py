"""The rows of a case, on a clock that the test turns by hand."""

import dataclasses

import pytest
import torch

from benchmarks import harness, run

CPU = torch.device("cpu")
CEILINGS = {"copy_tb_per_s": 16e-6, "matmul_fp32_tflop_per_s": 4e-6}
CEILINGS["matmul_bf16_tflop_per_s"] = 8e-6


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


def rival(clock, seconds=0.0, error=0.0, first=0.0):
    """Doubles its input in so many seconds; the very first call takes `first` more."""
    left = [first]

    def bind(x):
        def thunk():
            clock.work(seconds + left[0])
            left[0] = 0.0
            return x * 2 + error

        return thunk

    return bind


def make_case(clock, ours=1e-3, theirs=3e-3, error=0.0, **changes):
    case = harness.Case(
        room="room",
        name="double",
        shape={"N": 1000},
        dtype=torch.float32,
        make_inputs=lambda device: (torch.ones(1000, device=device),),
        rivals={"fastvid": rival(clock, ours, error), "eager": rival(clock, theirs)},
        oracle=rival(clock),
        nbytes=8000,
        flops=1000,
        missing={"other": "pip install other"},
    )
    return dataclasses.replace(case, **changes)


def test_a_row_holds_time_rate_and_match(clock):
    case = make_case(clock)
    rows = harness.measure(case, CPU, clock=clock, ceilings=CEILINGS)
    ours, theirs, missing = rows
    assert ours["p50_ms"] == pytest.approx(1.0)
    assert theirs["p20_ms"] == pytest.approx(3.0)
    assert theirs["ratio_p50"] == pytest.approx(3.0)
    assert ours["tb_per_s"] == pytest.approx(8000 / 1e-3 / 1e12)
    assert ours["tflop_per_s"] == pytest.approx(1000 / 1e-3 / 1e12)
    assert ours["of_copy"] == pytest.approx(0.5)
    assert ours["of_matmul"] == pytest.approx(0.25)
    assert ours["match"]
    assert harness.matches(rows)
    assert missing["install"] == "pip install other"
    wanted = {"machine", "torch", "commit", "threads", "cores", "date", "driver", "power_w"}
    assert wanted | CEILINGS.keys() <= ours.keys()
    text = harness.table(rows)
    assert "3.00x" in text
    assert "25 % of matmul" in text
    assert "not here: pip install other" in text


def test_matmul_ceiling_is_that_of_the_dtype(clock):
    case = make_case(clock, dtype=torch.bfloat16)
    row = harness.measure(case, CPU, clock=clock, ceilings=CEILINGS)[0]
    assert row["of_matmul"] == pytest.approx(0.125)
    memory_bound = make_case(clock, flops=0)
    row = harness.measure(memory_bound, CPU, clock=clock, ceilings=CEILINGS)[0]
    assert "of_matmul" not in row


def test_first_call_is_told_apart_from_later_ones(clock):
    slow_at_first = rival(clock, 1e-3, first=2.0)
    case = make_case(clock)
    case = dataclasses.replace(case, rivals={**case.rivals, "fastvid": slow_at_first})
    row = harness.measure(case, CPU, clock=clock)[0]
    assert row["first_call_s"] == pytest.approx(2.001)
    assert row["compile_s"] == pytest.approx(2.0)
    assert row["p80_ms"] == pytest.approx(1.0)


def test_the_first_call_of_eager_is_its_own(clock):
    """It sets the tolerance of the others, and is not called before it is timed."""
    case = make_case(clock)
    case = dataclasses.replace(case, rivals={**case.rivals, "eager": rival(clock, 1e-3, first=2.0)})
    ours, theirs, _ = harness.measure(case, CPU, clock=clock)
    assert [ours["rival"], theirs["rival"]] == ["fastvid", "eager"]
    assert theirs["first_call_s"] == pytest.approx(2.001)
    assert theirs["compile_s"] == pytest.approx(2.0)


def test_ours_is_measured_whatever_eager_took(clock):
    case = make_case(clock, theirs=60.0)
    ours, theirs, _ = harness.measure(case, CPU, clock=clock, seconds=1.0, budget=10.0, sets=1)
    assert ours["p50_ms"] == pytest.approx(1.0)
    assert theirs["ratio_p50"] == pytest.approx(60e3)


@pytest.mark.parametrize("uncaptured", ["eager", "fastvid"])
def test_what_cannot_be_captured_is_compared_by_calls_on_both_sides(monkeypatch, uncaptured, clock):
    """A replay takes a tenth of a call here."""
    seconds = {"fastvid": 0.125, "eager": 0.25, "flex": 0.5}

    def turns(name, factor):
        def once():
            clock.work(factor * seconds[name])
            return [factor * seconds[name]]

        return once

    def replay(calls):
        if calls == [uncaptured]:
            raise RuntimeError("operation not permitted when stream is capturing")
        return turns(*calls, 0.1)

    monkeypatch.setattr(harness, "wall", lambda calls, device, clock: turns(*calls, 1))
    monkeypatch.setattr(harness, "replay", replay)
    thunks = {name: [name] for name in seconds}
    found = harness._times(thunks, torch.device("cuda"), 5.0, 1e9, clock)
    assert "not permitted" in found[uncaptured]["not_captured"]
    assert found["flex"]["p50_ms"] == pytest.approx(50)
    assert found["eager"]["p50_ms"] == pytest.approx(250 if uncaptured == "eager" else 25)
    assert found["flex"]["wall_p50_ms"] == pytest.approx(500)
    assert found["eager"]["ratio_p50"] == pytest.approx(2)  # 20 of a call over a replay
    assert found["flex"]["ratio_p50"] == pytest.approx(4)


def test_the_peak_on_a_gpu_is_that_of_the_rival_whoever_else_holds_memory(monkeypatch):
    MiB = 2**20
    now, peak = [1000 * MiB], [5000 * MiB]  # other rivals were here before

    def allocate(size):
        now[0] += size * MiB
        peak[0] = max(peak[0], now[0])

    def bind(x):
        allocate(7)  # what forward needs and gives back before backward is timed
        allocate(-4)
        return lambda: allocate(5) or allocate(-5)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, now[0]))
    found = harness._peaks(bind, (torch.ones(MiB // 4),))
    assert found == {"peak_mib": 1 + 3 + 5, "extra_mib": 5}


def test_ratios_are_of_pairs(clock):
    """Both are slow in the same calls, so the ratio does not move."""
    ours, theirs = iter([1, 5] * 10_000), iter([2, 10] * 10_000)
    thunks = {
        "fastvid": [lambda: clock.work(1e-3 * next(ours))],
        "eager": [lambda: clock.work(1e-3 * next(theirs))],
    }
    columns = harness._times(thunks, CPU, 1.0, 1e9, clock)["eager"]
    assert columns["p80_ms"] > 4 * columns["p20_ms"]
    assert [columns[f"ratio_p{p}"] for p in (20, 50, 80)] == pytest.approx([2, 2, 2])


def test_a_rival_that_raises_has_a_row_and_the_others_go_on(clock):
    def bind(x):
        raise RuntimeError("no kernel available\nfor this size")

    case = make_case(clock)
    case = dataclasses.replace(case, rivals={"flash": bind, **case.rivals})
    failed, ours, theirs, _ = harness.measure(case, CPU, clock=clock, ceilings=CEILINGS)
    assert failed["failed"] == "RuntimeError: no kernel available"
    assert "p50_ms" not in failed
    assert theirs["ratio_p50"] == pytest.approx(3.0)
    assert "failed: RuntimeError: no kernel available" in harness.table([failed, ours])
    assert harness.matches([failed, ours])
    assert not harness.matches([{**failed, "rival": "fastvid"}])


def test_a_row_keeps_to_its_budget(clock):
    case = make_case(clock, ours=4.0, theirs=4.0)
    case = dataclasses.replace(case, rivals={**case.rivals, "late": rival(clock, 4.0)})
    start = clock()
    rows = harness.measure(case, CPU, clock=clock, seconds=100.0, budget=10.0, sets=1)
    assert "skipped" in rows[2]
    assert "skipped: the row's 10 s were over" in harness.table(rows)
    assert rows[0]["p50_ms"] == pytest.approx(4000)
    assert clock() - start < 40  # one round at least, whatever it takes


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


def test_inputs_rotate_through_more_than_the_cache(clock, monkeypatch):
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 6000)
    made = []
    case = make_case(clock, make_inputs=lambda device: made.append(1) or (torch.ones(1000),))
    row = harness.measure(case, CPU, clock=clock)[0]
    assert len(made) == row["sets"] == 5  # 3 x 6000 bytes in sets of 4000
    assert harness.measure(case, CPU, clock=clock, sets=2)[0]["sets"] == 2


def test_rivals_are_chosen(clock):
    case = make_case(clock)
    assert harness.select(case, None) is case
    assert harness.select(case, []).rivals.keys() == {"fastvid", "eager"}
    assert harness.select(case, []).missing == {}
    assert harness.select(case, ["other"]).missing == case.missing


def test_rows_are_appended_and_a_cut_off_one_is_left_out(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    assert harness.read_rows(path) == []
    harness.append(path, [{"a": 1}])
    with path.open("a") as file:
        file.write('{"a": ')  # killed here
    harness.append(path, [{"a": 2}, {"a": 3}])
    assert [row["a"] for row in harness.read_rows(path)] == [1, 2, 3]


def test_cases_are_chosen_by_name_shape_and_dtype(clock):
    case = make_case(clock)
    assert run.is_wanted(case, "", [], [])
    assert run.is_wanted(case, "doub", ["N=1000"], ["bfloat16", "float32"])
    assert not run.is_wanted(case, "forward", [], [])
    assert not run.is_wanted(case, "", ["N=100"], [])
    assert not run.is_wanted(case, "", [], ["bfloat16"])


def test_quick_run_over_all_rooms(capsys, tmp_path):
    assert run.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "rows.jsonl")]) == 0
    rows = harness.read_rows(tmp_path / "rows.jsonl")
    assert {row["room"] for row in rows} == set(run.rooms())
    assert all(row["match"] for row in rows if row["rival"] in ("fastvid", "eager"))
    assert any("flash-attn" in row["install"] for row in rows if row["rival"] == "flash-attn")


def test_a_filter_that_leaves_nothing_fails(capsys):
    assert run.main(["--quick", "--device", "cpu", "--room", "modulate", "--name", "sideways"]) == 1
    assert "no case" in capsys.readouterr().out


def test_memory_is_that_of_a_process_of_its_own(tmp_path):
    path = tmp_path / "rows.jsonl"
    arguments = "--quick --device cpu --room modulate --name forward --dtype float32 --memory"
    assert run.main([*arguments.split(), "--rival", "liger", "--out", str(path)]) == 0
    rows = harness.read_rows(path)
    rows = [row for row in rows if row["name"] == "forward"]
    assert [row["rival"] for row in rows] == ["fastvid", "eager", "liger"]
    assert all(row["peak_mib"] > row["extra_mib"] >= 0 for row in rows[:2])
    assert "peak_mib" not in rows[2]
