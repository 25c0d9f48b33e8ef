"""`python -m benchmarks VERB`; `README.md` is the map of this folder."""

import importlib
import sys
from pathlib import Path

VERBS = {
    "kernels": ("run", "time every room against its rivals"),
    "models": ("run_models", "time the models against plain PyTorch"),
    "papers": ("papers", "the tables of the papers beside our own results"),
    "compile": ("compile", "compile every kernel ahead of time and hold it to its budget"),
    "gpu": ("gpu", "one run on a GPU machine: environment, ceilings, tests, kernels, models"),
    "tune": ("tune", "search the launch configurations of a room; print a patch"),
    "cpu_gate": ("cpu_gate", "ratios against plain PyTorch, held to their floors"),
    "report": ("report", "results as one page and its pictures"),
    "compare": ("compare", "two results; fails on a regression past the spread"),
}


def verbs() -> dict[str, tuple[str, str]]:
    """Those whose module is here."""
    folder = Path(__file__).parent
    return {
        verb: found
        for verb, found in VERBS.items()
        if (folder / f"{found[0]}.py").exists() or (folder / found[0] / "__init__.py").exists()
    }


def main(argv: list[str]) -> int:
    """Hand the rest of the line to `main` of the verb's module."""
    known = verbs()
    if not argv or argv[0] not in known:
        print("usage: python -m benchmarks VERB ...\n")
        print("\n".join(f"  {verb:<9} {line}" for verb, (_, line) in known.items()))
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    return importlib.import_module(f"benchmarks.{known[argv[0]][0]}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
