"""Time every room against its rivals and print the tables: `python -m benchmarks kernels`."""

import argparse
import importlib
from pathlib import Path

import torch

from benchmarks import harness

BENCHES = Path(__file__).parent / "kernels"


def rooms() -> list[str]:
    """The rooms that have a benchmark."""
    return sorted(path.stem.removeprefix("bench_") for path in BENCHES.glob("bench_*.py"))


def cases(room: str, device: torch.device, quick: bool) -> list[harness.Case]:
    """The cases of one room."""
    return importlib.import_module(f"benchmarks.kernels.bench_{room}").cases(device, quick)


def main(argv: list[str]) -> int:
    """0 when every result of ours matches its oracle."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks kernels", description=__doc__)
    parser.add_argument("--room", action="append", choices=rooms(), help="default: every room")
    parser.add_argument("--only", default="", help="a part of the case's name, such as bfloat16")
    parser.add_argument("--rival", action="append", help="beside fastvid and eager; default: all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a tenth of the time")
    parser.add_argument("--seconds", type=float, default=1.0, help="per case")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="append the rows to this JSONL file")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    seconds = arguments.seconds / 10 if arguments.quick else arguments.seconds
    ceilings = harness.measure_ceilings(device, arguments.quick)
    machine = harness.environment(device)
    print(f"{machine['machine']}, torch {machine['torch']}, {machine['threads']} threads")
    print(", ".join(f"{name} {value:.4g}" for name, value in ceilings.items()))
    good = True
    for room in arguments.room or rooms():
        for case in cases(room, device, arguments.quick):
            if arguments.only not in case.label:
                continue
            wanted = {"fastvid", "eager", *(arguments.rival or case.rivals)}
            for name in [name for name in case.rivals if name not in wanted]:
                del case.rivals[name]
            rows = harness.measure(case, device, seconds=seconds, ceilings=ceilings)
            print("\n" + harness.table(rows), flush=True)
            harness.append(arguments.out, rows)
            good = good and all(row["match"] for row in rows if row["rival"] == "fastvid")
    return 0 if good else 1
