"""The ahead-of-time budget. Triton compiles in a child process, without the interpreter."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import compile as aot
from benchmarks.machine import ROOT

# What still spills, said in the rooms' pages. Nothing may be added, and what is mended goes.
SPILLS: dict[str, set[str]] = {
    "asymmetric_attention": {"backward_kv_72", "backward_q_64"},
}
FOUND = {"registers": 64, "stack": 0, "shared": 128, "wide_loads": 6, "wgmma": 0}


def test_every_room_has_a_budget_for_its_variants():
    pytest.importorskip("triton")
    for room in aot.rooms():
        variants = aot.variants(room)
        assert len({variant.name for variant in variants}) == len(variants)
        assert sum(variant.architectures is None for variant in variants) <= 12
        budgets = json.loads((aot.KERNELS / room / "budget.json").read_text())
        assert budgets.keys() == set(aot.ARCHITECTURES)
        for architecture, budget in budgets.items():
            assert budget.keys() == {
                variant.name
                for variant in variants
                if architecture in (variant.architectures or budgets)
            }
        spilling = {
            name
            for budget in budgets.values()
            for name, limits in budget.items()
            if limits["stack"]
        }
        assert spilling == SPILLS.get(room, set())


def test_nothing_is_over_its_own_budget():
    assert aot.excess(FOUND, FOUND) == []


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("registers", 65, "registers 65 > 64"),
        ("stack", 8, "stack 8 > 0"),
        ("shared", 129, "shared 129 > 128"),
        ("wide_loads", 5, "wide_loads 5 < 6"),
    ],
)
def test_planted_excess_is_named(key, value, says):
    assert aot.excess(FOUND | {key: value}, FOUND) == [says]


def test_update_only_widens():
    other = FOUND | {"registers": 60, "wide_loads": 4, "shared": 256}
    assert aot.widened(other, FOUND) == FOUND | {"wide_loads": 4, "shared": 256}
    assert aot.widened(other, None) == other


def test_one_variant_compiles_and_an_excess_fails(tmp_path):
    pytest.importorskip("triton")
    code = f"""
import json, pathlib, shutil, sys
from benchmarks import compile as aot
name = aot.variants("modulate")[0].name
made = [aot.compile_one("modulate", name, arch) for arch in ("sm_90", "gfx942")]
good = aot.check_room("modulate", made, False)
folder = pathlib.Path({str(tmp_path)!r}) / "modulate"
shutil.copytree(aot.KERNELS / "modulate", folder)
budgets = json.loads((folder / "budget.json").read_text())
budgets["sm_90"][name]["registers"] = 1
(folder / "budget.json").write_text(json.dumps(budgets))
aot.KERNELS = folder.parent
print("good" if good else "bad", aot.check_room("modulate", made, False))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "good False"
    assert "> 1" in done.stdout


@pytest.mark.parametrize("room", aot.rooms())
def test_all_holds_every_variant_under_a_name_of_its_own(room):
    pytest.importorskip("triton")
    names = [variant.name for variant in aot.variants(room, everything=True)]
    assert len(names) == len(set(names))
    assert {variant.name for variant in aot.variants(room)} <= set(names)


def test_of_all_only_what_has_a_budget_is_held_to_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(aot, "KERNELS", tmp_path)
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "budget.json").write_text(json.dumps({"sm_90": {"budgeted": FOUND}}))
    spilling = FOUND | {"stack": 8}
    beyond = aot.Compilation("room", "beyond", "sm_90", 0.1, spilling)
    assert aot.check_room("room", [beyond], False, everything=True)
    assert "spills" in capsys.readouterr().out
    assert not aot.check_room("room", [beyond], False)
    budgeted = aot.Compilation("room", "budgeted", "sm_90", 0.1, spilling)
    assert not aot.check_room("room", [budgeted], False, everything=True)
