"""The search of launch configurations: what is tried, what wins, and the patch."""

import ast
import fnmatch
import os
import subprocess
import sys
import types

import pytest
import torch

from benchmarks import harness, run, tune
from benchmarks.machine import ROOT
from tests.benchmarks.cases import cases_on_a_gpu

CPU = torch.device("cpu")
SOURCE = """\
from typing import NamedTuple

class Blocks(NamedTuple):
    rows: int
    warps: int

# By the width.
FORWARD = {512: (4, 2), 1024: (4, 4)}  # measured
TILES = {
    16: {
        64: Blocks(128, 8),
        80: Blocks(64, 4),
    },
    32: {64: Blocks(32, 4)},
}
"""


def test_a_patch_replaces_the_entry_and_nothing_else():
    found = {("FORWARD", (1024,)): "(16, 8)", ("TILES", (16, 80)): "Blocks(32, 8)"}
    text = tune.patched(SOURCE, found)
    wanted = SOURCE.replace("1024: (4, 4)", "1024: (16, 8)").replace(
        "Blocks(64, 4)", "Blocks(32, 8)"
    )
    assert text == wanted
    both = {("FORWARD", (512,)): "(16, 16)", ("FORWARD", (1024,)): "(8, 8)"}  # on one line
    assert "FORWARD = {512: (16, 16), 1024: (8, 8)}  # measured" in tune.patched(SOURCE, both)


def test_entries_are_written_as_they_stand():
    namespace: dict = {}
    exec(SOURCE, namespace)
    assert tune.written(namespace["FORWARD"][512]) == "(4, 2)"
    assert tune.written(namespace["TILES"][16][64]) == "Blocks(128, 8)"


def test_a_patch_applies(tmp_path, monkeypatch):
    path = tmp_path / "kernel.py"
    path.write_text(SOURCE)
    monkeypatch.setattr(tune.machine, "ROOT", tmp_path)
    text = tune.diff(path, {("FORWARD", (512,)): "(1, 1)"})
    subprocess.run(["git", "apply", "-"], input=text, text=True, cwd=tmp_path, check=True)
    assert path.read_text() == SOURCE.replace("512: (4, 2)", "512: (1, 1)")
    assert tune.diff(path, {}) == ""


def test_the_table_holds_the_candidate_while_it_runs_and_not_after():
    now = 0.0
    table = {8: 3}

    def ours(x):
        def thunk():  # the time is what stands in the table
            nonlocal now
            now += table[8]
            return x * 2

        return thunk

    case = harness.Case(
        room="room",
        name="double",
        shape={},
        dtype=torch.float32,
        make_inputs=lambda device: (torch.ones(8),),
        rivals={"fastvid": ours, "eager": ours, "other": ours},
        oracle=ours,
        nbytes=1,
        missing={"away": "pip install away"},
    )
    case = tune.as_rivals(case, table, 8, [1, 2])
    rows = harness.measure(case, CPU, seconds=10.0, sets=1, clock=lambda: now)
    assert {row["rival"]: row["p50_ms"] for row in rows} == {
        "fastvid": 3000,
        "eager": 3000,
        "1": 1000,
        "2": 2000,
    }
    assert table == {8: 3}
    assert tune.fastest(rows) == "1"


def test_only_what_matched_and_was_faster_wins():
    def row(rival, ratio, match=True):
        return {"rival": rival, "match": match, "ratio_p50": ratio, "ratio_p80": ratio + 0.05}

    ours = row("fastvid", 1.0)
    assert tune.fastest([ours, row("a", 0.9), row("b", 0.8), row("c", 0.7, False)]) == "b"
    assert tune.fastest([ours, row("a", 0.97)]) is None  # slower in some of the rounds
    assert tune.fastest([ours, {"rival": "a", "failed": "RuntimeError: no"}]) is None


def test_what_spills_or_does_not_fit_is_dropped():
    good = {"registers": 255, "stack": 0, "shared": 227 * 1024}
    assert tune.fits(good, "sm_90")
    assert not tune.fits(good, "sm_80")
    assert not tune.fits({**good, "stack": 8}, "sm_90")
    assert not tune.fits(None, "sm_90")


