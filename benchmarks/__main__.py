"""`python -m benchmarks VERB`: kernels, compile, gpu."""

import importlib
import sys

VERBS = {
    "kernels": "time every room against its rivals",
    "compile": "compile every kernel ahead of time and hold it to its budget",
    "gpu": "one run on a GPU machine: environment, ceilings, tests, kernels",
}


def main(argv: list[str]) -> int:
    """Dispatch to `benchmarks/<verb>.py`."""
    if not argv or argv[0] not in VERBS:
        print("usage: python -m benchmarks VERB ...\n")
        print("\n".join(f"  {verb:<9} {line}" for verb, line in VERBS.items()))
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    module = "run" if argv[0] == "kernels" else argv[0]
    return importlib.import_module(f"benchmarks.{module}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
