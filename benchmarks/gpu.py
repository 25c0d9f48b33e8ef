"""One run on a GPU machine, from the checkout: environment, ceilings, tests, kernels, models.

Needs torch, Triton, numpy, einops and pytest, nothing else. Every row is on disk as soon as it is
measured, those with the most important goals first (`goals.py`). A second run with the same --out
leaves out what this commit has measured and goes on; what failed or was skipped comes last, once
more. The table of goals stands at the end. `--dry-run` goes the same way on a CPU with tiny sizes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import goals, harness, machine, rows, run, run_models
from benchmarks.models import command

TESTS = "pytest -m gpu"  # the case of the row that says how they went


def main(argv: list[str]) -> int:
    """0 when all was measured, the tests pass and every result of ours matches."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is found")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--row-seconds", type=float, default=20.0, help="at most, per case")
    parser.add_argument("--model-seconds", type=float, default=100.0, help="at most, per model row")
    parser.add_argument("--keep-failed", action="store_true", help="leave out what failed, too")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny sizes")
    arguments = parser.parse_args(argv)
    end = time.monotonic() + 60 * arguments.minutes
    if not (arguments.dry_run or torch.cuda.is_available()):
        parser.error("no CUDA device here; --dry-run goes through the same code on the CPU")
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    ceilings = machine.measure_ceilings(device, quick=arguments.dry_run)
    report = {**machine.environment(device), **machine.gpu_state(device), **ceilings}
    (arguments.out / "environment.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1), flush=True)

    path, commit = arguments.out / "rows.jsonl", report["commit"]
    done = {row["case"] for row in _last(path, commit)}
    failed = {row["case"] for row in _last(path, commit) if "failed" in row or "skipped" in row}
    passed = _passed(path, commit)
    if not passed and (passed is None or not arguments.keep_failed):
        row = _tests(arguments.out / "tests.log", (end - time.monotonic()) / 2)
        harness.append(path, [{**row, "commit": commit}])
    jobs = _jobs(device, arguments, ceilings)
    left = [job for job in jobs if job.label not in done]
    left += [job for job in jobs if job.label in failed] * (not arguments.keep_failed)
    for position, (label, measure, most) in enumerate(left):
        if time.monotonic() > end:
            print(f"\nout of time: {len(left) - position} cases left; run again to go on")
            break
        budget = min(most, end - time.monotonic())
        try:
            found, text = measure(budget)
        except Exception as error:  # the case as a whole; the next one may do better
            what = {"case": label, "room": label.partition("/")[0], "rival": "fastvid"}
            what["failed"] = harness.in_one_line(error)
            found = [machine.environment(device) | what]
            text = f"{label}\n  {found[0]['failed']}"
        harness.append(path, found)
        print("\n" + text, flush=True)
        if not _device_works(device):
            _start_again(arguments, end - time.monotonic())
    found = _last(path, commit)
    print("\n" + goals.table(found))
    complete = {job.label for job in jobs} <= {row["case"] for row in found}
    return 0 if _passed(path, commit) and complete and harness.matches(found) else 1


class Job(NamedTuple):
    """A case or a model's row: what it is called, how it is measured, in how many seconds."""

    label: str
    measure: Callable[[float], tuple[list[harness.Row], str]]
    seconds: float


def _last(path: Path, commit: str | None) -> list[harness.Row]:
    """What this commit has measured, the last of each."""
    found = rows.read(path) if path.exists() else []
    return rows.latest(row for row in found if row.get("commit") == commit)


def _passed(path: Path, commit: str | None) -> bool | None:
    """Whether the tests of this commit did, when they were run last; None: not run yet."""
    found = harness.read_rows(path)
    ends = [row["match"] for row in found if row["case"] == TESTS and row.get("commit") == commit]
    return ends[-1] if ends else None


def _jobs(
    device: torch.device, arguments: argparse.Namespace, ceilings: dict[str, float]
) -> list[Job]:
    """What is measured, the most important first: a label, and what makes its rows and text."""
    quick = arguments.dry_run
    options: dict[str, Any] = {"seconds": 0.05, "sets": 4} if quick else {"seconds": 1.0}

    def of_case(case: harness.Case) -> Job:
        def measure(budget):
            found = harness.measure(case, device, budget=budget, ceilings=ceilings, **options)
            return found, harness.table(found)

        return Job(case.label, measure, arguments.row_seconds)

    def of_model(bench: Any, spec: dict[str, Any]) -> Job:
        def measure(budget):
            row = bench.within(spec, 0 if quick else budget)
            row = {**ceilings, **machine.environment(device), **row}
            return [row], command.line(row)

        return Job(bench.label(spec), measure, arguments.model_seconds)

    jobs = [of_case(case) for room in run.rooms() for case in run.cases(room, device, quick)]
    for bench in map(run_models.bench, run_models.names()):
        specs = bench.specs(device, quick)
        jobs += [of_model(bench, spec) for spec in (specs[:1] if quick else specs)]
    return sorted(jobs, key=lambda job: goals.value_of(job.label))


def _tests(log: Path, seconds: float) -> harness.Row:
    """Run `pytest -m gpu`; without a GPU all of it is skipped, which is fine."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests"]
    start = time.monotonic()
    with log.open("w") as file:
        try:
            code = subprocess.call(
                command, cwd=machine.ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            code = 124
    print("".join(log.read_text().splitlines(keepends=True)[-15:]), flush=True)
    taken = time.monotonic() - start
    return {"case": TESTS, "rival": "tests", "match": code == 0, "seconds": taken}


def _device_works(device: torch.device) -> bool:
    """Whether the device still answers: after an illegal access nothing works in this process."""
    try:
        if device.type == "cuda":
            torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True


def _start_again(arguments: argparse.Namespace, seconds: float) -> None:
    """Go on in a new process image, after the rows that are there and the one that failed."""
    print("the device does not answer any more: starting again", flush=True)
    command = [sys.executable, "-m", "benchmarks", "gpu", "--out", str(arguments.out.resolve())]
    command += ["--minutes", str(max(0.0, seconds / 60))]
    command += ["--row-seconds", str(arguments.row_seconds)]
    command += ["--model-seconds", str(arguments.model_seconds), "--keep-failed"]
    os.chdir(machine.ROOT)
    os.execv(sys.executable, command)
