import logging

import numpy as np
import pytest
import torch

from fastvid.data.frames import (
    FrameFolderDataset,
    cityscapes_sequences,
    frame_folders,
    read_image,
)
from fastvid.data.video import VideoError
from tests.data.cards import numbered, numbers

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def write_frames(tmp_path):
    cards = numbered(100).permute(0, 2, 3, 1).numpy()

    def write(folder, names):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for card, name in zip(cards, names, strict=False):
            Image.fromarray(np.ascontiguousarray(card)).save(tmp_path / folder / name)
        return tmp_path / folder

    return write


def city(name, sequence, first, count):
    return [f"{name}_{sequence:06d}_{first + i:06d}_leftImg8bit.png" for i in range(count)]


def test_folders_of_images_come_in_natural_order(write_frames, tmp_path):
    write_frames("clip10", [f"frame{i}.png" for i in range(12)])
    write_frames("clip2", [f"frame{i}.jpg" for i in range(12)])
    sequences = frame_folders(tmp_path)
    assert [s[0].parent.name for s in sequences] == ["clip2", "clip10"]
    assert [p.stem for p in sequences[1]] == [f"frame{i}" for i in range(12)]


def test_random_windows_and_the_first(write_frames, tmp_path):
    write_frames("a", [f"{i}.png" for i in range(30)])
    write_frames("b", [f"{i}.png" for i in range(20)])
    data = FrameFolderDataset(tmp_path, frames=4, size=(32, 64), stride=2)
    assert len(data) == 2
    item = data[(5, 1)]
    assert item["video"].shape == (3, 4, 32, 64)
    assert item["video"].dtype == torch.float32
    assert numbers(item["video"]) == [item["start"] + 2 * k for k in range(4)]
    assert item["path"].endswith("b/0.png")
    starts = {data[(epoch, 0)]["start"] for epoch in range(40)}
    assert len(starts) > 10
    assert max(starts) <= 23
    first = FrameFolderDataset(tmp_path, frames=4, size=(16, 16), windows="first")
    assert [first[(9, i)]["start"] for i in range(2)] == [0, 0]


def test_cityscapes_groups_thirty_frames_into_a_clip(write_frames, tmp_path):
    """Two clips in sequences of their own, and two that share a sequence, as in the real set."""
    write_frames("train/aachen", city("aachen", 0, 0, 30) + city("aachen", 1, 0, 30))
    write_frames("train/hamburg", city("hamburg", 0, 23, 60))
    clips = cityscapes_sequences(tmp_path / "train")
    assert [len(c) for c in clips] == [30] * 4
    assert [c[0].name for c in clips] == [
        "aachen_000000_000000_leftImg8bit.png",
        "aachen_000001_000000_leftImg8bit.png",
        "hamburg_000000_000023_leftImg8bit.png",
        "hamburg_000000_000053_leftImg8bit.png",
    ]
    training = FrameFolderDataset(clips, frames=16, size=(32, 64))[(1, 2)]
    assert training["video"].shape[1] == 16
    assert 0 <= training["start"] <= 14
    evaluation = FrameFolderDataset(clips, frames=None, size=(32, 64))[2]
    assert numbers(evaluation["video"]) == list(range(30))


def test_missing_frames_are_named_and_their_clip_left_out(write_frames, tmp_path, caplog):
    names = city("ulm", 0, 0, 30) + city("ulm", 1, 0, 30)
    names.remove("ulm_000001_000012_leftImg8bit.png")
    write_frames("train/ulm", names)
    with caplog.at_level(logging.WARNING):
        clips = cityscapes_sequences(tmp_path / "train")
    assert len(clips) == 1
    assert "missing ulm_000001_000012" in caplog.text
    assert "12 of 30 frames from ulm_000001_000000" in caplog.text
    assert "17 of 30 frames from ulm_000001_000013" in caplog.text


def test_a_split_without_a_whole_clip_is_an_error(write_frames, tmp_path):
    write_frames("train/ulm", city("ulm", 0, 0, 20))
    with pytest.raises(FileNotFoundError, match=r"no 30 consecutive frames .*20 of 30 frames"):
        cityscapes_sequences(tmp_path / "train")
    with pytest.raises(FileNotFoundError, match="no \\*/city_seq_frame"):
        cityscapes_sequences(tmp_path / "train/ulm")
    with pytest.raises(FileNotFoundError, match="no folder"):
        cityscapes_sequences(tmp_path / "test")


def test_a_damaged_image_is_named(write_frames, tmp_path):
    folder = write_frames("a", [f"{i}.png" for i in range(4)])
    data = (folder / "2.png").read_bytes()
    for spoilt in (data[: len(data) // 2], b"", b"GIF89a", data[:40] + b"\0" * 40):
        (folder / "2.png").write_bytes(spoilt)
        with pytest.raises(VideoError, match=r"2\.png: cannot be read"):
            FrameFolderDataset(tmp_path, frames=4, size=(8, 8))[0]


def test_images_are_rgb_whatever_they_were(tmp_path):
    for mode in ("L", "RGBA", "P", "1"):
        Image.new(mode, (6, 4)).save(tmp_path / "a.png")
        assert read_image(tmp_path / "a.png").shape == (3, 4, 6)


def test_wrong_sets_are_refused(write_frames, tmp_path):
    with pytest.raises(FileNotFoundError, match="no image in"):
        frame_folders(tmp_path)
    write_frames("a", [f"{i}.png" for i in range(4)])
    write_frames("b", [f"{i}.png" for i in range(6)])
    with pytest.raises(ValueError, match=r"a holds 4 images, a clip needs 5"):
        FrameFolderDataset(tmp_path, frames=5, size=(8, 8))
    with pytest.raises(ValueError, match=r"sequences have \[4, 6\] frames"):
        FrameFolderDataset(tmp_path, frames=None, size=(8, 8))
    with pytest.raises(ValueError, match="windows must be"):
        FrameFolderDataset(tmp_path, frames=2, size=(8, 8), windows="grid")
