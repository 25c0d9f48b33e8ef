"""The ablation of identity attention: two runs that differ by it alone, one plot."""

import json
from dataclasses import asdict

import pytest

pytest.importorskip("av")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from benchmarks.models import ablate_mardini
from fastvid.data.synthetic import make_motion_clips


def test_the_runs_differ_by_identity_alone(tmp_path):
    one, other = (
        asdict(ablate_mardini.ablated(identity, "clips", 5, tmp_path))
        for identity in ("self_token", "none")
    )
    for part in ("planner", "generator"):
        assert one["model"][part].pop("identity") == "self_token"
        assert other["model"][part].pop("identity") == "none"
    assert one == other
    assert one["run"]["init"] == ""


def test_both_losses_are_drawn(tmp_path, capsys):
    make_motion_clips(tmp_path / "clips", clips=12, frames=12, size=32)
    options = ["--data", str(tmp_path / "clips"), "--steps", "1", "--out", str(tmp_path / "out")]
    assert ablate_mardini.main(options) == 0
    table = json.loads((tmp_path / "out" / "identity.json").read_text())
    assert set(table) == {"identity attention", "without"}
    assert all(list(curve) == ["1.0"] for curve in table.values())
    assert (tmp_path / "out" / "identity.png").stat().st_size > 1000
    assert capsys.readouterr().out.count("after 1 steps") == 2
