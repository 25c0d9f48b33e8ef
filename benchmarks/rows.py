"""What result files hold, in one shape: a row is one rival's result on one case."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.harness import Row, read_rows

RESULTS = Path(__file__).parent / "results"
SIDES = ("fastvid", "eager")  # of a duel of models


def read(path: Path) -> list[Row]:
    """The rows of a file, or of every JSON Lines file below a folder, the oldest day first.

    What a run of `gpu` says of its tests is none.

    Raises:
        FileNotFoundError: there is neither.
    """
    if not path.exists():
        raise FileNotFoundError(f"results must be a file or a folder, got {path}")
    paths = [path] if path.is_file() else sorted(path.rglob("*.jsonl"))
    found = [row for each in paths for row in read_rows(each) if row.get("rival") != "tests"]
    rows = [one for row in found for one in _one_per_rival(row)]
    return sorted(rows, key=lambda row: row.get("date", ""))  # stable: as measured within a day


def setting(row: Row) -> tuple:
    """What two rows must share to be the same measurement on the same machine."""
    return row["case"], row.get("rival"), *place(row)


def place(row: Row) -> tuple:
    """The machine, and how much of it a measurement had."""
    return tuple(row.get(name) for name in ("machine", "threads", "compiled"))


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last of the rows that measure the same."""
    return list({setting(row): row for row in rows}.values())


def save(path: Path, rows: list[Row], cases: list[str] | None = None) -> None:
    """Put the rows of one case in the place of its older ones on the same machine.

    Args:
        path: of a JSON Lines file, which need not be there.
        rows: of one case, as measured.
        cases: the labels of all cases that there are, in their order; rows of others are dropped.
            None keeps all.
    """
    case, here = rows[0]["case"], place(rows[0])
    before = read_rows(path)
    order = cases or list(dict.fromkeys(row["case"] for row in [*before, *rows]))
    kept = [row for row in before if row["case"] in order]
    kept = [row for row in kept if row["case"] != case or place(row) != here]
    kept = sorted(kept + rows, key=lambda row: (str(place(row)), order.index(row["case"])))
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(row) + "\n" for row in kept))
    os.replace(new, path)  # a run that is cut off leaves a whole file


def _one_per_rival(row: Row) -> Iterator[Row]:
    """A model's row holds both sides of a duel: `fastvid_p50_ms`, `eager_p50_ms`, ..."""
    if "rival" in row:
        yield row
        return
    prefixes = tuple(f"{side}_" for side in SIDES)
    common = {name: value for name, value in row.items() if not name.startswith(prefixes)}
    common.setdefault("room", row["case"].partition("/")[0])
    for side in SIDES:
        own = {
            name.removeprefix(f"{side}_"): value
            for name, value in row.items()
            if name.startswith(f"{side}_")
        }
        kind = "fp32" if row.get("dtype") == "float32" else "bf16"
        ceiling = row.get(f"matmul_{kind}_tflop_per_s")
        if ceiling and "flops" in row and "p50_ms" in own:
            own["of_matmul"] = row["flops"] / own["p50_ms"] / 1e9 / ceiling
        ratios = {f"ratio_p{q}": row[f"wall_ratio_p{q}"] for q in (20, 50, 80)}
        yield {**common, "rival": side, **own, **(ratios if side == "eager" else {})}
