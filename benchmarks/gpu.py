"""One run on a GPU machine, from the checkout: environment, ceilings, tests, kernels.

Needs torch, Triton, numpy, einops and pytest, nothing else. Every row is on disk as soon as it is
measured, and a second run with the same --out leaves out the cases that are there.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import harness, run


def main(argv: list[str]) -> int:
    """0 when the tests pass and every result of ours matches its oracle."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is found")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny sizes")
    arguments = parser.parse_args(argv)
    end = time.monotonic() + 60 * arguments.minutes
    if not (arguments.dry_run or torch.cuda.is_available()):
        parser.error("no CUDA device here; --dry-run goes through the same code on the CPU")
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = arguments.out / "rows.jsonl"
    ceilings = harness.measure_ceilings(device, quick=arguments.dry_run)
    report = {**harness.environment(device), **ceilings}
    (arguments.out / "environment.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1), flush=True)

    good = _tests_pass(arguments.out / "tests.log", (end - time.monotonic()) / 2)
    done = {json.loads(line)["case"] for line in rows.open()} if rows.exists() else set()
    left = [
        case
        for room in run.rooms()
        for case in run.cases(room, device, arguments.dry_run)
        if case.label not in done
    ]
    for position, case in enumerate(left):
        if time.monotonic() > end:
            print(f"out of time: {len(left) - position} cases left; run again to go on")
            return 1
        seconds = 0.05 if arguments.dry_run else 1.0
        found = harness.measure(case, device, seconds=seconds, ceilings=ceilings)
        harness.append(rows, found)
        print("\n" + harness.table(found), flush=True)
        good = good and all(row["match"] for row in found if row["rival"] == "fastvid")
    return 0 if good else 1


def _tests_pass(log: Path, seconds: float) -> bool:
    """Run `pytest -m gpu`; without a GPU all of it is skipped, which is fine."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests/kernels"]
    with log.open("w") as file:
        try:
            code = subprocess.call(
                command, cwd=harness.ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            code = 124
    print("".join(log.read_text().splitlines(keepends=True)[-15:]), flush=True)
    return code == 0
