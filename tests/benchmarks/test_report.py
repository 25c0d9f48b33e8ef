"""The report: one page with its pictures, right numbers, and a browser that has nothing to say."""

import json
import re
import shutil
import subprocess

import pytest

from benchmarks import compare, rows
from benchmarks.models import bench_vdt

pytest.importorskip("matplotlib")
from benchmarks import plots, report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PLACE = {
    "machine": "A <CPU>",
    "device": "cpu",
    "threads": 1,
    "torch": "2.13.0",
    "date": "2026-01-01",
    "copy_tb_per_s": 0.01,
    "matmul_fp32_tflop_per_s": 0.1,
    "matmul_bf16_tflop_per_s": 0.2,
}


def _kernel(rival, ms, room="attention", flops=10**9, commit="aa", **changes):
    row = {
        **PLACE,
        "case": f"{room}/causal N=1024 float32",
        "room": room,
        "rival": rival,
        "dtype": "float32",
        "commit": commit,
        "nbytes": 10**6,
        "flops": flops,
        "p20_ms": 0.9 * ms,
        "p50_ms": ms,
        "p80_ms": 1.1 * ms,
        "tflop_per_s": flops / ms / 1e9,
        "of_copy": 0.5,
        "match": True,
    }
    if rival != "fastvid":
        row |= {"ratio_p20": 1.4, "ratio_p50": 1.5, "ratio_p80": 1.6}
    return row | changes


def _duel(frames):
    sides = {
        f"{side}_{name}": value * factor
        for side, factor in (("fastvid", 1), ("eager", 1.25))
        for name, value in (("p20_ms", 9.0), ("p50_ms", 10.0), ("p80_ms", 11.0), ("peak_mib", 500))
    }
    ratios = {f"wall_ratio_p{percent}": 1.25 for percent in (20, 50, 80)}
    case = f"vdt/forward S/2 frames={frames} float32"
    sizes = {"job": "forward", "size": "S", "frames": frames, "dtype": "float32", "batch": 1}
    return {**PLACE, "case": case, "commit": "aa", "match": True, **sizes, **sides, **ratios}


@pytest.fixture
def found(tmp_path):
    measured = [
        *(_kernel(rival, ms) for rival, ms in (("fastvid", 2.0), ("eager", 3.0), ("sdpa", 3.1))),
        _kernel("fastvid", 1.5, commit="bb"),
        _kernel("flash-attn", 1.0, match=None, install="pip install flash-attn"),
        *(_kernel(rival, ms, "modulate", flops=0) for rival, ms in (("fastvid", 1), ("eager", 2))),
        _duel(8),
        _duel(16),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in measured))
    return rows.read(path)


def test_a_duel_of_models_is_read_as_two_rivals(found):
    model = [row for row in found if row["room"] == "vdt" and row["frames"] == 8]
    assert [(row["rival"], row["p50_ms"], row["peak_mib"]) for row in model] == [
        ("fastvid", 10.0, 500),
        ("eager", 12.5, 625),
    ]
    assert model[1]["ratio_p50"] == 1.25
    assert "ratio_p50" not in model[0]


def test_a_model_that_counts_its_work_says_its_share_of_the_matmul(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(_duel(8) | {"flops": 10**9}) + "\n")
    assert [row["of_matmul"] for row in rows.read(path)] == pytest.approx([1.0, 0.8])


def test_each_picture_is_drawn_where_there_is_something_to_show(found):
    def of(room):
        return [row for row in found if row["room"] == room and row["match"]]

    assert plots.roofline(of("attention"))
    assert not plots.roofline(of("modulate"))
    assert plots.shares(of("modulate"))
    assert not plots.shares(of("attention"))
    assert plots.scaling(of("vdt"), "frames")
    assert not plots.scaling(of("vdt"), "side")
    assert plots.history(of("attention"))
    assert not plots.history(of("vdt"))


