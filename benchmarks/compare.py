"""Two results of the same machine: `python -m benchmarks compare OLD NEW`.

Where both runs timed plain PyTorch beside us, the ratios are compared (a machine that is slower
today is slower for both); else the times. A regression is past the spread: the better end of the
new runs, 20 % of them, is worse than the worse end of the old ones. A result that matched its
oracle and no longer does, or can no longer be measured, is one too.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks import rows
from benchmarks.harness import Row


@dataclass(frozen=True)
class Change:
    case: str
    what: str  # "12.0 -> 15.1 ms", "1.30x -> 1.02x eager", "no longer matches"
    verdict: str  # "slower", "faster", "same", "lost"

    @property
    def is_regression(self) -> bool:
        return self.verdict in ("slower", "lost")


def compare(old: list[Row], new: list[Row]) -> list[Change]:
    """One change for every case that both hold."""
    before, after = ({rows.setting(row): row for row in rows.latest(each)} for each in (old, new))
    found = []
    for key in before.keys() & after.keys():
        row = before[key]
        if row["rival"] != "fastvid" or not row.get("match") or "skipped" in after[key]:
            continue  # what there was no time for says nothing
        rival = tuple("eager" if part == "fastvid" else part for part in key)
        found.append(_change(row, after[key], before.get(rival, {}), after.get(rival, {})))
    return sorted(found, key=lambda change: (not change.is_regression, change.case))


def _change(old: Row, new: Row, old_rival: Row, new_rival: Row) -> Change:
    case = ", ".join([new["case"]] + [f"{new['threads']} threads"] * ("threads" in new))
    if not new.get("match"):
        return Change(case, new.get("failed", "no longer matches"), "lost")
    if "ratio_p50" in old_rival and "ratio_p50" in new_rival:
        # Of theirs over ours, more is better: its 20 % is our worse end.
        worse_old, better_old = old_rival["ratio_p20"], old_rival["ratio_p80"]
        slower = new_rival["ratio_p80"] < worse_old
        faster = new_rival["ratio_p20"] > better_old
        what = f"{old_rival['ratio_p50']:.3f}x -> {new_rival['ratio_p50']:.3f}x eager"
    else:
        slower = new["p20_ms"] > old["p80_ms"]
        faster = new["p80_ms"] < old["p20_ms"]
        what = f"{old['p50_ms']:.4g} -> {new['p50_ms']:.4g} ms"
    return Change(case, what, "slower" if slower else "faster" if faster else "same")


def main(argv: list[str]) -> int:
    """1 when something regressed, 2 when the two have nothing in common."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=Path, help="a JSON Lines file, or a folder of them")
    parser.add_argument("new", type=Path)
    arguments = parser.parse_args(argv)
    changes = compare(rows.read(arguments.old), rows.read(arguments.new))
    for change in changes:
        print(f"{change.verdict:<7} {change.case}: {change.what}")
    if not changes:
        print("nothing to compare: no case of ours is in both, on one machine")
        return 2
    regressions = sum(change.is_regression for change in changes)
    print(f"{len(changes)} cases, {regressions} regressions past the spread")
    return 1 if regressions else 0
