"""Compile every room's `VARIANTS` ahead of time and hold them to a budget. Needs no GPU.

`kernels/<room>/budget.json` keeps, per architecture and variant, the most registers, stack and
shared memory and the fewest 128-bit loads a compilation may have. Triton versions allocate
registers differently, so `--update` only widens what is there: delete the file to tighten it.
"""

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from fastvid.kernels._shared.variants import Variant

KERNELS = Path(__file__).parent.parent / "kernels"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
UNBUDGETED = ("gfx942",)  # has to compile, nothing more
MOST = ("registers", "stack", "shared")
FEWEST = ("wide_loads", "wgmma")


def rooms() -> list[str]:
    """The rooms that have kernels to compile."""
    return sorted(path.parent.name for path in KERNELS.glob("*/kernel.py"))


def variants(room: str, everything: bool = False) -> list[Variant]:
    """The `VARIANTS` of a room, or all that its `launch_<room>.py` names beyond them."""
    launches = f"benchmarks.kernels.launch_{room}"
    if everything and importlib.util.find_spec(launches):
        return importlib.import_module(launches).all_variants()
    return importlib.import_module(f"fastvid.kernels.{room}.kernel").VARIANTS


def compile_variant(variant: Variant, architecture: str) -> Any:
    """The compiled kernel, with its assembly at every level in `.asm`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    signature = {
        name: "constexpr" if name in variant.constants else variant.types[name].split(":")[0]
        for name in names
    }
    multiples = {
        (i,): [["tt.divisibility", int(variant.types[name].split(":")[1])]]
        for i, name in enumerate(names)
        if name not in variant.constants and ":" in variant.types[name]
    }
    constants = {name: value for name, value in variant.constants.items() if name in names}
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    if architecture.startswith("gfx"):
        if "PRECISION" in constants:  # what launchers ask for there
            constants["PRECISION"] = "ieee"
        target = GPUTarget("hip", architecture, 64)
    else:
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    source = ASTSource(variant.kernel, signature, constants, multiples)
    return triton.compile(source, target=target, options=options)


def resources(compiled: Any) -> dict[str, int]:
    """What a compilation for an NVIDIA architecture uses, per thread or per program."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "shared": compiled.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.[bf]32|ld\.global\S*\.v2\.[bf]64", ptx)),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
    }


def excess(found: dict[str, int], budget: dict[str, int]) -> list[str]:
    """What is over the budget, in words; empty when nothing is."""
    over = [f"{key} {found[key]} > {budget[key]}" for key in MOST if found[key] > budget[key]]
    return over + [
        f"{key} {found[key]} < {budget[key]}" for key in FEWEST if found[key] < budget[key]
    ]


def widened(found: dict[str, int], budget: dict[str, int] | None) -> dict[str, int]:
    """The budget that both `found` and whatever `budget` allowed stay within."""
    if budget is None:
        return found
    return {key: (max if key in MOST else min)(found[key], budget[key]) for key in found}


class Compilation(NamedTuple):
    """One variant for one architecture; `found` is None where nothing is budgeted."""

    room: str
    variant: str
    architecture: str
    seconds: float
    found: dict[str, int] | None


def compile_one(
    room: str, variant: str, architecture: str, everything: bool = False
) -> Compilation:
    """Compile the variant of that name."""
    known = variants(room, everything)
    (chosen,) = (candidate for candidate in known if candidate.name == variant)
    start = time.perf_counter()
    compiled = compile_variant(chosen, architecture)
    seconds = time.perf_counter() - start
    found = None if architecture in UNBUDGETED else resources(compiled)
    return Compilation(room, variant, architecture, seconds, found)


def check_room(
    room: str, compilations: Iterable[Compilation], update: bool, everything: bool = False
) -> bool:
    """Print a row per compilation of a room and say whether all are within its budget.

    Of `everything`, what has no budget is printed and said to spill, no more.
    """
    path = KERNELS / room / "budget.json"
    budgets = json.loads(path.read_text()) if path.exists() else {}
    good = True
    for _, variant, architecture, seconds, found in compilations:
        row = f"{room:<18} {variant:<24} {architecture:<7} {seconds:5.1f} s "
        if found is None:
            print(row)
            continue
        budget = budgets.setdefault(architecture, {}).get(variant)
        if update:
            budget = budgets[architecture][variant] = widened(found, budget)
        over = excess(found, budget) if budget else ["not in budget.json: --update"]
        if everything and not budget:
            over = ["spills"] if found["stack"] else []
        else:
            good = good and not over
        row += "".join(f" {found[key]:>{len(key)}}" for key in (*MOST, *FEWEST))
        print(row, "; ".join(over), flush=True)
    if update:
        path.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")
    return good


def without_interpreter(verb: str, argv: list[str]) -> int | None:
    """Run the verb where Triton compiles, and return its status; None if that is here."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return None
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.call([sys.executable, "-m", "benchmarks", verb, *argv], env=environment)


def main(argv: list[str]) -> int:
    """`python -m benchmarks compile`: 0 when everything is within its budget."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compile", description=__doc__)
    parser.add_argument("--room", action="append", choices=rooms(), help="default: every room")
    parser.add_argument("--arch", action="append", choices=(*ARCHITECTURES, *UNBUDGETED))
    parser.add_argument("--update", action="store_true", help="widen the budgets to what is found")
    parser.add_argument("--all", action="store_true", help="beyond VARIANTS; takes many minutes")
    arguments = parser.parse_args(argv)
    if arguments.all and arguments.update:
        parser.error("--update keeps the budgets of VARIANTS, without --all")
    if (code := without_interpreter("compile", argv)) is not None:
        return code
    import triton

    print(f"Triton {triton.__version__}")
    columns = " ".join((*MOST, *FEWEST))
    print(f"{'room':<18} {'variant':<24} {'arch':<7} {'time':>7}  {columns}")
    architectures = arguments.arch or (*ARCHITECTURES, *UNBUDGETED)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:  # one process per core
        begun = {}  # all of them, so that no core waits at the end of a room
        for room in arguments.room or rooms():
            tasks = [
                (room, variant.name, architecture, arguments.all)
                for variant in variants(room, arguments.all)
                for architecture in architectures
                if architecture in (variant.architectures or architectures)
            ]
            begun[room] = pool.map(compile_one, *zip(*tasks, strict=True))
        within = [
            check_room(room, compilations, arguments.update, arguments.all)
            for room, compilations in begun.items()
        ]
    return 0 if all(within) else 1
