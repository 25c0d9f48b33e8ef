"""The benchmark of Pyramid Flow runs, agrees and writes its rows."""

import json

import pytest
import torch

from benchmarks.models import bench_pyramid_flow as bench
from benchmarks.models import command
from fastvid.models.pyramid_columns import clip_sizes


@pytest.mark.parametrize("job", ["backward", "call 0"])
def test_quick_run(tmp_path, capsys, job):
    arguments = ["--quick", "--job", job, "--threads=1", "--device=cpu", "--out"]
    assert bench.main([*arguments, str(tmp_path / "rows.jsonl")]) == 0
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["match"]
    assert row["error"] > 0
    assert f"pyramid_flow/{job} float32 two blocks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("job", "tokens"),
    [("backward", [45, 135, 135, 585]), ("call 0", [120]), ("call 1", [210]), ("call 2", [615])],
)
def test_the_sizes_are_those_of_unit_7(job, tokens):
    columns = bench.columns_of({"job": job, "device": "cpu"}, torch.float32)
    sizes = (clip_sizes(column, bench.CONFIG.patch) for column in columns)
    assert [sum(t * h * w for t, h, w in its_sizes) for its_sizes in sizes] == tokens


def test_the_network_is_of_the_stated_size():
    with torch.device("meta"):
        model = bench.PyramidFlux(bench.CONFIG)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 20.54


def test_the_floor_and_the_match_decide(monkeypatch, capsys):
    row = {"match": True, "wall_ratio_p50": 1.2, "room": "pyramid_flow"}
    monkeypatch.setattr(bench, "measure", lambda *_, **__: row)
    monkeypatch.setattr(command, "line", str)
    arguments = ["--job=forward", "--threads=1", "--device=cpu", "--quick"]
    assert bench.main(arguments) == 0
    assert bench.main([*arguments, "--floor", "1.3"]) == 1
    row["match"] = False
    assert bench.main(arguments) == 1
