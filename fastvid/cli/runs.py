"""List training runs: step, losses, best step, size on disk and state."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastvid.training.runs import RunSummary, find_runs, summarize


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="fastvid runs", description=__doc__)
    parser.add_argument("folder", nargs="?", default="runs", type=Path, help="where to look [runs]")
    folder = parser.parse_args(argv).folder
    rows: list[tuple[str, ...]] = [
        ("run", "state", "step", "loss", "validation", "best step", "size")
    ]
    failed = 0
    for path in find_runs(folder):
        try:
            rows.append(_row(folder, summarize(path)))
        except ValueError as error:
            print(f"fastvid runs: {error}", file=sys.stderr)
            failed = 1
    if len(rows) == 1:
        print(f"no runs in {folder}")
        return failed
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        cells[:2] = [text.ljust(width) for text, width in zip(row[:2], widths, strict=False)]
        print("  ".join(cells))
    return failed


def _row(root: Path, run: RunSummary) -> tuple[str, ...]:
    return (
        str(run.folder.relative_to(root)) if run.folder != root else run.folder.name,
        run.state,
        f"{run.step}/{run.steps}",
        _number(run.loss),
        _number(run.validation),
        "-" if run.best_step is None else str(run.best_step),
        f"{run.nbytes / 1e6:,.1f} MB",
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
