"""`python -m benchmarks` and `pytest benchmarks/`."""

import importlib
import json
import os
import subprocess
import sys
import types
from typing import ClassVar

import pytest
import torch

from benchmarks import __main__ as verbs
from benchmarks import conftest, run, run_models, test_kernels
from benchmarks.machine import ROOT
from tests.benchmarks.cases import cases_on_a_gpu

PYTEST = [sys.executable, "-m", "pytest", "-q", "benchmarks/", "--room", "modulate"]
PYTEST += ["--name", "forward", "--dtype", "float32", "--benchmark-min-rounds=1"]
PYTEST += ["--benchmark-max-time=0.01", "--benchmark-warmup=off"]


def test_verbs_are_those_whose_module_is_here(capsys):
    here = verbs.verbs()
    wanted = {"kernels", "models", "compile", "gpu", "tune", "cpu_gate"}
    assert wanted <= here.keys() <= verbs.VERBS.keys()
    for module, _ in here.values():
        assert callable(importlib.import_module(f"benchmarks.{module}").main)
    assert verbs.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert [verb for verb in here if f"  {verb}" not in printed] == []
    assert verbs.main(["sideways"]) == verbs.main([]) == 2


def test_pytest_has_the_filters_of_the_command(monkeypatch):
    """Room, name, sizes, dtype and rival, by the same words and with the same meaning."""
    asked = {"room": ["modulate"], "name": "forward", "shape": ["N=64"], "dtype": ["float32"]}
    asked |= {"rival": [], "full": False}
    config = types.SimpleNamespace(getoption=lambda name: asked[name.removeprefix("--")])
    found = []
    metafunc = types.SimpleNamespace(
        config=config, parametrize=lambda _, cases: found.extend(cases)
    )
    test_kernels.pytest_generate_tests(metafunc)
    by_command = []
    monkeypatch.setattr(
        run.harness, "measure", lambda case, *_, **__: by_command.append(case.label) or []
    )
    monkeypatch.setattr(run.harness, "table", str)
    arguments = ["--quick", "--device", "cpu"]
    for name, value in asked.items():
        if name not in ("rival", "full"):
            arguments += [f"--{name}", *(value if isinstance(value, list) else [value])]
    run.main(arguments)
    assert {each.values[0].label for each in found} == set(by_command) != set()
    assert {each.values[1] for each in found} == {"fastvid", "eager"}

    class Group:
        names: ClassVar[set[str]] = set()

        def addoption(self, name, **_):
            self.names.add(name.removeprefix("--"))

    conftest.pytest_addoption(types.SimpleNamespace(getgroup=lambda name: Group()))
    assert Group.names == asked.keys()


@pytest.mark.parametrize("room", run.rooms())
def test_every_case_has_a_label_of_its_own(room, monkeypatch):
    cpu = torch.device("cpu")
    for found in (run.cases(room, cpu, True), run.cases(room, cpu, False)):
        labels = [case.label for case in found]
        assert len(set(labels)) == len(labels)
    labels = [case.label for case in cases_on_a_gpu(room, monkeypatch)]
    assert len(set(labels)) == len(labels)


def test_models_hand_their_arguments_on(monkeypatch):
    seen = []

    class Model:
        @staticmethod
        def main(argv):
            seen.append(argv)
            return 0

    monkeypatch.setattr(run_models, "names", lambda: ["toy"])
    monkeypatch.setattr(run_models, "bench", lambda name: Model)
    assert run_models.main(["toy", "--size", "S"]) == 0
    assert run_models.main(["--quick"]) == 0
    assert run_models.main([]) == 0
    assert seen == [["--size", "S"], ["--quick"], []]


@pytest.mark.parametrize("name", run_models.names())
def test_every_model_has_what_the_verbs_need(name):
    bench = run_models.bench(name)
    assert all(callable(getattr(bench, part)) for part in ("specs", "label", "within", "main"))


def test_pytest_writes_and_compares_results(tmp_path):
    pytest.importorskip("pytest_benchmark")
    storage = [f"--benchmark-storage={tmp_path}"]
    out = tmp_path / "out.json"
    first = [*PYTEST, *storage, "--benchmark-save=first", f"--benchmark-json={out}"]
    # pytest-benchmark measures nothing where it believes itself in a worker of pytest-xdist.
    env = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(first, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["benchmarks"]
    assert {each["params"]["rival"] for each in found} >= {"fastvid", "eager"}
    assert all(each["extra_info"]["match"] for each in found)
    assert "skipped" in done.stdout  # what is not installed
    again = [*PYTEST, *storage, "--benchmark-compare=0001", "--benchmark-compare-fail=min:100000%"]
    done = subprocess.run(again, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(0001_first)" in done.stdout


def test_a_rival_that_no_case_has_is_named(capsys):
    assert run.main(["--quick", "--device", "cpu", "--room", "modulate", "--rival", "typo"]) == 1
    assert "no rival 'typo' here; known: " in capsys.readouterr().out
