"""The measured sections of the READMEs: `python -m benchmarks report --readme`.

A README with the two marks has a section between them that nobody writes: in the project's the
models against plain PyTorch, in a room's its cases against their rivals, both from result files.
"""

from collections import defaultdict
from pathlib import Path

from benchmarks import plots, rows, run_models
from benchmarks.harness import Row
from benchmarks.machine import ROOT

MARKS = ("<!-- made by python -m benchmarks report --readme -->", "<!-- end -->")
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def sections(found: list[Row], root: Path = ROOT) -> dict[Path, str]:
    """What stands between the marks of every README."""
    kernels = sorted((root / "kernels").glob("*/README.md"))
    made = {root / "README.md": of_models(found)}
    return made | {path: of_room(path.parent.name, found) for path in kernels}


def shown(page: str) -> str:
    """What stands between the marks of a page now.

    Raises:
        ValueError: it has no marks.
    """
    begin, end = _between(page)
    return page[begin:end].strip("\n")


def renew(found: list[Row], picture: Path, root: Path = ROOT) -> None:
    """Write every section anew, and the picture that stands before that of the project."""
    figure = plots.versus([row for row in _duels(found) if row.get("match")])
    if figure is None:
        raise ValueError("found must hold a model beside its rival, got none")
    figure.savefig(picture, dpi=130)
    for path, section in sections(found, root).items():
        page = path.read_text()
        begin, end = _between(page)
        path.write_text(f"{page[:begin]}\n{section}\n{page[end:]}")


def of_models(found: list[Row]) -> str:
    """The duels of models on one CPU core, as a Markdown table."""
    duels: dict[tuple, dict[str, Row]] = defaultdict(dict)
    for row in _duels(found):
        if row["device"] == "cpu" and row.get("match"):
            duels[row["case"], row["machine"]][row["rival"]] = row
    lines = []
    for (case, *_), sides in duels.items():
        ours, theirs = sides["fastvid"], sides["eager"]
        seconds = " | ".join(f"{side['p50_ms'] / 1e3:.3g} s" for side in (ours, theirs))
        peak = f"{ours['peak_ratio']:.2f}" if "peak_ratio" in ours else ""
        lines.append(f"| {case} | {seconds} | {theirs['ratio_p50']:.2f}x | {peak} |")
    head = ["| | fastvid | plain PyTorch | time | memory |", "|---|---|---|---|---|"]
    return "\n".join(head + sorted(lines))


def of_room(room: str, found: list[Row]) -> str:
    """The line-ups of a room, a table per machine: of CPUs those on one thread."""
    places: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows.latest(found):
        if row["room"] == room and (row["device"] != "cpu" or row["threads"] == 1):
            places[row["machine"], row["device"], row["compiled"]].append(row)
    command = f"python -m benchmarks kernels --room {room}"
    if not places:
        return f"Not measured yet: `{command} --threads 1 --save`."
    return "\n\n".join(_of_place(own, command) for own in places.values())


def _between(page: str) -> tuple[int, int]:
    begin, end = (page.index(mark) for mark in MARKS)
    return begin + len(MARKS[0]), end


def _duels(found: list[Row]) -> list[Row]:
    names = run_models.names()
    return [r for r in rows.latest(found) if r["room"] in names and r.get("threads") == 1]


def _of_place(own: list[Row], command: str) -> str:
    line_ups: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in own:
        line_ups[row["case"]][row["rival"]] = row
    line_ups = {case: each for case, each in line_ups.items() if each["fastvid"].get("match")}
    timed = [row for each in line_ups.values() for row in each.values() if "ratio_p50" in row]
    rivals = list(dict.fromkeys(row["rival"] for row in timed if row["rival"] != "fastvid"))
    sizes = {case: _sizes(each["fastvid"]) for case, each in line_ups.items()}
    axes = list(dict.fromkeys(axis for each in sizes.values() for axis in each))
    lines = [["case", ", ".join(axes), "dtype", "fastvid, ms", *rivals]]
    before = ["", ""]
    for case, line_up in line_ups.items():
        ours = line_up["fastvid"]
        names = [ours["name"], ", ".join(sizes[case].get(axis, "-") for axis in axes)]
        cells = [SHORT.get(ours["dtype"], ours["dtype"]), _three_digits(ours["p50_ms"])]
        cells += [_ratio(line_up.get(rival, {})) for rival in rivals]
        lines.append([*(["", ""] if names == before else names), *cells])
        before = names
    lines.insert(1, ["---"] * len(lines[0]))
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{_says(own, timed, command)}\n\n{table}"


def _says(own: list[Row], timed: list[Row], command: str) -> str:
    """Where and when, what the numbers are, and the command."""
    last, on_cpu = own[-1], own[-1]["device"] == "cpu"
    places = [last["machine"]] + ["one thread"] * on_cpu
    places += ["without the compiled part"] * (on_cpu and not last["compiled"])
    for column, name in (("torch", "torch "), ("date", ""), ("commit", "commit ")):
        values = dict.fromkeys(str(row[column])[: 10 if column == "date" else None] for row in own)
        places.append(name + " and ".join(values))
    stars = any(not row["match"] for row in timed)
    return (
        f"{', '.join(places)}; `{command}{' --threads 1' * on_cpu} --save`. Milliseconds of ours, "
        "then the time of each rival over ours, all medians of interleaved calls."
        + " \\* did not match: it rounds more than the budget allows, or computes something else."
        * stars
    )


def _sizes(row: Row) -> dict[str, str]:
    """`{"B": "1", "N": "1024"}` of `room/name B=1 N=1024 float32`."""
    text = row["case"].removeprefix(f"{row['room']}/{row['name']} ").removesuffix(row["dtype"])
    return dict(part.split("=") for part in text.split())


def _ratio(row: Row) -> str:
    if "ratio_p50" in row:
        return f"{row['ratio_p50']:.2f}" + "\\*" * (not row["match"])
    return "fails" if "failed" in row else "-"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
