"""Result files that are renewed in place."""

import re

import pytest

from benchmarks import harness, rows, run
from benchmarks.machine import ROOT

PLACE = {"machine": "A CPU", "threads": 1, "compiled": True}


def row(case, rival="fastvid", **changes):
    return {**PLACE, "case": case, "rival": rival, "p50_ms": 1.0} | changes


def test_a_case_takes_the_place_of_its_older_self_and_of_no_other(tmp_path):
    path = tmp_path / "new" / "room.jsonl"
    rows.save(path, [row("b"), row("b", "eager"), row("b", "gone")], ["a", "b"])
    rows.save(path, [row("b", threads=2)], ["a", "b"])
    rows.save(path, [row("a")], ["a", "b"])
    rows.save(path, [row("b", p50_ms=2.0), row("b", "eager")], ["a", "b"])
    assert harness.read_rows(path) == [
        row("a"),  # in the order of the cases
        row("b", p50_ms=2.0),
        row("b", "eager"),
        row("b", threads=2),
    ]
    assert list(path.parent.iterdir()) == [path]


def test_cases_that_are_no_more_are_dropped_where_all_are_named(tmp_path):
    path = tmp_path / "room.jsonl"
    rows.save(path, [row("old")])
    rows.save(path, [row("new")])
    assert [each["case"] for each in harness.read_rows(path)] == ["old", "new"]
    rows.save(path, [row("new")], ["new"])
    assert harness.read_rows(path) == [row("new")]


def test_kernels_renew_the_results_of_this_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(run.machine, "folder", lambda device: "here")
    cases = run.cases("modulate", run.torch.device("cpu"), True)[:2]
    monkeypatch.setattr(run, "cases", lambda *_: cases)
    arguments = ["--device", "cpu", "--room", "modulate", "--seconds", "0.01", "--save"]
    for _ in range(2):
        assert run.main(arguments) == 0
        found = harness.read_rows(tmp_path / "here" / "modulate.jsonl")
        assert [each["case"] for each in found if each["rival"] == "fastvid"] == [
            case.label for case in cases
        ]


@pytest.mark.parametrize("part", [["--quick"], ["--rival", "compile"]])
def test_tiny_sizes_and_parts_of_a_line_up_are_not_kept(part, monkeypatch):
    """The rivals that were left out would lose their rows."""
    monkeypatch.setattr(run, "_run", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit):
        run.main(["--save", *part])


def explained(row):
    """The columns of a row that the page names, and those that it does not."""
    page = (ROOT / "benchmarks/README.md").read_text()
    named = {
        name
        for line in page.splitlines()
        for name in re.findall(r"`(\w+)`", line.split(" | ")[0])
        if line[:1] == "|"
    }
    of_a_side = {"p20_ms", "p50_ms", "p80_ms", "first_call_s", "peak_mib", "baseline_mib"}
    named |= {f"{side}_{name}" for side in rows.SIDES for name in of_a_side}
    sizes = set(re.findall(r"(\w+)=", row["case"])) if "rival" in row else set()
    return set(row) & named, set(row) - named - sizes


def test_every_column_of_a_result_is_explained(tmp_path, capsys):
    found = [row for path in rows.RESULTS.rglob("*.jsonl") for row in harness.read_rows(path)]
    out = tmp_path / "rows.jsonl"
    arguments = "--quick --device cpu --room modulate --name forward --dtype float32 --out"
    assert run.main([*arguments.split(), str(out)]) == 0
    found += harness.read_rows(out)
    assert set().union(*(explained(row)[1] for row in found)) == set()
    used = set().union(*(explained(row)[0] for row in found))
    assert {"peak_ratio", "fastvid_baseline_mib", "of_copy", "install", "date"} <= used
    assert explained({"case": "a", "invented": 1})[1] == {"invented"}
