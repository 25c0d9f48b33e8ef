import logging

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

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


def test_every_window_can_be_drawn(write_frames, tmp_path):
    write_frames("a", [f"{i}.png" for i in range(30)])
    write_frames("b", [f"{i}.png" for i in range(20)])
    data = FrameFolderDataset(tmp_path, frames=4, size=(32, 64), stride=2)
    assert len(data) == 2
    item = data[(5, 1)]
    assert item["video"].shape == (3, 4, 32, 64)
    assert item["video"].dtype == torch.float32
    assert numbers(item["video"]) == [item["start"] + 2 * k for k in range(4)]
    assert item["path"].endswith("b/0.png")
    few = FrameFolderDataset(tmp_path, frames=18, size=(8, 8))
    assert {few[(epoch, 1)]["start"] for epoch in range(30)} == {0, 1, 2}


def test_the_seed_decides_the_windows(write_frames, tmp_path):
    write_frames("a", [f"{i}.png" for i in range(30)])
    make = lambda seed: FrameFolderDataset(tmp_path, frames=2, size=(8, 8), seed=seed)  # noqa: E731
    one, same, other = ([make(s)[(e, 0)]["start"] for e in range(20)] for s in (0, 0, 1))
    assert one == same != other


def test_the_grid_lies_side_by_side(write_frames, tmp_path):
    write_frames("a", [f"{i}.png" for i in range(9)])
    write_frames("b", [f"{i}.png" for i in range(4)])
    grid = FrameFolderDataset(tmp_path, frames=4, size=(16, 16), windows="grid")
    assert [(grid[(9, i)]["path"][-7:], grid[i]["start"]) for i in range(len(grid))] == [
        ("a/0.png", 0),
        ("a/0.png", 4),
        ("b/0.png", 0),
    ]


def test_hflip_mirrors_about_half(write_frames, tmp_path):
    write_frames("a", ["0.png", "1.png"])
    make = {"frames": 2, "size": (32, 64)}
    plain = FrameFolderDataset(tmp_path, **make)[0]["video"]
    data = FrameFolderDataset(tmp_path, **make, hflip=True)
    clips = [data[(epoch, 0)]["video"] for epoch in range(40)]
    mirrored = [torch.equal(clip, plain.flip(-1)) for clip in clips]
    assert all(m or torch.equal(c, plain) for m, c in zip(mirrored, clips, strict=True))
    assert 10 < sum(mirrored) < 30


def test_images_are_fitted_as_asked(write_frames, tmp_path):
    write_frames("a", ["0.png", "1.png"])
    video = FrameFolderDataset(tmp_path, frames=2, size=(32, 32), fit="letterbox")[0]["video"]
    assert (video[:, :, :8] == -1).all()  # black above a picture twice as wide as high
    assert (video[:, 1, 8:24] == 1).any()


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
            read_image(folder / "2.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_costs_its_turn_alone(write_frames, tmp_path, workers, caplog):
    for name in "abc":
        write_frames(name, [f"{i}.png" for i in range(4)])
    (tmp_path / "b" / "2.png").write_bytes(b"no image")
    data = FrameFolderDataset(tmp_path, frames=4, size=(8, 8))
    assert str(data.report) == "3 sequences, 0 bad, 0 too short"
    items = list(DataLoader(data, batch_size=None, num_workers=workers))
    first = [str(tmp_path / name / "0.png") for name in "abc"]
    assert [item["path"] for item in items][::2] == first[::2]
    assert items[1]["path"] in first[::2]
    assert data.report.bad == {first[1]: "broke while it was read"}
    if not workers:
        assert f"skipping {tmp_path}/b/2.png: cannot be read" in caplog.text


def test_many_damaged_sequences_stop_the_run(write_frames, tmp_path):
    for name in "abc":
        (write_frames(name, ["0.png"]) / "0.png").write_bytes(b"no image")
    with pytest.raises(RuntimeError, match=r"too many sequences(.|\n)*a/0\.png"):
        FrameFolderDataset(tmp_path, frames=1, size=(8, 8))[0]


def test_short_sequences_are_left_out_and_named(write_frames, tmp_path, caplog):
    write_frames("a", [f"{i}.png" for i in range(4)])
    write_frames("b", [f"{i}.png" for i in range(6)])
    data = FrameFolderDataset(tmp_path, frames=5, size=(8, 8))
    assert [item["path"] for item in (data[0],)] == [str(tmp_path / "b" / "0.png")]
    assert data.report.short == {str(tmp_path / "a" / "0.png"): 4}
    assert "a/0.png: 4 frames of 5" in caplog.text
    with pytest.raises(RuntimeError, match=r"needs 9 frames \(5 at stride 2\)(.|\n)*b/0.png: 6"):
        FrameFolderDataset(tmp_path, frames=5, size=(8, 8), stride=2)


def test_images_are_rgb_whatever_they_were(tmp_path):
    for mode in ("L", "RGBA", "P", "1"):
        Image.new(mode, (6, 4)).save(tmp_path / "a.png")
        assert read_image(tmp_path / "a.png").shape == (3, 4, 6)


def test_sixteen_bits_become_eight(tmp_path):
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[:, 0].tolist() == [[0, 1, 128, 255]] * 3
    (tmp_path / "a.ppm").write_bytes(b"P5 4 1 65535 " + levels.astype(">u2").tobytes())
    assert read_image(tmp_path / "a.ppm")[:, 0].tolist() == [[0, 1, 128, 255]] * 3


def test_levels_without_a_range_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(VideoError, match=r"a\.tiff: its levels are floating-point"):
        read_image(tmp_path / "a.tiff")


def test_images_are_turned_upright(tmp_path):
    image = Image.new("RGB", (6, 4))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    image.save(tmp_path / "a.png", exif=exif)
    upright = read_image(tmp_path / "a.png")
    assert upright.shape == (3, 6, 4)
    assert upright[:, 0, 3].tolist() == [255] * 3


def test_an_image_too_large_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    from fastvid.data import frames

    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr(frames, "MAX_PIXELS", 23)
    monkeypatch.setattr(Image.Image, "convert", None)  # decoding would fail
    with pytest.raises(VideoError, match=r"a\.png: its 4 x 6 exceed 23 pixels"):
        read_image(tmp_path / "a.png")


def test_hidden_folders_are_left_out(write_frames, tmp_path):
    write_frames("a", ["0.png"])
    write_frames(".a.half-written", ["0.png"])
    assert frame_folders(tmp_path) == [[tmp_path / "a" / "0.png"]]
    below = write_frames(".cache/b", ["0.png"])
    assert frame_folders(below) == [[below / "0.png"]]


def test_wrong_sets_are_refused(write_frames, tmp_path):
    with pytest.raises(FileNotFoundError, match="no image in"):
        frame_folders(tmp_path)
    write_frames("a", [f"{i}.png" for i in range(4)])
    write_frames("b", [f"{i}.png" for i in range(6)])
    with pytest.raises(ValueError, match=r"sequences have \[4, 6\] frames"):
        FrameFolderDataset(tmp_path, frames=None, size=(8, 8))
    with pytest.raises(ValueError, match="windows must be"):
        FrameFolderDataset(tmp_path, frames=2, size=(8, 8), windows="all")
    with pytest.raises(ValueError, match="empty list of sequences"):
        FrameFolderDataset([], frames=None, size=(8, 8))
