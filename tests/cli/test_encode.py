"""`fastvid encode`: latents written once, the same every time, and trained on."""

import shutil

import pytest
import torch

from fastvid.cli import main
from fastvid.data.latents import LatentDataset

pytest.importorskip("jsonargparse")
pytest.importorskip("tqdm")
pytest.importorskip("av")

from fastvid.data.synthetic import make_motion_clips
from fastvid.data.video import read_clip, write_mp4
from fastvid.training import encode


@pytest.fixture
def command(tmp_path):
    folder = tmp_path / "motion"
    make_motion_clips(folder, clips=6, frames=9, size=16)
    options = {
        "data.train": str(folder),
        "data.frames": "4",
        "data.size": "[16, 16]",
        "data.validation_share": "0.3",
        "model.frames": "4",
        "model.height": "4",
        "model.width": "4",
        "model.dim": "16",
        "model.heads": "2",
        "model.depth": "1",
        "optim.batch": "2",
    }
    return ["vdt-demo", *(word for key, value in options.items() for word in (f"--{key}", value))]


def test_clips_are_encoded_once_and_trained_on(command, tmp_path, capsys):
    out = tmp_path / "latents"
    assert main(["encode", *command, "--out", str(out)]) == 0
    train, held_out = LatentDataset(out / "train"), LatentDataset(out / "validation")
    assert len(train) + len(held_out) == 12  # two clips of 4 frames in each file of 9
    assert f"{out}/train: {len(train)} clips" in capsys.readouterr().out
    assert train[0]["latents"].shape == (48, 4, 4, 4)
    assert {path.name for path in out.iterdir()} == {"train", "validation"}
    assert main(["encode", *command, "--out", str(out)]) == 1
    assert "exists" in capsys.readouterr().err

    options = {
        "data.kind": "latents",
        "data.train": str(out / "train"),
        "data.validation": str(out / "validation"),
        "run.folder": str(tmp_path / "run"),
        "run.steps": "2",
    }
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    assert main(["train", *command, *words]) == 0
    words += ["--codec.factor", "2", "--model.channels", "12", "--model.height", "8"]
    words += ["--model.width", "8", "--run.folder", str(tmp_path / "other")]
    assert main(["train", *command, *words]) == 1
    assert "was encoded with codec" in capsys.readouterr().err


def test_interrupted_encode_goes_on_and_writes_the_same(command, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_PART", 2)
    assert main(["encode", *command, "--out", str(tmp_path / "whole")]) == 0
    original, calls = encode.to_latents, []

    def fail_later(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(encode, "to_latents", fail_later)
    cut = ["encode", *command, "--out", str(tmp_path / "cut")]
    assert main(cut) == 130
    assert not (tmp_path / "cut" / "train").exists()
    calls.clear()
    monkeypatch.setattr(encode, "to_latents", lambda *args: calls.append(args) or original(*args))
    assert main(cut) == 0
    whole, again = (
        LatentDataset(tmp_path / "whole" / "train"),
        LatentDataset(tmp_path / "cut/train"),
    )
    validation = LatentDataset(tmp_path / "cut" / "validation")
    assert len(calls) == -(-len(whole) // 2) - 2 + -(-len(validation) // 2)  # two parts were there
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one["latents"], other["latents"])
        assert (one["path"], one["start"]) == (other["path"], other["start"])


def test_bad_and_short_files_are_skipped_and_named(command, tmp_path, capsys):
    bad = tmp_path / "motion" / "clip-99999.mp4"
    good = sorted((tmp_path / "motion").glob("*.mp4"))
    shutil.copy(good[0], bad)
    bad.write_bytes(good[0].read_bytes()[:200])
    short = tmp_path / "motion" / "clip-99998.mp4"
    write_mp4(short, read_clip(good[0], 0, 3), 8)
    assert main(["encode", *command, "--out", str(tmp_path / "latents")]) == 0
    captured = capsys.readouterr()
    assert f"bad: {bad}" in captured.err
    assert f"too short: {short}: 3 frames" in captured.err
    assert "1 bad" in captured.out
    assert "1 too short" in captured.out
    sets = [LatentDataset(tmp_path / "latents" / name) for name in ("train", "validation")]
    assert sum(map(len, sets)) == 12
