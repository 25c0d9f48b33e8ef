"""The gate fails below a floor by more than the spread, and never in silence."""

import json

import pytest
import torch

from benchmarks import cpu_gate, run, run_models
from benchmarks.cpu_gate import Ratio
from benchmarks.machine import ROOT

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("p20", "p50", "p80", "floor", "good"),
    [
        (1.1, 1.2, 1.3, 1.2, True),
        (1.1, 1.2, 1.3, 1.39, True),  # within the spread of 0.2
        (1.1, 1.2, 1.3, 1.41, False),
        (1.2, 1.2, 1.2, 1.21, False),
        (0.1, 0.1, 0.1, None, True),
    ],
)
def test_a_ratio_fails_below_its_floor_by_more_than_its_spread(p20, p50, p80, floor, good):
    ratio = Ratio("case", "eager", p20, p50, p80, True, floor)
    assert ratio.good is good
    assert ("BELOW" in ratio.line()) is not good


def test_a_result_that_does_not_match_fails():
    ratio = Ratio("case", "eager", 2.0, 2.0, 2.0, False, None)
    assert not ratio.good
    assert "NO MATCH" in ratio.line()


@pytest.fixture
def rows(monkeypatch):
    """Measured ratios by case, of the test's making; eager 1.0 and sliced 0.5 where none is set."""
    ratios: dict[str, dict[str, float]] = {}

    def measure(case, device, **_):
        found = ratios.get(case.label, {"eager": 1.0, "sliced": 0.5})
        rivals = {name: ratio for name, ratio in found.items() if name in case.rivals}
        rows = [{"rival": "fastvid", "match": True}]
        return rows + [
            {"rival": name, "match": True} | {f"ratio_p{p}": ratio for p in (20, 50, 80)}
            for name, ratio in rivals.items()
        ]

    monkeypatch.setattr(cpu_gate.harness, "measure", measure)
    return ratios


def test_cases_with_floors_are_measured_against_their_rivals(rows):
    case = run.cases("masked_attention", CPU, False)[-1].label
    floors = {case: {"eager": 0.9, "sliced": 0.9}}
    good, bad = cpu_gate.of_rooms(floors, ["masked_attention"], 0.1)
    assert (good.case, good.rival, good.floor, good.good) == (case, "eager", 0.9, True)
    assert (bad.case, bad.rival, bad.floor, bad.good) == (case, "sliced", 0.9, False)


def test_a_room_without_a_floor_is_measured_all_the_same(rows):
    found = list(cpu_gate.of_rooms({}, ["modulate"], 0.1))
    assert [ratio.case.split()[0] for ratio in found] == ["modulate/forward", "modulate/backward"]
    assert all(ratio.good and "floor none" in ratio.line() for ratio in found)


def test_models_are_held_to_their_floors(monkeypatch):
    class Model:
        @staticmethod
        def specs(device, quick):
            return [{"job": "forward"}]

        @staticmethod
        def within(spec, seconds):
            ratios = {f"wall_ratio_p{p}": 1.1 for p in (20, 50, 80)}
            return {"case": "toy/forward", "match": True, **ratios}

    monkeypatch.setattr(run_models, "names", lambda: ["toy"])
    monkeypatch.setattr(run_models, "bench", lambda name: Model)
    (ratio,) = cpu_gate.of_models({"toy/forward": {"eager": 1.2}})
    assert not ratio.good
    (ratio,) = cpu_gate.of_models({})
    assert ratio.good


def test_every_floor_is_of_a_case_that_there_is():
    labels = {case.label: case for room in run.rooms() for case in run.cases(room, CPU, False)}
    models = {
        bench.label(spec)
        for bench in map(run_models.bench, run_models.names())
        for spec in bench.specs(CPU, True)
    }
    for case, rivals in json.loads(cpu_gate.FLOORS.read_text()).items():
        if case in models:
            assert rivals.keys() == {"eager"}
        else:
            assert rivals.keys() <= labels[case].rivals.keys(), case
    assert models <= json.loads(cpu_gate.FLOORS.read_text()).keys()


def test_every_room_has_a_floor():
    rooms = {path.parent.name for path in (ROOT / "kernels").glob("*/op.py")}
    assert rooms <= {case.partition("/")[0] for case in json.loads(cpu_gate.FLOORS.read_text())}


def test_the_exit_status_is_that_of_the_worst(rows, monkeypatch, tmp_path, capsys):
    case = run.cases("modulate", CPU, False)[0].label
    floors = tmp_path / "floors.json"
    monkeypatch.setattr(cpu_gate, "FLOORS", floors)
    for floor, status in ((0.9, 0), (1.1, 1)):
        floors.write_text(json.dumps({case: {"eager": floor}}))
        assert cpu_gate.main(["--room", "modulate", "--seconds", "0.1"]) == status
        assert ("BELOW" in capsys.readouterr().out) is bool(status)


def test_an_op_of_ours_that_raises_fails_the_gate(monkeypatch):
    failed = [{"rival": "fastvid", "failed": "RuntimeError: no"}, {"rival": "eager", "p50_ms": 1.0}]
    monkeypatch.setattr(cpu_gate.harness, "measure", lambda *_, **__: failed)
    (found, *_) = cpu_gate.of_rooms({}, ["modulate"], 0.1)
    assert not found.good
    assert "NO MATCH" in found.line()
