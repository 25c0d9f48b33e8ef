"""Time every room against its rivals and print the tables: `python -m benchmarks kernels`."""

import argparse
import importlib
from pathlib import Path

import torch

from benchmarks import harness, machine
from benchmarks import rows as results

BENCHES = Path(__file__).parent / "kernels"


def rooms() -> list[str]:
    """The rooms that have a benchmark."""
    return sorted(path.stem.removeprefix("bench_") for path in BENCHES.glob("bench_*.py"))


def cases(room: str, device: torch.device, quick: bool) -> list[harness.Case]:
    """The cases of one room."""
    return importlib.import_module(f"benchmarks.kernels.bench_{room}").cases(device, quick)


def is_wanted(case: harness.Case, name: str, shape: list[str], dtype: list[str]) -> bool:
    """Whether the name holds `name` and the case has each size of `shape` and one of the dtypes."""
    sizes = {f"{key}={value}" for key, value in case.shape.items()}
    kind = str(case.dtype).removeprefix("torch.")
    return name in case.name and set(shape) <= sizes and (not dtype or kind in dtype)


def main(argv: list[str]) -> int:
    """0 when every result of ours matches its oracle."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks kernels", description=__doc__)
    parser.add_argument("--room", action="append", choices=rooms(), help="default: every room")
    parser.add_argument("--name", default="", help="a part of the case's name, such as backward")
    parser.add_argument("--shape", nargs="+", default=[], metavar="N=1024", help="all of these")
    parser.add_argument("--dtype", nargs="+", default=[], help="one of these, such as bfloat16")
    parser.add_argument("--rival", nargs="+", help="beside fastvid and eager; default: all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a tenth of the time")
    parser.add_argument("--memory", action="store_true", help="peak of each rival in a process")
    parser.add_argument("--seconds", type=float, default=1.0, help="per case")
    parser.add_argument("--threads", type=int, help="of the CPU, on as many cores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="append the rows to this JSON Lines file")
    parser.add_argument(
        "--save", action="store_true", help="renew the rows of these cases in benchmarks/results"
    )
    arguments = parser.parse_args(argv)
    if arguments.save and (arguments.quick or arguments.rival):
        parser.error("--save keeps whole line-ups of full size: without --quick and --rival")
    with machine.pinned(arguments.threads):
        return _run(arguments, torch.device(arguments.device))


def _run(arguments: argparse.Namespace, device: torch.device) -> int:
    from benchmarks import memory  # which imports this module

    torch.manual_seed(0)
    quick = arguments.quick
    ceilings = machine.measure_ceilings(device, quick)
    here = machine.environment(device)
    print(f"{here['machine']}, torch {here['torch']}, {here['threads']} threads")
    print(", ".join(f"{name} {value:.4g}" for name, value in ceilings.items()))
    seconds, sets = (arguments.seconds / 10, 4) if quick else (arguments.seconds, 128)
    good, found = True, 0
    chosen = {room: cases(room, device, quick) for room in arguments.room or rooms()}
    known = {name for every in chosen.values() for c in every for name in (*c.rivals, *c.missing)}
    if unknown := sorted(set(arguments.rival or ()) - known):
        print(f"no rival {unknown[0]!r} here; known: {', '.join(sorted(known))}")
        return 1
    for room, every in chosen.items():
        for case in every:
            if not is_wanted(case, arguments.name, arguments.shape, arguments.dtype):
                continue
            case = harness.select(case, arguments.rival)
            rows = harness.measure(case, device, seconds=seconds, sets=sets, ceilings=ceilings)
            if arguments.memory and device.type == "cpu":  # on a GPU the allocator has told
                rows = [row | memory.peaks(row, quick) for row in rows]
            print("\n" + harness.table(rows), flush=True)
            harness.append(arguments.out, rows)
            if arguments.save:
                path = results.RESULTS / machine.folder(device) / f"{room}.jsonl"
                results.save(path, rows, [each.label for each in every])
            good = good and harness.matches(rows)
            found += 1
    if not found:
        print("no case has that name, shape and dtype")
    return 0 if good and found else 1
