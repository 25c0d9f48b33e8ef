"""All results as one page that opens from disk: `python -m benchmarks report`.

Per machine and room a roofline or the share of a copy, bars against the rivals, time and memory
over frames and resolution, the history over commits; then the tables of the papers. The page holds
its pictures; the same pictures lie beside it as PNG files. `--readme` instead renews what is made
from results in the READMEs: the project's and those of the rooms.
"""

import argparse
import base64
import html
import io
import itertools
from pathlib import Path

from benchmarks import plots, readme, rows
from benchmarks.harness import Row
from benchmarks.machine import slug
from benchmarks.papers import tables

STYLE = """
body { font: 15px/1.5 Georgia, serif; color: #111; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { font-weight: normal; } h2 { border-bottom: 1px solid #111; }
table { border-collapse: collapse; font: 12px/1.4 ui-monospace, monospace; margin: 1rem 0; }
td, th { padding: .15rem .6rem; border-bottom: 1px solid #ccc; text-align: right; }
td:first-child, th:first-child, td:last-child { text-align: left; }
th { border-bottom: 1px solid #111; } img { max-width: 100%; } .bad { font-weight: bold; }
figure { margin: 1rem 0; } figcaption { font-size: 13px; } .scroll { overflow-x: auto; }
"""


def build(found: list[Row], out: Path) -> Path:
    """Write `report.html` and its pictures into `out`.

    Args:
        found: as `rows.read` gives them.
    Returns:
        The page.
    Raises:
        ValueError: there is no row.
    """
    if not found:
        raise ValueError("found must hold at least one result, got none")
    out.mkdir(parents=True, exist_ok=True)
    body = [f"<p>{len(found)} results. A ratio is the time of the rival over ours.</p>"]
    by_machine = itertools.groupby(sorted(found, key=_place), _place)
    for (machine, threads), own in by_machine:
        own = list(own)
        on = f", {threads} thread{'s' * (threads != 1)}" if own[0].get("device") == "cpu" else ""
        body.append(f"<h2>{html.escape(machine + on)}</h2>")
        body.append(f"<p>{html.escape(_versions(own))}</p>")
        for room, rows_of_room in itertools.groupby(sorted(own, key=_room), _room):
            body += _room_section(list(rows_of_room), out, f"{slug(machine)}-{threads}-{room}")
    body.append("<h2>The papers' tables</h2>")
    for name, table in tables.TABLES.items():
        made = table(rows.latest(found))
        body.append(f'<h3 id="{name}">{html.escape(made.title)}</h3>{_paper_table(made)}')
    page = out / "report.html"
    page.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fastvid: results</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body>'
        f"<h1>fastvid: what was measured</h1>{''.join(body)}</body></html>\n"
    )
    return page


def _room_section(own: list[Row], out: Path, stem: str) -> list[str]:
    last = rows.latest(own)
    shown = [row for row in last if row.get("match")]
    body = [f"<h3>{html.escape(own[0]['room'])}</h3>"]
    drawn = {title: draw(shown) for title, draw in plots.PICTURES.items()}
    drawn["Over commits"] = plots.history([row for row in own if row.get("match")])
    for title, figure in drawn.items():
        if figure is None:
            continue
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=130)
        name = f"{stem}-{slug(title)}.png"
        (out / name).write_bytes(data.getvalue())
        source = base64.b64encode(data.getvalue()).decode()
        caption = html.escape(title)
        body.append(
            f'<figure><img alt="{caption}" src="data:image/png;base64,{source}">'
            f"<figcaption>{caption} ({name})</figcaption></figure>"
        )
    return [*body, _rows_table(last)]


def _rows_table(own: list[Row]) -> str:
    head = ("case", "rival", "ms", "20 to 80 %", "rival / ours", "peak MiB", "state")
    lines = []
    for row in own:
        state = row.get("failed") or row.get("skipped") or row.get("install")
        state = state or ("matches" if row.get("match") else "DOES NOT MATCH")
        times = ("", "")
        if "p50_ms" in row:
            times = (f"{row['p50_ms']:.4g}", f"{row['p20_ms']:.4g} to {row['p80_ms']:.4g}")
        ratio = f"{row['ratio_p50']:.2f}x" if "ratio_p50" in row else ""
        peak = f"{row['peak_mib']:.0f}" if "peak_mib" in row else ""
        lines.append((row["case"], row["rival"], *times, ratio, peak, state))
    return _html_table(head, lines)


def _paper_table(table: tables.Table) -> str:
    sources = dict.fromkeys(line.source for line in table.lines if line.source)
    cited = "".join(f"<br>Source: {html.escape(source)}." for source in sources)
    return _html_table(tables.HEAD, table.cells()) + f"<p>{cited.removeprefix('<br>')}</p>"


def _html_table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    def row(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    text = row(head, "th") + "".join(row(line, "td") for line in lines)
    return f'<div class="scroll"><table>{text}</table></div>'


def _place(row: Row) -> tuple[str, int]:
    return row["machine"], row.get("threads") or 0


def _room(row: Row) -> str:
    return str(row["room"])


def _versions(own: list[Row]) -> str:
    names = ("torch", "triton", "python", "driver")
    parts = [
        f"{name} {', '.join(sorted({str(row[name]) for row in own if row.get(name)}))}"
        for name in names
        if any(row.get(name) for row in own)
    ]
    return "; ".join(
        [*parts, "measured " + " and ".join(sorted({row["date"][:10] for row in own}))]
    )


def main(argv: list[str]) -> int:
    """Write the page; say where it is."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="file or folder")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="folder to write")
    parser.add_argument("--readme", action="store_true", help="renew the READMEs instead")
    arguments = parser.parse_args(argv)
    found = rows.read(arguments.results)
    if arguments.readme:
        readme.renew(found, rows.RESULTS / "models.png")
    else:
        print(build(found, arguments.out))
    return 0
