"""Search the launch configurations of a room and print a patch for its table.

`benchmarks/kernels/launch_<room>.py` says what may be tried. Candidates that spill or need more
shared memory than there is are dropped ahead of time; the others become rivals of the entry that
stands in the table, on the inputs of a benchmark. An entry is replaced only by one that matched
the oracle and was faster in four of five rounds. `--dry-run` needs no GPU: it compiles, and ranks
by registers.
"""

import argparse
import ast
import dataclasses
import difflib
import fnmatch
import importlib
import importlib.util
import math
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import compile as aot
from benchmarks import harness, machine, run
from fastvid.kernels._shared.variants import Variant

# Kilobytes of shared memory that a program may have, by compute capability.
SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}


class Search(NamedTuple):
    """One entry of a launch table, and what may stand there."""

    table: str  # its name in the room's file
    key: tuple[int, ...]  # (512,) is FORWARD[512], (16, 64) is FORWARD[16][64]
    candidates: list[Any]
    variant: Callable[[Any], Variant]  # the kernel under a candidate
    case: str  # pattern of the labels, such as "modulate/forward * D=384 *"
    file: str = "kernel"  # of the room, without .py
    rival: str = "fastvid"  # of the case, that launches by the table

    @property
    def name(self) -> str:
        file = "" if self.file == "kernel" else f"{self.file}."
        return file + self.table + "".join(f"[{key}]" for key in self.key)


def searches(room: str) -> list[Search]:
    """What a room says may be tried; nothing where it has no launch table."""
    return getattr(_launches(room), "searches", list)()


def unsearched(room: str) -> dict[str, str]:
    """The launch tables of a room that nothing searches, and why."""
    return getattr(_launches(room), "UNSEARCHED", {})


def _launches(room: str) -> Any:
    name = f"benchmarks.kernels.launch_{room}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def module(room: str, file: str = "kernel") -> Any:
    """A file of a room, imported."""
    return importlib.import_module(f"fastvid.kernels.{room}.{file}")


def entry(room: str, search: Search) -> tuple[dict, Any]:
    """The dictionary that holds the entry, and its last key."""
    found = getattr(module(room, search.file), search.table)
    for key in search.key[:-1]:
        found = found[key]
    return found, search.key[-1]


def compiled(room: str, name: str, candidate: Any, architecture: str) -> dict[str, int] | None:
    """What a candidate uses; None if it does not compile."""
    (search,) = (search for search in searches(room) if search.name == name)
    try:
        return aot.resources(aot.compile_variant(search.variant(candidate), architecture))
    except Exception:  # Triton has no common class of them
        return None


def fits(found: dict[str, int] | None, architecture: str) -> bool:
    """Whether a compilation keeps to registers and to the shared memory that there is."""
    return bool(found) and not found["stack"] and found["shared"] <= shared_bytes(architecture)


def shared_bytes(architecture: str) -> int:
    """What `sm_86` allows a program; an unknown one as much as the nearest older one."""
    capability = int(architecture.removeprefix("sm_"))
    older = [known for known in SHARED if known <= capability] or [min(SHARED)]
    return 1024 * SHARED[max(older)]


def as_rivals(
    case: harness.Case, holder: dict, key: Any, candidates: list[Any], rival: str = "fastvid"
) -> harness.Case:
    """The case with our op under each candidate; "fastvid" is the entry that stands there."""
    standing = holder[key]
    ours, eager = case.rivals[rival], case.rivals["eager"]

    def under(candidate):
        def bind(*inputs):
            def in_place(function, *arguments):
                holder[key] = candidate  # launchers read the table at every launch
                try:
                    return function(*arguments)
                finally:
                    holder[key] = standing

            thunk = in_place(ours, *inputs)
            return lambda: in_place(thunk)

        return bind

    rivals = {"fastvid": ours, "eager": eager}
    rivals |= {written(candidate): under(candidate) for candidate in candidates}
    return dataclasses.replace(case, rivals=rivals, missing={})


def fastest(rows: list[harness.Row]) -> str | None:
    """The candidate that matched and beat the standing entry in four of five rounds, if any."""
    good = [row for row in rows if row["rival"] not in ("fastvid", "eager") and row.get("match")]
    good = [row for row in good if row["ratio_p80"] < 1]
    return min(good, key=lambda row: row["ratio_p50"])["rival"] if good else None


def written(value: Any) -> str:
    """An entry as the source of a table has it."""
    if hasattr(value, "_fields"):
        return f"{type(value).__name__}({', '.join(map(repr, value))})"
    return repr(value)


