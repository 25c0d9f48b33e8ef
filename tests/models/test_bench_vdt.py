"""The benchmark of VDT runs, agrees and writes its rows."""

import json

from benchmarks.models import bench_vdt


def test_quick_run(tmp_path, capsys):
    arguments = "--quick --size S --frames 2 --job backward --threads 1 --device cpu --out"
    assert bench_vdt.main([*arguments.split(), str(tmp_path / "rows.jsonl")]) == 0
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["match"]
    assert row["rounds"] == 2
    assert row["fastvid_peak_mib"] > row["fastvid_baseline_mib"] > 0
    assert row["wall_ratio_p20"] <= row["wall_ratio_p50"] <= row["wall_ratio_p80"]
    assert "vdt/backward S/2 frames=2 float32" in capsys.readouterr().out
