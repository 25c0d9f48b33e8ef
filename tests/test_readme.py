"""The code in README.md runs as it stands, its demo's numbers are a run's, links lead somewhere."""

import json
import re
from pathlib import Path

import pytest
import torch

from fastvid.cli.demo import compare

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
DEMO = ROOT / "benchmarks/results/cpu-x86-64-2-cores/demo.json"
DEMO_COLUMNS = ("one_step_mean", "sample", "linear_blend", "copy_nearest")
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted([*ROOT.rglob("README.md"), ROOT / "CONTRIBUTING.md"])
    if not {"build", "node_modules"} & set(path.relative_to(ROOT).parts)
    and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
]


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.split("import ")[-1].split("\n")[0])
def test_example_runs(code):
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})


def demo_faults(page, result):
    """Where the page's table is not what `fastvid demo` wrote, in PSNR to two places."""
    if f" {result['steps']} " not in page.partition("| task |")[0]:
        yield f"a run of {result['steps']} steps is not told of"
    for task, scores in result["scores"].items():
        (line,) = re.findall(rf"^\| {task}: .*\|$", page, re.M)
        cells = [cell.strip(" *") for cell in line.split("|")[2:-1]]
        for row, cell in zip(DEMO_COLUMNS, cells, strict=True):
            value = f"{scores['rows'][row]['psnr']:.2f}"
            if cell != value and (task, row, cell) != ("predict", "linear_blend", "-"):
                yield f"{task}, {row}: {cell} is not {value}"


@pytest.mark.skipif(not DEMO.is_file(), reason="no run of the demo is kept yet")
def test_the_demo_won_and_the_page_says_what_it_measured():
    result = json.loads(DEMO.read_text("utf-8"))
    verdicts = compare(result["scores"])
    assert [verdict.text for verdict in verdicts if not verdict.won] == []
    assert [verdict.text for verdict in verdicts] == result["verdicts"]
    assert list(demo_faults(README, result)) == []


def test_a_changed_number_on_the_page_is_found():
    page = """A run of 30 steps gave
| task | mean |
| interpolate: some given | **20.38** | 18.81 | 19.76 | 18.88 |
| predict: some given | **20.08** | 18.01 | - | 17.69 |
"""
    measured = {
        "interpolate": (20.38, 18.81, 19.76, 18.88),
        "predict": (20.08, 18.01, 17.69, 17.69),
    }
    scores = {
        task: {"rows": {row: {"psnr": psnr} for row, psnr in zip(DEMO_COLUMNS, row, strict=True)}}
        for task, row in measured.items()
    }
    result = {"steps": 30, "scores": scores}
    assert list(demo_faults(page, result)) == []
    assert len(list(demo_faults(page.replace("20.38", "20.39"), result))) == 1
    assert len(list(demo_faults(page.replace("- |", "17.70 |"), result))) == 1
    assert len(list(demo_faults(page, result | {"steps": 20}))) == 1


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!http|#)([^)#]+)", (ROOT / page).read_text("utf-8"))
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_named_tests_exist(page):
    named = set(re.findall(r"`(test_\w+)`", (ROOT / page).read_text("utf-8")))
    sources = [path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    assert {n for n in named if not any(f"def {n}(" in source for source in sources)} == set()


def test_every_page_is_looked_at():
    wanted = {"README.md", "CONTRIBUTING.md", "csrc/README.md", "kernels/modulate/README.md"}
    assert wanted | {"fastvid/training/README.md", "benchmarks/results/README.md"} <= set(PAGES)