def patched(source: str, found: dict[tuple[str, tuple[int, ...]], str]) -> str:
    """The source with these entries (table, key) in place of those that stand there."""
    lines = source.splitlines(keepends=True)
    for table, key in found:
        (node,) = (
            statement.value
            for statement in ast.parse(source).body
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == table
        )
        for part in key:
            at = [ast.literal_eval(each) for each in node.keys].index(part)
            node = node.values[at]
        old = ast.get_source_segment(source, node)
        line = lines[node.lineno - 1]
        before = line.encode()[: node.col_offset].decode()
        lines[node.lineno - 1] = before + found[table, key] + line[len(before) + len(old) :]
        source = "".join(lines)
    return source


def diff(path: Path, found: dict[tuple[str, tuple[int, ...]], str]) -> str:
    """The patch of a room's kernel file."""
    old = path.read_text()
    name = path.relative_to(machine.ROOT).as_posix()
    sides = (text.splitlines(keepends=True) for text in (old, patched(old, found)))
    return "".join(difflib.unified_diff(*sides, f"a/{name}", f"b/{name}"))


def _timed(search: Search, room: str, candidates: list[Any], seconds: float) -> str | None:
    """The fastest of the candidates by its source; None to leave what stands there."""
    device = torch.device("cuda")
    found = run.cases(room, device, quick=False)
    case = next((case for case in found if fnmatch.fnmatch(case.label, search.case)), None)
    if case is None or search.rival not in case.rivals:
        print(f"  no case is called {search.case}, or it has no {search.rival} on this machine")
        return None
    case = as_rivals(case, *entry(room, search), candidates, search.rival)
    rows = harness.measure(case, device, seconds=seconds)
    print(harness.table(rows), flush=True)
    return fastest(rows)


def main(argv: list[str]) -> int:
    """0 when everything was searched; the patch, if any, stands last."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tune", description=__doc__)
    parser.add_argument("room", choices=run.rooms())
    parser.add_argument("--table", default="", help="only entries that begin so: FORWARD[16]")
    parser.add_argument("--most", type=int, help="candidates per entry")
    parser.add_argument("--arch", help="such as sm_89; default: that of the GPU, or sm_90")
    parser.add_argument("--seconds", type=float, default=2.0, help="per entry")
    parser.add_argument("--dry-run", action="store_true", help="compile and rank, without a GPU")
    arguments = parser.parse_args(argv)
    if not re.fullmatch(r"sm_\d+", arguments.arch or "sm_90"):
        parser.error(f"--arch must be sm_NN, got {arguments.arch}")
    if not searches(arguments.room):
        parser.error(
            f"{arguments.room} has no launch table to search: its launcher computes tiles and "
            f"warps from the sizes, in kernels/{arguments.room}/kernel.py"
        )
    if not (arguments.dry_run or torch.cuda.is_available()):
        parser.error("no CUDA device here; --dry-run compiles and ranks without one")
    if (code := aot.without_interpreter("tune", argv)) is not None:
        return code
    room, architecture = arguments.room, arguments.arch or _architecture()
    for table, why in unsearched(room).items():
        print(f"{table} is not searched: {why}")
    winners: dict[str, dict] = {}  # by file
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for search in searches(room):
            if not search.name.startswith(arguments.table):
                continue
            holder, key = entry(room, search)
            others = [each for each in search.candidates if each != holder[key]]
            tried = [holder[key], *others[: arguments.most]]
            jobs = [(room, search.name, candidate, architecture) for candidate in tried]
            found = list(pool.map(compiled, *zip(*jobs, strict=True)))
            print(f"\n{search.name} on {architecture}, {len(tried)} candidates")
            for candidate, used in zip(tried, found, strict=True):
                print(f"  {written(candidate):<28}", _resources(used, architecture))
            kept = [c for c, used in zip(tried, found, strict=True) if fits(used, architecture)]
            if arguments.dry_run:
                lean = [
                    used["registers"] if fits(used, architecture) else math.inf for used in found
                ]
                winner = written(tried[lean.index(min(lean))])
            else:
                kept = [candidate for candidate in kept if candidate != holder[key]]
                winner = _timed(search, room, kept, arguments.seconds)
            if winner and winner != written(holder[key]):
                winners.setdefault(search.file, {})[search.table, search.key] = winner
    what = "if the fewest registers won, and nothing was timed" if arguments.dry_run else "found"
    print(f"\n# {sum(map(len, winners.values()))} entries to change ({what})")
    for file, entries in winners.items():
        print(diff(aot.KERNELS / room / f"{file}.py", entries), end="")
    return 0


def _architecture() -> str:
    if not torch.cuda.is_available():
        return "sm_90"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def _resources(used: dict[str, int] | None, architecture: str) -> str:
    if used is None:
        return "does not compile"
    says = ", ".join(f"{key} {used[key]}" for key in ("registers", "stack", "shared"))
    return says + ("" if fits(used, architecture) else "  dropped")
