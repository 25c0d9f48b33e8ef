"""The pictures of the report, in shades of grey, hatches and markers: they print as they look."""

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import Row

MARKERS = "osD^vP*X<>"
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo", "---")
OURS = "0.1"
THEIRS = ("0.85", "0.7", "0.55", "0.95", "0.4")


def versus(rows: list[Row]) -> Figure | None:
    """Bars: the time of every rival over ours, case by case. Right of the line we are faster."""
    ratios: dict[str, dict[str, tuple[float, float, float]]] = defaultdict(dict)
    for row in rows:
        if row["rival"] != "fastvid" and "ratio_p50" in row:
            key = tuple(row[f"ratio_p{percent}"] for percent in (20, 50, 80))
            ratios[_case(row)][row["rival"]] = key
    if not ratios:
        return None
    rivals = sorted({rival for found in ratios.values() for rival in found})
    height = 0.8 / len(rivals)
    figure, axes = _figure(8.0, 1.0 + 0.18 * len(ratios) * max(len(rivals), 2))
    for number, rival in enumerate(rivals):
        at = [i + (number + 0.5) * height - 0.4 for i, case in enumerate(ratios)]
        low, middle, high = zip(
            *(found.get(rival, (float("nan"),) * 3) for found in ratios.values()), strict=True
        )
        spread = [
            [m - a for m, a in zip(middle, low, strict=True)],
            [b - m for m, b in zip(middle, high, strict=True)],
        ]
        axes.barh(
            at,
            middle,
            height,
            xerr=spread,
            label=rival,
            color=THEIRS[number % len(THEIRS)],
            hatch=HATCHES[number % len(HATCHES)],
            edgecolor="black",
            error_kw={"elinewidth": 0.8, "capsize": 1.5},
        )
    axes.axvline(1, color="black", linewidth=1.2)
    axes.set_yticks(range(len(ratios)), list(ratios), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time of the rival / ours (bars: median; lines: 20 to 80 %)")
    axes.legend(fontsize=7)
    return figure


def roofline(rows: list[Row]) -> Figure | None:
    """FLOPs per byte against TFLOP/s, under the copy and the matmul measured in the same run."""
    points = [row for row in rows if row.get("flops") and row.get("nbytes") and "p50_ms" in row]
    points = [row for row in points if "copy_tb_per_s" in row]
    if not points:
        return None
    figure, axes = _figure(6.5, 4.0)
    intensities = [row["flops"] / row["nbytes"] for row in points]
    reach = [min(intensities) / 3, max(intensities) * 3]
    for kind, style in (("bf16", "-"), ("fp32", "--")):
        same = [row for row in points if (row["dtype"] == "float32") == (kind == "fp32")]
        if not same:
            continue
        copy = max(row["copy_tb_per_s"] for row in same)
        matmul = max(row[f"matmul_{kind}_tflop_per_s"] for row in same)
        reach[1] = max(reach[1], 2 * matmul / copy)
        corner = [reach[0], matmul / copy, reach[1]]
        limits = [min(copy * at, matmul) for at in corner]
        axes.plot(corner, limits, style, color="black", label=f"ceiling {kind}", linewidth=1)
    names = ["fastvid", *sorted({row["rival"] for row in points} - {"fastvid"})]
    for rival, marker in zip(names, itertools.cycle(MARKERS), strict=False):
        own = [row for row in points if row["rival"] == rival]
        axes.scatter(
            [row["flops"] / row["nbytes"] for row in own],
            [row["tflop_per_s"] for row in own],
            s=22,
            marker=marker,
            facecolors=OURS if rival == "fastvid" else "none",
            edgecolors="black",
            linewidths=0.8,
            label=rival,
        )
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per compulsory byte", ylabel="TFLOP/s")
    axes.legend(fontsize=7)
    return figure


def shares(rows: list[Row]) -> Figure | None:
    """For rooms that move bytes: every rival's share of the copy measured in the same run."""
    points = [row for row in rows if row.get("of_copy") and not row.get("flops")]
    if not points:
        return None
    cases = list(dict.fromkeys(_case(row) for row in points))
    figure, axes = _figure(8.0, 1.0 + 0.25 * len(cases))
    names = ["fastvid", *sorted({row["rival"] for row in points} - {"fastvid"})]
    for rival, marker in zip(names, itertools.cycle(MARKERS), strict=False):
        own = [row for row in points if row["rival"] == rival]
        axes.scatter(
            [100 * row["of_copy"] for row in own],
            [cases.index(_case(row)) for row in own],
            marker=marker,
            facecolors=OURS if rival == "fastvid" else "none",
            edgecolors="black",
            label=rival,
        )
    axes.axvline(100, color="black", linewidth=1)
    axes.set_xlim(left=0)
    axes.set_yticks(range(len(cases)), cases, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("compulsory bytes per second, % of a copy (caches may pass 100)")
    axes.legend(fontsize=7)
    return figure


def scaling(rows: list[Row], axis: str) -> Figure | None:
    """Time, and peak memory where it was measured, against `axis`: "frames" or "side"."""
    lines: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        if axis in row and "p50_ms" in row:
            setting = re.sub(rf" {axis}=\S+", "", _case(row))
            lines[row["rival"], setting].append(row)
    lines = {key: found for key, found in lines.items() if len({row[axis] for row in found}) > 1}
    if not lines:
        return None
    has_memory = any("peak_mib" in row for found in lines.values() for row in found)
    panels = [("p50_ms", "ms, median")] + [("peak_mib", "MiB at the peak")] * has_memory
    figure, _ = _figure(4.5 * len(panels), 4.0, len(panels))
    labels = sorted({label for _, label in lines})
    for axes, (column, unit) in zip(figure.axes, panels, strict=True):
        for (rival, label), found in sorted(lines.items()):
            marker = MARKERS[labels.index(label) % len(MARKERS)]
            points = sorted((row[axis], row[column]) for row in found if column in row)
            style = {"color": OURS} if rival == "fastvid" else {"color": "0.6", "linestyle": "--"}
            axes.plot(*zip(*points, strict=True), marker=marker, label=f"{rival} {label}", **style)
        axes.set(xlabel=axis, ylabel=unit, yscale="log")
    figure.axes[0].legend(fontsize=5)
    return figure


def history(rows: list[Row]) -> Figure | None:
    """Our time over the commits, each case over its first measurement.

    Args:
        rows: the oldest first.
    """
    times: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["rival"] == "fastvid" and "p50_ms" in row and row.get("commit"):
            times[_case(row)][row["commit"]] = row["p50_ms"]
    times = {case: found for case, found in times.items() if len(found) > 1}
    if not times:
        return None
    drawn = {commit for found in times.values() for commit in found}
    commits = [c for c in dict.fromkeys(row.get("commit") for row in rows) if c in drawn]
    figure, axes = _figure(7.0, 3.5)
    for (case, found), marker in zip(times.items(), itertools.cycle(MARKERS), strict=False):
        first = next(iter(found.values()))
        at = [commits.index(commit) for commit in found]
        relative = [time / first for time in found.values()]
        axes.plot(at, relative, marker=marker, color=OURS, linewidth=0.8, label=case)
    axes.set_xticks(range(len(commits)), commits, rotation=45, fontsize=7)
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.set_ylabel("time / first time")
    axes.legend(fontsize=5)
    return figure


PICTURES: dict[str, Callable[[list[Row]], Figure | None]] = {
    "Against the rivals": versus,
    "Roofline": roofline,
    "Share of a copy": shares,
    "Over frames": lambda rows: scaling(rows, "frames"),
    "Over resolution": lambda rows: scaling(rows, "side"),
}


def _case(row: Row) -> str:
    """The case without its room, which the heading names."""
    return str(row["case"].partition("/")[2])


def _figure(width: float, height: float, panels: int = 1) -> tuple[Figure, Any]:
    """A figure without pyplot, which would keep it alive."""
    figure = Figure((width, height), layout="constrained")
    made: Axes | Iterable[Axes] = figure.subplots(1, panels)
    return figure, made
