"""One function per paper: its rows, our analytic columns, our results."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.papers import memory, work
from benchmarks.papers.work import Work

Results = list[dict[str, Any]]  # the latest rows, as `benchmarks/rows.py` reads them
Cell = dict[str, Any]
PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "published.json").read_text())
A100 = PUBLISHED["devices"]["A100"]
NOT_MEASURED = "python -m benchmarks models mardini --paper, on a GPU"
HEAD = ("", "paper s", "GB", "% peak", "tokens", "TFLOP", "GB moved", "est. GB", "ours")
DDIM_STEPS = 10  # of the sampling rows


@dataclass(frozen=True)
class Line:
    """A row: what was published, what follows from the sizes, what we measured, as text."""

    name: str
    seconds: float | None  # published
    memory_gb: float | None  # published
    of_peak: float | None  # FLOPs / published seconds / the data sheet's peak
    tokens: int | None
    tflop: float | None
    moved_gb: float | None  # at least, by `work.py`
    estimate_gb: float | None  # by `memory.py`, of our implementation
    ours: tuple[str, ...]
    source: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    title: str
    lines: list[Line]

    def as_dicts(self) -> list[dict[str, Any]]:
        return [asdict(line) for line in self.lines]

    def cells(self) -> list[tuple[str, ...]]:
        """The lines as text, as wide as `HEAD`; further machines have lines of their own."""
        rows = []
        for line in self.lines:
            first, *others = line.ours or ("not measured",)
            of_peak = None if line.of_peak is None else 100 * line.of_peak
            numbers = (
                _number(line.seconds, 2),
                _number(line.memory_gb, 2),
                _number(of_peak, 0),
                _number(line.tokens, 0),
                _number(line.tflop, 3 if (line.tflop or 0) < 10 else 0),
                _number(line.moved_gb, 1),
                _number(line.estimate_gb, 1),
            )
            note = f" ({line.note})" if line.note else ""
            rows.append((line.name + note, *numbers, first))
            rows += [("",) * (len(HEAD) - 1) + (other,) for other in others]
        return rows

    def render(self) -> str:
        """The table for a terminal, its sources below it."""
        rows = [HEAD, *self.cells()]
        widths = [max(len(row[at]) for row in rows) for at in range(len(HEAD))]
        text = [self.title]
        for row in rows:
            left, *right, last = zip(row, widths, strict=True)
            cells = [left[0].ljust(left[1]), *(cell.rjust(width) for cell, width in right), last[0]]
            text.append("  " + "  ".join(cells).rstrip())
        sources = dict.fromkeys(line.source for line in self.lines if line.source)
        return "\n".join([*text, *(f"  Source: {source}." for source in sources)])


def mardini(results: Results) -> Table:
    """Table 3 of the paper (one A100 80 GB, DDIM with 25 steps) and the L/T-17 rows of Table 5."""
    lines = []
    for cell in PUBLISHED["mardini"]:
        options = {"temporal": cell["temporal"], "asymmetric": cell["asymmetric"]}
        sizes = (cell["size"], cell["frames"], cell["side"])
        side = cell["side"] // 8
        config = work.MARDINI_SIZES[cell["size"]]
        planner = replace(config.planner, side=32 if cell["asymmetric"] else side)
        estimate = memory.mardini(replace(config, planner=planner), cell["frames"], side)
        line = _line(cell, work.mardini(*sizes, **options), estimate, results, NOT_MEASURED)
        lines.append(line)
    title = "MarDini: seconds per video, DDIM 25, bf16, planner once (paper: one A100 80 GB)"
    return Table(title, lines + _reduced_mardini(results))


def _reduced_mardini(results: Results) -> list[Line]:
    """Videos of smaller models, such as a CPU can make: what was counted and measured of them."""
    rows = {
        row["case"]: row
        for row in results
        if row["room"] == "mardini" and row.get("job") == "sample" and "flops" in row
        if row["size"] not in work.MARDINI_SIZES or row.get("quick")
    }
    lines = []
    for case, row in rows.items():
        cell = {"key": case, "seconds": None, "where": {"case": case}, "note": "reduced size"}
        line = _line(cell, Work(row["tokens"], row["flops"]), None, results, "")
        if line.ours:
            lines.append(replace(line, moved_gb=None))
    return lines


def pyramid_flow(results: Results) -> Table:
    """Seconds and tokens of the paper and its repository, 20 / 10 steps a stage, guidance on."""
    lines = []
    for cell in PUBLISHED["pyramid_flow"]:
        video = (cell["height"], cell["width"], cell["frames"])
        done = work.pyramid_flow(cell["model"], *video)
        full, *calls = work.pyramid_flow_tokens(*video)
        estimate = memory.pyramid_flow(cell["model"], calls[-1])
        line = _line(cell, done, estimate, results, "")
        says = f"{full:,} tokens in full; calls of the last unit {calls[0]:,}, {calls[1]:,}"
        says += f", {calls[2]:,}"
        if "full_tokens" in cell:
            says += f"; paper: {cell['full_tokens']:,} and at most {cell['longest_call']:,}"
        lines.append(replace(line, note="; ".join(filter(None, (line.note, says)))))
    title = (
        "Pyramid Flow: seconds per video, bf16, 20 / 10 steps a stage (paper: A100, where it says)"
    )
    return Table(title, lines)


def pyramid_flow_training(results: Results) -> Table:
    """A100-hours of Table 4; nothing of ours is comparable but by FLOPs of a step."""
    lines = [
        replace(
            _line({**cell, "seconds": None}, None, None, results, ""),
            note=f"{cell['what']}: {cell['gpu_hours']:,} A100-hours on {cell['gpus']}",
            ours=("-",),
        )
        for cell in PUBLISHED["pyramid_flow_training"]
    ]
    return Table("Pyramid Flow: training", lines)


def vdt(results: Results) -> Table:
    """S/2 and L/2; the paper publishes no seconds, one report of a training bounds the memory."""
    lines = []
    for size, side, frames in itertools.product("SL", (128, 256), (8, 16, 30)):
        config = replace(work.VDT_SIZES[size], frames=frames, height=side // 8, width=side // 8)
        forward, held = work.vdt(config), memory.vdt_forward(config)
        for job, name, passes, estimate in (
            ("step", "training step", 3, memory.vdt_training(config)),
            ("forward", "denoising step", 1, held),
            ("sample", f"sampling in {DDIM_STEPS} steps", DDIM_STEPS, held),
        ):
            cell = {
                "key": f"vdt/{size} {name} {frames} frames {side}x{side}",
                "seconds": None,
                "where": {"room": "vdt", "size": size, "job": job, "frames": frames, "side": side},
            }
            if job == "sample":
                cell["where"]["steps"] = DDIM_STEPS
            lines.append(_line(cell, forward.times(passes), estimate, results, ""))
    for cell in PUBLISHED["vdt"]:
        config = replace(work.VDT_SIZES[cell["size"]], frames=cell["frames"])
        done = work.vdt(config, cell["batch"]).times(3)
        estimate = memory.vdt_training(config, cell["batch"])
        sizes = {name: cell[name] for name in ("size", "job", "frames", "side", "batch")}
        cell = {**cell, "where": {"room": "vdt", **sizes}}
        lines.append(_line(cell, done, estimate, results, ""))
    title = "VDT: seconds per clip, float32 unless said; paper GB: a batch that is told to fit"
    return Table(title, lines)


TABLES: dict[str, Callable[[Results], Table]] = {
    "mardini": mardini,
    "pyramid_flow": pyramid_flow,
    "pyramid_flow_training": pyramid_flow_training,
    "vdt": vdt,
}


def _line(
    cell: Cell, done: Work | None, estimate: int | None, results: Results, absent: str
) -> Line:
    seconds = cell["seconds"]
    if "seconds_per_generated_frame" in cell:
        seconds = cell["seconds_per_generated_frame"] * (cell["frames"] - 1)
    ours = tuple(_ours(cell, done, results))
    peak = A100["bf16_tflop_per_s"] * 1e12
    on_an_a100 = cell.get("device", "A100") == "A100"
    return Line(
        name=cell["key"].partition("/")[2],
        seconds=seconds,
        memory_gb=cell.get("memory_gb"),
        of_peak=done.flops / seconds / peak if done and seconds and on_an_a100 else None,
        tokens=done.tokens if done else None,
        tflop=done.flops / 1e12 if done else None,
        moved_gb=done.nbytes / 1e9 if done else None,
        estimate_gb=None if estimate is None else estimate / 1e9,
        ours=ours or ((absent,) if absent else ()),
        source=f"{cell['source']}, {cell['place']}" if "source" in cell else "",
        note=cell.get("note", ""),
    )


def _ours(cell: Cell, done: Work | None, results: Results) -> Iterator[str]:
    """The results that belong to the row, one text each; seconds and FLOPs are of one clip."""
    wanted = cell.get("where", {"paper": cell["key"]}) | {"rival": "fastvid", "match": True}
    for row in results:
        if any(row.get(name) != value for name, value in wanted.items()):
            continue
        ceiling = row.get(f"matmul_{'fp32' if row['dtype'] == 'float32' else 'bf16'}_tflop_per_s")
        if done is None or ceiling is None:
            continue  # seconds alone say nothing
        seconds = row["p50_ms"] / 1e3 / row.get("batch", 1)
        rate = done.flops / cell.get("batch", 1) / seconds
        parts = [f"{seconds:.3g} s", f"{100 * rate / ceiling / 1e12:.0f} % of its matmul"]
        if "wall_ratio_p50" in row:
            parts.append(f"{row['wall_ratio_p50']:.2f} x plain PyTorch")
        if "peak_mib" in row:
            parts.append(f"{row['peak_mib'] * 2**20 / 1e9:.1f} GB")
        where = row["machine"]
        if row["device"] == "cpu":
            where += f", {row['threads']} thread{'s' * (row['threads'] != 1)}"
        marks = [row["dtype"]] + ["compiled"] * bool(row.get("compile"))
        marks += [f"batch {row['batch']}"] * (row.get("batch", 1) > 1)
        marks += ["reduced depth"] * bool(row.get("quick"))
        yield f"{', '.join(parts)} ({where}; {', '.join(marks)})"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
