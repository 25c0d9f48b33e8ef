"""The papers' efficiency tables beside our own results: `python -m benchmarks papers`.

Published cells stand in `published.json`, each with its source. Ours are read from result files
(`benchmarks/results/`), never typed in. Tokens, FLOPs and the memory estimate follow from the sizes
(`work.py`, `memory.py`), so they are there for models and machines that nobody has measured. The
seconds of two machines are never compared by themselves: beside them stands the share of the
machine's own peak, the data sheet's for the paper's, the matmul of the same run for ours.
"""

import argparse
import json
from pathlib import Path

from benchmarks import rows
from benchmarks.papers import tables


def main(argv: list[str]) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks papers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--table", choices=tuple(tables.TABLES), action="append", help="default all"
    )
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of JSONL files")
    parser.add_argument("--out", type=Path, help="also write the lines as one JSON file")
    arguments = parser.parse_args(argv)
    results = rows.latest(rows.read(arguments.results))
    found = {name: tables.TABLES[name](results) for name in arguments.table or tables.TABLES}
    for table in found.values():
        print(table.render(), end="\n\n")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        lines = {name: table.as_dicts() for name, table in found.items()}
        arguments.out.write_text(json.dumps(lines, indent=1) + "\n")
    return 0
