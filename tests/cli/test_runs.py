"""`fastvid runs`: a table that needs nothing loaded."""

import json
from dataclasses import replace

from fastvid.cli import main
from fastvid.training.config import write_config
from fastvid.training.interrupt import locked
from fastvid.training.recipes import RECIPES


def make_run(folder, steps, lines):
    folder.mkdir(parents=True)
    config = RECIPES["vdt-demo"]()
    write_config(replace(config, run=replace(config.run, steps=steps)), folder / "config.yaml")
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_table_of_runs(tmp_path, capsys):
    lines = [
        {"step": 10, "kind": "train", "loss": 0.5},
        {"step": 10, "kind": "validation", "loss": 0.25},
        {"step": 20, "kind": "train", "loss": 0.125},
        {"step": 20, "kind": "validation", "loss": 0.375},
    ]
    make_run(tmp_path / "a", 20, lines)
    make_run(tmp_path / "deep" / "b", 50, lines[:1])
    make_run(tmp_path / "c", 50, [])
    (tmp_path / "a" / "model" / "best").mkdir(parents=True)
    (tmp_path / "a" / "model" / "best" / "config.yaml").write_text("no run of its own")
    with (tmp_path / "a" / "log.jsonl").open("a") as log:
        log.write('{"step": 30, "ki')  # cut short by a crash
    with locked(tmp_path / "c"):
        assert main(["runs", str(tmp_path)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[1][:6] == ["a", "finished", "20/20", "0.125", "0.375", "10"]
    assert table[2][:6] == ["c", "training", "0/50", "-", "-", "-"]
    assert table[3][:6] == ["deep/b", "stopped", "10/50", "0.5", "-", "-"]
    assert len(table) == 4


def test_empty_missing_and_damaged_folders(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 0
    assert "no runs" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "nowhere")]) == 1
    assert "no folder" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("optim: {typo: 1}")
    assert main(["runs", str(tmp_path)]) == 1
    assert "optim.typo" in capsys.readouterr().err
