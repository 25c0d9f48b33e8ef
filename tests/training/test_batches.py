"""The sets that a config names: what is held out, and what is said of broken sources."""

from dataclasses import replace

import pytest

from fastvid.training.batches import open_sets
from fastvid.training.codec import PixelCodec
from fastvid.training.config import DataConfig
from fastvid.training.interrupt import Interrupted
from fastvid.training.loop import train

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def sets(tmp_path):
    """`sets(kind="frames", ...)` opens tmp_path / "data"; `(training paths, held-out paths)`."""

    def make(**values):
        values = {"train": str(tmp_path / "data"), "frames": 2, "size": (8, 8)} | values
        both = open_sets(DataConfig(**values), PixelCodec(4), 0, fixed=True)
        return [[item["path"] for item in part] if part else [] for part in both]

    return make


def write_frames(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)


def folders_of(paths):
    return {path.rsplit("/", 1)[0] for path in paths}


def test_folders_of_frames_are_held_out_by_seed(sets, tmp_path):
    for i in range(12):
        write_frames(tmp_path / "data" / f"scene.{i}", [f"{k}.png" for k in range(5)])
    chosen = set()
    for seed in range(4):
        train, held = sets(kind="frames", validation_share=0.3, split_seed=seed)
        assert len(train) + len(held) == 24  # two clips side by side in each
        assert len(folders_of(train)) + len(folders_of(held)) == 12
        assert held
        assert train
        chosen.add(frozenset(held))
    assert len(chosen) == 4
    before = sets(kind="frames", validation_share=0.3)[1]
    write_frames(tmp_path / "data" / "scene.99", ["0.png", "1.png"])
    after = sets(kind="frames", validation_share=0.3)[1]
    assert set(before) <= set(after)  # what was held out is never trained on later


def test_clips_of_one_drive_stay_together(sets, tmp_path):
    for drive in range(6):
        names = [f"ulm_{drive:06d}_{k:06d}_leftImg8bit.png" for k in range(60)]
        write_frames(tmp_path / "data" / "ulm", names)
    train, held = sets(kind="cityscapes", validation_share=0.4, frames=16)
    assert len(train) + len(held) == 12
    drives = [{path.rsplit("_", 2)[0] for path in part} for part in (train, held)]
    assert len(drives[0]) + len(drives[1]) == 6
    assert min(map(len, drives)) > 0


def test_video_files_are_held_out_by_split_seed(sets, clips):
    chosen = {
        tuple(
            sets(train=str(clips), validation_share=0.3, size=(16, 16), split_seed=seed, frames=8)[
                1
            ]
        )
        for seed in range(4)
    }
    assert len(chosen) > 1


def test_a_single_source_is_trained_on_and_the_log_says_so(sets, tmp_path, caplog):
    write_frames(tmp_path / "data", ["0.png", "1.png"])
    train, held = sets(kind="frames", validation_share=0.3)
    assert (len(train), held) == (1, [])
    assert "validation_share holds nothing out" in caplog.text
    caplog.clear()
    sets(kind="frames", validation_share=0.0)
    assert caplog.text == ""


def test_a_folder_of_its_own_leaves_the_training_set_whole(sets, tmp_path):
    for name in ("data/a", "data/b", "held/c"):
        write_frames(tmp_path / name, ["0.png", "1.png"])
    train, held = sets(kind="frames", validation=str(tmp_path / "held"))
    assert folders_of(train) == {f"{tmp_path}/data/a", f"{tmp_path}/data/b"}
    assert folders_of(held) == {f"{tmp_path}/held/c"}


def test_a_run_tells_what_it_skipped_at_its_start_and_end(config, tmp_path, capsys):
    """A damaged image does not end a run; one met on the way is in the last report only."""
    pytest.importorskip("tqdm")
    for i in range(6):
        folder = tmp_path / "data" / str(i)
        folder.mkdir(parents=True)
        for k in range(1 if i == 5 else 4):
            Image.new("RGB", (16, 16)).save(folder / f"{k}.png")
    (tmp_path / "data" / "3" / "1.png").write_bytes(b"no image")
    values = config(steps=3)
    data = replace(values.data, kind="frames", train=str(tmp_path / "data"), validation_share=0.0)
    train(replace(values, data=data))
    said = capsys.readouterr().err
    short = f"too short: {tmp_path}/data/5/0.png: 1 frames"
    bad = f"bad: {tmp_path}/data/3/0.png: broke while it was read"
    first, second = said.split("training: ")[1:]
    assert first.splitlines()[:2] == ["6 sequences, 0 bad, 1 too short", short]
    assert second.splitlines()[:3] == ["6 sequences, 1 bad, 1 too short", bad, short]


def test_a_run_does_not_go_on_with_a_set_of_another_size(config, tmp_path):
    pytest.importorskip("tqdm")
    for i in range(4):
        write_frames(tmp_path / "data" / str(i), [f"{k}.png" for k in range(4)])
    values = config(steps=2)
    data = replace(values.data, kind="frames", train=str(tmp_path / "data"), validation_share=0.0)
    values = replace(values, data=data)
    with pytest.raises(Interrupted):
        train(values, stop_at=1)
    write_frames(tmp_path / "data" / "4", [f"{k}.png" for k in range(4)])
    with pytest.raises(ValueError, match="set of 4 samples, this one has 5"):
        train(values, resume=True)
