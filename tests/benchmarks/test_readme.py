"""The measured sections of the READMEs are those of the committed rows."""

import pytest

from benchmarks import readme, rows
from benchmarks.machine import ROOT

pytest.importorskip("matplotlib")

SECTIONS = readme.sections(rows.read(rows.RESULTS))
PLACE = {"machine": "A CPU", "device": "cpu", "threads": 1, "compiled": True}
PLACE |= {"torch": "2.13.0", "date": "2026-01-01T10:00:00Z", "commit": "aa"}
PAGE = f"before\n{readme.MARKS[0]}\nold\n{readme.MARKS[1]}\nafter\n"


def row(rival="fastvid", ratio=1.0, dtype="float32", N=8, **changes):
    times = {"p50_ms": 2.0, "ratio_p20": ratio, "ratio_p50": ratio, "ratio_p80": ratio}
    case = {"case": f"toy/forward, known B=1 N={N} {dtype}", "room": "toy", "dtype": dtype}
    return {**PLACE, **case, "name": "forward, known", "rival": rival, "match": True} | (
        times | changes
    )


def duel(model="vdt", **changes):
    sides = [
        {"rival": "fastvid", "p50_ms": 10.0, "peak_ratio": 0.8},
        {"rival": "eager", "p50_ms": 12.5, "ratio_p20": 1.2, "ratio_p50": 1.25, "ratio_p80": 1.3},
    ]
    case = {"case": f"{model}/forward S/2 frames=8", "room": model, "match": True}
    return [{**PLACE, **case, **side, **changes} for side in sides]


@pytest.mark.parametrize("path", SECTIONS, ids=lambda path: path.parent.name)
def test_the_section_is_that_of_the_committed_results(path):
    renew = "python -m benchmarks report --readme"
    assert readme.shown(path.read_text()) == SECTIONS[path], renew


def test_every_room_has_a_section():
    rooms = {path.parent.name for path in (ROOT / "kernels").glob("*/op.py")}
    assert rooms == {path.parent.name for path in SECTIONS} - {ROOT.name}


def test_a_line_up_is_a_line_and_what_repeats_is_left_out():
    found = [row(), row("eager", 1.5), row("other", 0.9, match=False), row("flash", failed="no")]
    del found[-1]["ratio_p50"]
    found += [row(dtype="bfloat16", p50_ms=1234.5), row("eager", 2.0, "bfloat16"), row(N=16)]
    found += [row("absent", install="pip install absent")]
    del found[-1]["ratio_p50"]
    says, _, *table = readme.of_room("toy", found).splitlines()
    assert says.startswith("A CPU, one thread, torch 2.13.0, 2026-01-01, commit aa; `python")
    assert "--room toy --threads 1 --save`" in says
    assert "did not match" in says
    assert table == [
        "| case | B, N | dtype | fastvid, ms | eager | other |",
        "| --- | --- | --- | --- | --- | --- |",
        "| forward, known | 1, 8 | fp32 | 2 | 1.50 | 0.90\\* |",
        "|  |  | bf16 | 1234 | 2.00 | - |",
        "| forward, known | 1, 16 | fp32 | 2 | - | - |",
    ]
    assert "did not match" not in readme.of_room("toy", found[:2])


def test_a_rival_that_fails_in_some_cases_says_so():
    found = [row(), row("flash", 1.1), row(N=16), row("flash", failed="RuntimeError: no", N=16)]
    del found[-1]["ratio_p50"]
    assert readme.of_room("toy", found).splitlines()[-1].endswith("| 2 | fails |")


def test_what_of_ours_does_not_match_is_no_result():
    found = [row(), row("eager", 1.5), row(N=16, match=False), row("eager", 9.0, N=16)]
    assert "16" not in readme.of_room("toy", found).partition("| --- |")[2]


def test_a_room_shows_the_last_rows_of_every_machine_on_one_core():
    gpu = {"machine": "A GPU", "device": "cuda", "threads": 16}
    found = [row(p50_ms=9.0), row(p50_ms=3.0), row(p50_ms=7.0, threads=2), row(**gpu)]
    first, second = readme.of_room("toy", found).split("\n\nA GPU")
    assert first.endswith("| 3 |")
    assert second.endswith("| 2 |")
    assert "--threads" not in second
    assert "7" not in first.splitlines()[-1]
    assert readme.of_room("other", found).startswith("Not measured yet: `python -m benchmarks")


def test_models_show_one_core_of_a_cpu_only():
    assert readme.of_models(duel()).splitlines()[2:] == [
        "| vdt/forward S/2 frames=8 | 0.01 s | 0.0125 s | 1.25x | 0.80 |"
    ]
    for changes in ({"threads": 2}, {"device": "cuda"}, {"match": False}, {"model": "room"}):
        assert len(readme.of_models(duel(**changes)).splitlines()) == 2


def test_sections_are_renewed_between_their_marks(tmp_path):
    pages = [tmp_path / "README.md", tmp_path / "kernels" / "toy" / "README.md"]
    for page in pages:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(PAGE)
    found = [*duel(), row()]
    for _ in range(2):
        readme.renew(found, tmp_path / "models.png", tmp_path)
        for page, section in zip(
            pages, (readme.of_models(found), readme.of_room("toy", found)), strict=True
        ):
            assert page.read_text() == PAGE.replace("old", section)
    assert (tmp_path / "models.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="a model beside its rival"):
        readme.renew([row()], tmp_path / "models.png", tmp_path)
    with pytest.raises(ValueError, match="not found"):
        readme.shown("a page without marks")