@pytest.mark.parametrize("room", run.rooms())
def test_every_search_is_of_an_entry_that_stands(room):
    pytest.importorskip("triton")
    for search in tune.searches(room):
        holder, key = tune.entry(room, search)
        source = (ROOT / "kernels" / room / f"{search.file}.py").read_text()
        same = {(search.table, search.key): tune.written(holder[key])}
        assert tune.patched(source, same) == source, search.name
        assert all(type(each) is type(holder[key]) for each in search.candidates)
        assert search.variant(holder[key]).num_warps


def launch_tables(room):
    """Dictionaries by a number, at the top of a room's Triton files: widths lead to launches."""
    for path in (ROOT / "kernels" / room).glob("*.py"):
        for statement in ast.parse(path.read_text()).body:
            value = getattr(statement, "value", None)
            keys = value.keys if isinstance(value, ast.Dict) else []
            if keys and all(isinstance(getattr(key, "value", None), int) for key in keys):
                yield path.stem, statement.targets[0].id


@pytest.mark.parametrize("room", run.rooms())
def test_every_launch_table_is_searched_or_says_why_not(room):
    pytest.importorskip("triton")
    tables = set(launch_tables(room))
    searched = {(search.file, search.table) for search in tune.searches(room)}
    named = tune.unsearched(room)
    assert tables == searched | {table for table in tables if table[1] in named}
    assert named.keys() <= {table for _, table in tables}
    assert not any(table in named for _, table in searched)


def test_every_search_finds_its_case_and_rival(monkeypatch):
    pytest.importorskip("triton")
    for room in run.rooms():
        found = cases_on_a_gpu(room, monkeypatch)
        for search in tune.searches(room):
            (case, *_) = [case for case in found if fnmatch.fnmatch(case.label, search.case)]
            assert search.rival in {*case.rivals, "kernel", "fastvid, tensor descriptors"}


def test_a_room_without_a_launch_table_says_so(capsys):
    for room in ("guided_step", "temporal_attention"):
        with pytest.raises(SystemExit):
            tune.main([room, "--dry-run"])
        assert f"{room} has no launch table to search" in capsys.readouterr().err


def test_an_unknown_architecture_is_taken_for_the_nearest_older_one(capsys):
    assert tune.shared_bytes("sm_86") == tune.shared_bytes("sm_120") == 99 * 1024
    assert tune.shared_bytes("sm_103") == tune.shared_bytes("sm_100") == 227 * 1024
    assert tune.shared_bytes("sm_88") == 163 * 1024
    assert tune.shared_bytes("sm_75") == 163 * 1024
    assert not tune.fits({"registers": 9, "stack": 0, "shared": 160 * 1024}, "sm_89")
    with pytest.raises(SystemExit):
        tune.main(["modulate", "--dry-run", "--arch", "hopper"])
    assert "--arch must be sm_NN, got hopper" in capsys.readouterr().err


def test_entry_finds_its_way(monkeypatch):
    module = types.SimpleNamespace(TILES={16: {64: "a"}})
    monkeypatch.setattr(tune, "module", lambda room, file: {"tiles": module}[file])
    search = tune.Search("TILES", (16, 64), [], None, "", file="tiles")
    assert tune.entry("room", search) == ({64: "a"}, 64)
    assert search.name == "tiles.TILES[16][64]"


def test_a_dry_run_compiles_ranks_and_prints_a_patch():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks", "tune", "modulate", "--dry-run"]
    command += ["--table", "FORWARD[512]", "--most", "2", "--arch", "sm_89"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # as in these tests; it must not matter
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "FORWARD[512] on sm_89, 3 candidates" in done.stdout
    assert "PER_TOKEN is not searched" in done.stdout
    assert "registers" in done.stdout
    assert "nothing was timed" in done.stdout
    assert "--- a/kernels/modulate/kernel.py" in done.stdout


def test_it_refuses_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main(["modulate"])
