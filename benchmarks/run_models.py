"""Time the models against plain PyTorch: `python -m benchmarks models [NAME] ...`.

`benchmarks/models/bench_<name>.py` takes the arguments after the name; `NAME --help` lists them.
"""

import argparse
import importlib
from pathlib import Path
from typing import Any

BENCHES = Path(__file__).parent / "models"


def names() -> list[str]:
    """The models that have a benchmark."""
    return sorted(path.stem.removeprefix("bench_") for path in BENCHES.glob("bench_*.py"))


def bench(name: str) -> Any:
    """The module of a model's benchmark: `specs`, `label`, `within` and `main`."""
    return importlib.import_module(f"benchmarks.models.bench_{name}")


def main(argv: list[str]) -> int:
    """0 when the results of every model match."""
    if argv and argv[0] in names():
        return bench(argv[0]).main(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks models", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every model, small")
    parser.add_argument("name", nargs="?", choices=names(), help="one model; first, if at all")
    arguments = parser.parse_args(argv)
    return max([bench(name).main(["--quick"] * arguments.quick) for name in names()])