def test_every_line_over_frames_says_all_that_tells_it_apart():
    spec = {"job": "forward", "size": "S", "side": 128, "batch": 1, "dtype": "float32"}
    spec |= {"steps": 10, "compile": False, "quick": False}
    settings = [{}, {"compile": True}, {"batch": 4}, {"dtype": "bfloat16"}, {"job": "step"}]
    settings += [{"job": "sample", "steps": 5}, {"job": "sample"}, {"quick": True}]
    specs = [spec | setting | {"frames": n} for setting in settings for n in (8, 16)]
    place = {"rival": "fastvid", "room": "vdt", "p50_ms": 1.0}
    measured = [{**PLACE, "case": bench_vdt.label(each), **each, **place} for each in specs]
    axes = plots.scaling(measured, "frames").axes[0]
    labels = [line.get_label() for line in axes.lines]
    assert len(set(labels)) == len(labels) == len(settings)
    assert all(len(line.get_xdata()) == 2 for line in axes.lines)
    assert "fastvid forward S/2 side=128 batch=4 float32" in labels
    assert "fastvid forward S/2 side=128 batch=1 float32 compiled" in labels
    assert axes.get_legend()


def test_the_bars_are_the_ratios(found):
    axes = plots.versus([row for row in found if row["room"] == "vdt"]).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [1.25, 1.25]


def test_the_history_is_relative_to_the_first_commit(found):
    axes = plots.history([row for row in found if row["room"] == "attention"]).axes[0]
    assert list(axes.lines[0].get_ydata()) == [1.0, 0.75]


def test_the_history_goes_from_the_oldest_commit_to_the_newest():
    """Also where the first case was not measured at every one of them."""
    measured = [("a", "aa"), ("b", "aa"), ("b", "bb"), ("a", "cc"), ("b", "cc")]
    axes = plots.history(
        [_kernel("fastvid", 1.0, commit=commit, case=f"room/{case}") for case, commit in measured]
    ).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["aa", "bb", "cc"]
    assert [list(line.get_xdata()) for line in axes.lines[:2]] == [[0, 2], [0, 1, 2]]


def test_no_picture_needs_colour(found):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    attention, model = (
        [row for row in found if row["room"] == room and row.get("match")]
        for room in ("attention", "vdt")
    )
    drawn = [draw(attention) for draw in (plots.versus, plots.roofline, plots.history)]
    for figure in [*drawn, plots.scaling(model, "frames")]:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = bytes(canvas.buffer_rgba())
        assert pixels[0::4] == pixels[1::4] == pixels[2::4]
        assert min(pixels) < 40  # something was drawn


def test_the_page_holds_its_pictures_and_writes_them_beside_itself(found, tmp_path):
    page = report.build(found, tmp_path / "report")
    text = page.read_text()
    pictures = sorted(tmp_path.glob("report/*.png"))
    assert text.count("<img ") == len(pictures) == 3 + 2 + 2  # attention, modulate, vdt
    assert all(path.name in text for path in pictures)
    assert not re.search(r'(src|href)="(?!data:)', text)  # opens without a network


def test_the_page_says_what_is_missing_and_escapes_names(found, tmp_path):
    text = report.build(found, tmp_path / "report").read_text()
    assert "pip install flash-attn" in text
    assert "A &lt;CPU&gt;" in text
    assert "A <CPU>" not in text
    assert "1.5" in text
    assert "6.05" in text


def test_the_rows_of_a_run_on_a_gpu_are_shown(tmp_path):
    """Its tests, a case that failed as a whole, a model: they have fewer columns, or others."""
    failed = {**PLACE, "case": "modulate/x", "room": "modulate", "rival": "fastvid", "failed": "E"}
    run = [{"case": "pytest -m gpu", "rival": "tests", "match": True}, failed, _duel(8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in run))
    found = rows.read(path)
    assert [row["rival"] for row in found] == ["fastvid", "fastvid", "eager"]
    assert "modulate/x" in report.build(found, tmp_path / "report").read_text()
    assert [change.verdict for change in compare.compare(found, found)] == ["same"]


def test_no_results_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one result"):
        report.build([], tmp_path)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_every_picture_and_reports_no_error(found, tmp_path):
    page = report.build(found, tmp_path / "report")
    # The same page with one question more: how wide is each picture, once loaded?
    asked = tmp_path / "asked.html"
    script = (
        "<script>onload = () => { document.title = "
        "'widths ' + [...document.images].map(i => i.naturalWidth).join(' ') }</script></body>"
    )
    asked.write_text(page.read_text().replace("</body>", script))
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
    options += ("--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}")
    command = [CHROMIUM, *options, "--virtual-time-budget=5000", "--dump-dom", asked.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    widths = re.search(r"<title>widths ([\d ]+)</title>", done.stdout)
    assert widths, done.stdout[:500]
    assert len(widths[1].split()) == done.stdout.count("<img ")
    assert all(int(width) > 100 for width in widths[1].split())
    assert "CONSOLE" not in done.stderr
