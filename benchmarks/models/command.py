"""What the benchmarks of models have in common: a row out of a duel, and the command.

A model's file says what is run (`prepare`), under which name and with how much memory; both sides
load the same weights, and the match of their results stands in the row of their times.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, machine, rows
from benchmarks.models.duel import Contender, duel, serve

TOLERANCE = 1e-4  # of float32, which samplers carry along and gradients add up
VALUES = 4096  # compared per tensor, evenly spaced
Spec = dict[str, Any]
Results = dict[str, Tensor]
Prepare = Callable[[Spec], tuple[Callable[[], Any], Callable[[Any], None]]]


def thinned(value: Tensor) -> Tensor:
    """Some of the values, in float32."""
    flat = value.detach().flatten()
    return flat[:: -(-len(flat) // VALUES)].float().cpu().clone()


def errors(results: Results, exact: Results) -> dict[str, float]:
    """The relative error (root mean square) of each tensor.

    Where a tensor is below a hundredth of its kind (results, gradients, changes), of that: some
    gradients, as those of the keys' biases, are nothing but rounding.
    """
    if results.keys() != exact.keys():
        raise RuntimeError(f"only one side has {sorted(results.keys() ^ exact.keys())}")
    sizes = {name: value.square().mean().sqrt().item() for name, value in exact.items()}
    floors: dict[str, float] = {}
    for name, size in sizes.items():
        kind = name.split()[0]
        floors[kind] = max(floors.get(kind, 0.0), size / 100)
    return {
        name: (results[name] - value).square().mean().sqrt().item()
        / max(sizes[name], floors[name.split()[0]])
        for name, value in exact.items()
    }


def agree(ours: dict[str, float], theirs: dict[str, float]) -> bool:
    """No error of ours is above twice theirs and the tolerance."""
    return all(error <= max(2 * theirs[name], TOLERANCE) for name, error in ours.items())


def measure(
    module: str, case: str, spec: Spec, need_mib: float, limit: float = math.inf, **pace: Any
) -> harness.Row:
    """One row: times, memory and the match.

    float32 is held to the rival's float32, bfloat16 to at most twice the rival's error.

    Args:
        module: whose `main` takes `--contender`.
        case: what the row is called, its room first.
        need_mib: memory of one contender.
        limit: seconds for all of it.
        pace: the turns, rounds and seconds of the duel.
    Raises:
        RuntimeError: it cannot be measured in `limit` seconds.
    """
    end = time.monotonic() + limit
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder, name)) for name in ("fastvid", "eager", "exact")}
        specs = {name: {**spec, "rival": name, "save": file} for name, file in files.items()}
        exact = specs.pop("exact") | {"rival": "eager", "dtype": "float32", "compile": False}
        exact["once"] = True  # in float32 a second call may take longer than all the others
        if spec["dtype"] == "float32":
            files["exact"] = files["eager"]
        else:
            with Contender(module, exact, end):
                pass  # its result is kept when it answers
        row = duel(module, specs, **pace, need_mib=need_mib, end=end)
        found: dict[str, Results] = {
            name: torch.load(file, weights_only=True) for name, file in files.items()
        }
    ours, theirs = (errors(found[name], found["exact"]) for name in ("fastvid", "eager"))
    row |= {"error": max(ours.values()), "eager_error": max(theirs.values())}
    row["match"] = agree(ours, theirs)
    return {"case": case, "room": case.partition("/")[0], **spec, **row}


def within(seconds: float) -> dict[str, Any]:
    """The pace of a row in so many seconds at most; 0: of as few calls as give a spread."""
    return {"turns": 1, "rounds": 5, "seconds": seconds / 4, "limit": seconds or math.inf}


def line(row: harness.Row) -> str:
    """A row for people."""
    return (
        f"{row['case']:<53} {row['fastvid_p50_ms']:9.0f} ms against {row['eager_p50_ms']:9.0f}"
        f"   {row['wall_ratio_p50']:5.2f}x ({row['wall_ratio_p20']:.2f} to"
        f" {row['wall_ratio_p80']:.2f}; cpu time {row['cpu_ratio_p50']:.2f}x)"
        f"   peak {row['fastvid_peak_mib']:6.0f} MiB, {row['peak_ratio']:.2f} of theirs,"
        f" beyond the weights {row['extra_ratio']:.2f}"
        f"   {'match' if row['match'] else 'NO MATCH'} ({row['error']:.0e})"
        f"{' one after the other' if row['apart'] else ''}"
    )


def options(name: str, doc: str) -> argparse.ArgumentParser:
    """The options of every model; its own file adds what it may be asked for."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks models {name}", description=doc.splitlines()[0]
    )
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="a short model, few rounds")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--turns", type=int, default=3, help="pairs of fresh processes per row")
    parser.add_argument("--rounds", type=int, default=3, help="per turn, at least")
    parser.add_argument("--seconds", type=float, default=5, help="per turn, at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--floor", type=float, default=0, help="fail below this time ratio")
    parser.add_argument("--out", type=Path, help="append the rows to this JSONL file")
    parser.add_argument("--save", action="store_true", help="renew them in benchmarks/results")
    return parser


def run(
    arguments: argparse.Namespace,
    prepare: Prepare,
    specs: Iterable[Spec],
    measure: Callable[..., harness.Row],
) -> int:
    """Measure the rows on as many cores as threads; 0 when all match and none is below the floor.

    Args:
        prepare: the other side: a contender's call, and what saves the results of the first one.
        measure: makes the row of one spec, at a pace.
    """
    if arguments.contender:
        spec = json.loads(arguments.contender)
        serve(lambda: prepare(spec), torch.device(spec["device"]), spec.get("once", False))
        return 0
    names = ("turns", "rounds", "seconds")
    pace = {name: getattr(arguments, name) for name in names}
    if arguments.quick:
        pace = {"turns": 1, "rounds": 2, "seconds": 0}
    device, good = torch.device(arguments.device), True
    with machine.pinned(arguments.threads):
        here = machine.environment(device) | machine.measure_ceilings(device, arguments.quick)
        print(f"{here['machine']}, torch {here['torch']}, {arguments.threads} threads")
        for spec in specs:
            shared = {name: getattr(arguments, name) for name in ("threads", "device", "quick")}
            row = {**here, **measure({**spec, **shared}, **pace)}
            print(line(row), flush=True)
            harness.append(arguments.out, [row])
            if arguments.save:
                path = rows.RESULTS / machine.folder(device) / f"{row['room']}.jsonl"
                rows.save(path, [row])
            good = good and row["match"] and row["wall_ratio_p50"] >= arguments.floor
    return 0 if good else 1
