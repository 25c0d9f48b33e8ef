"""Our ops and models against plain PyTorch on this CPU: `python -m benchmarks cpu_gate`.

Every ratio is that of paired calls, theirs over ours, in interleaved rounds. One that is below its
floor by more than its own spread (p80 - p20) fails, so that noise does not; so does a result that
does not match. The floors, one line each, are in `floors.json`; a room without a floor is
measured and reported all the same.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import harness, machine, run, run_models

FLOORS = Path(__file__).parent / "floors.json"
CPU = torch.device("cpu")


class Ratio(NamedTuple):
    """How many times our time a rival takes."""

    case: str
    rival: str
    p20: float
    p50: float
    p80: float
    match: bool
    floor: float | None

    @property
    def spread(self) -> float:
        return self.p80 - self.p20

    @property
    def good(self) -> bool:
        return self.match and (self.floor is None or self.p50 + self.spread >= self.floor)

    def line(self) -> str:
        floor = "none" if self.floor is None else f"{self.floor:.2f}"
        fault = "" if self.good else "BELOW" if self.match else "NO MATCH"
        return (
            f"{self.case:<80} {self.rival:<9} {self.p50:5.2f}x +- {self.spread:4.2f}"
            f"  floor {floor} {fault}"
        )


def of_rooms(
    floors: dict[str, dict[str, float]], rooms: list[str], seconds: float
) -> Iterator[Ratio]:
    """The cases that have floors; of a room that has none, one forward and one backward."""
    for room in rooms:
        every = run.cases(room, CPU, quick=False)
        cases = [case for case in every if case.label in floors]
        for case in cases or smallest(every):
            wanted = floors.get(case.label, {"eager": None})
            chosen = harness.select(case, list(wanted))
            rows = harness.measure(chosen, CPU, seconds=seconds, sets=8)
            ours = harness.matches(rows)
            measured = {row["rival"]: row for row in rows if "ratio_p50" in row}
            for rival, floor in wanted.items():
                row = measured.get(rival, {})  # one that failed, or all of them if we did
                ratios = (row.get(f"ratio_p{p}", math.nan) for p in (20, 50, 80))
                yield Ratio(case.label, rival, *ratios, ours and rival in measured, floor)


def smallest(cases: list[harness.Case]) -> list[harness.Case]:
    """Forward and backward, the case of the first dtype that moves the least."""
    of_a_kind = [case for case in cases if case.dtype == cases[0].dtype]
    ordered = sorted(of_a_kind, key=lambda case: case.nbytes)
    backward = [case for case in ordered if "backward" in case.name]
    forward = [case for case in ordered if "backward" not in case.name]
    return forward[:1] + backward[:1]


def of_models(floors: dict[str, dict[str, float]]) -> Iterator[Ratio]:
    """The small rows of every model."""
    for bench in map(run_models.bench, run_models.names()):
        for spec in bench.specs(CPU, True):
            row = bench.within(spec, 0)
            ratios = (row[f"wall_ratio_p{p}"] for p in (20, 50, 80))
            floor = floors.get(row["case"], {}).get("eager")
            yield Ratio(row["case"], "eager", *ratios, row["match"], floor)


def main(argv: list[str]) -> int:
    """0 when no ratio is below its floor by more than its spread, and all results match."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks cpu_gate", description=__doc__)
    parser.add_argument("--room", action="append", choices=run.rooms(), help="default: every room")
    parser.add_argument("--no-models", action="store_true")
    parser.add_argument("--seconds", type=float, default=1.0, help="per case, at least")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    floors: dict[str, Any] = json.loads(FLOORS.read_text())
    good = True
    with machine.pinned(arguments.threads):
        torch.manual_seed(0)
        here = machine.environment(CPU)
        print(f"{here['machine']}, torch {here['torch']}, {here['threads']} threads")
        ratios = [of_rooms(floors, arguments.room or run.rooms(), arguments.seconds)]
        ratios += [] if arguments.no_models or arguments.room else [of_models(floors)]
        for found in ratios:
            for ratio in found:
                print(ratio.line(), flush=True)
                good = good and ratio.good
    return 0 if good else 1
