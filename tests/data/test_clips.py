import logging

import pytest
import torch
from torch.utils.data import DataLoader

from fastvid.data.clips import ClipDataset
from fastvid.data.sampler import ResumableSampler
from tests.data.cards import numbered, numbers

pytest.importorskip("av")


@pytest.fixture
def folder(make_video, tmp_path):
    for i in range(4):
        make_video(f"set/{i}.mp4", frames=20 + i)
    return tmp_path / "set"


def spoil(path):
    """Keep the header and the first frames of an MP4, and ruin the rest."""
    from fastvid.data.video import write_mp4

    noise = torch.randint(256, (20, 3, 32, 64), dtype=torch.uint8)
    write_mp4(path, noise, 25, key_every=2)
    data = bytearray(path.read_bytes())
    start, end = data.index(b"mdat") + 4, data.rindex(b"moov") - 4
    third = (end - start) // 3
    data[start + third : end] = bytes(end - start - third)
    path.write_bytes(data)


def test_an_item_is_a_clip_in_minus_one_to_one(folder):
    item = ClipDataset(folder, frames=8, size=(32, 64))[0]
    assert item["video"].shape == (3, 8, 32, 64)
    assert item["video"].dtype == torch.float32
    assert item["video"].is_contiguous()
    assert -1 <= item["video"].min() < -0.95
    assert 0.95 < item["video"].max() <= 1
    assert numbers(item["video"]) == list(range(item["start"], item["start"] + 8))
    assert item["path"] == str(folder / "0.mp4")


def test_stride_and_size(folder):
    item = ClipDataset(folder, frames=5, size=(16, 32), stride=3)[2]
    assert item["video"].shape == (3, 5, 16, 32)
    assert numbers(item["video"]) == [item["start"] + 3 * k for k in range(5)]


def test_a_draw_depends_on_seed_epoch_and_index_alone(folder):
    make = lambda seed=0: ClipDataset(folder, frames=4, size=(32, 64), seed=seed, repeat=8)  # noqa: E731
    one, two = make(), make()
    starts = [one[(3, i)]["start"] for i in range(len(one))]
    assert [two[(3, i)]["start"] for i in reversed(range(len(two)))] == starts[::-1]
    assert [one[(4, i)]["start"] for i in range(len(one))] != starts
    assert [make(1)[(3, i)]["start"] for i in range(len(one))] != starts
    assert len(set(starts)) > 8
    assert one[0]["start"] == one[(0, 0)]["start"]


def test_every_window_can_be_drawn(make_video):
    path = make_video(frames=6)
    data = ClipDataset([path], frames=4, size=(32, 64), repeat=60)
    assert {item["start"] for item in data} == {0, 1, 2}


def test_the_grid_covers_every_file_side_by_side(folder):
    data = ClipDataset(folder, frames=5, size=(32, 64), windows="grid", stride=2)
    places = [(item["path"][-5], item["start"]) for item in data]
    assert places == [(str(i), start) for i in range(4) for start in (0, 9)]
    assert [data[(7, i)]["start"] for i in range(4)] == [0, 9, 0, 9]


def test_hflip_mirrors_about_half(make_video):
    path = make_video(frames=4)
    data = ClipDataset([path], frames=4, size=(32, 64), hflip=True, repeat=40)
    plain = ClipDataset([path], frames=4, size=(32, 64))[0]["video"]
    mirrored = [torch.equal(item["video"], plain.flip(-1)) for item in data]
    assert all(m or torch.equal(i["video"], plain) for m, i in zip(mirrored, data, strict=True))
    assert 10 < sum(mirrored) < 30


def test_the_cache_changes_nothing_but_the_time(folder, monkeypatch):
    plain = ClipDataset(folder, frames=6, size=(16, 16), hflip=True, stride=2)
    cached = ClipDataset(folder, frames=6, size=(16, 16), hflip=True, stride=2, cache=True)
    from fastvid.data import clips

    items = list(plain)
    monkeypatch.setattr(clips, "read_clip", None)  # a read would fail
    for a, b in zip(items, cached, strict=True):
        assert torch.equal(a["video"], b["video"])


@pytest.mark.parametrize("cache", [False, True])
def test_clips_are_fitted_as_asked(make_video, cache):
    path = make_video(frames=4)
    data = ClipDataset([path], frames=4, size=(32, 32), fit="letterbox", cache=cache)
    assert data[0]["video"][:, :, :8].max() < -0.9  # black above a picture twice as wide as high
    assert data[0]["video"][:, :, 8:24].max() > 0.9


def test_a_cache_too_large_is_refused(folder, monkeypatch):
    from fastvid.data import clips

    monkeypatch.setattr(clips, "MAX_CACHE", 10_000)
    with pytest.raises(ValueError, match="cache would pass"):
        ClipDataset(folder, frames=6, size=(32, 32), cache=True)


def test_workers_read_the_same_clips_and_resume_from_the_sampler(folder):
    data = ClipDataset(folder, frames=4, size=(32, 64), repeat=3)

    def starts(workers, sampler, batches):
        loader = DataLoader(data, batch_size=2, sampler=sampler, num_workers=workers)
        out = []
        for batch, _ in zip(loader, range(batches), strict=False):
            out += batch["start"].tolist()
            sampler.advance(2)
        return out

    straight = starts(0, ResumableSampler(len(data), seed=1), 14)
    first = ResumableSampler(len(data), seed=1)
    begun = starts(2, first, 5)
    second = ResumableSampler(len(data))
    second.load_state_dict(first.state_dict())
    assert begun + starts(2, second, 9) == straight


def test_a_bad_file_is_skipped_counted_and_named(folder, caplog):
    (folder / "bad.mp4").write_bytes(b"no video at all")
    with caplog.at_level(logging.WARNING):
        data = ClipDataset(folder, frames=4, size=(32, 64))
    assert len(data) == 4
    assert list(data.report.bad) == [str(folder / "bad.mp4")]
    assert "bad.mp4" in caplog.text
    assert "5 files, 1 bad, 0 too short" in str(data.report)


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_met_while_reading_goes_to_another_file(folder, workers):
    spoil(folder / "spoilt.mp4")
    data = ClipDataset(folder, frames=8, size=(32, 64), repeat=4)
    assert len(data) == 20  # the header looks well
    loader = DataLoader(data, batch_size=None, num_workers=workers)
    items = [(item["path"], item["start"]) for item in loader]
    assert len(items) == 20
    assert data.report.bad == {str(folder / "spoilt.mp4"): "broke while it was read"}
    again = ClipDataset(folder, frames=8, size=(32, 64), repeat=4)
    assert [(again[i]["path"], again[i]["start"]) for i in reversed(range(20))] == items[::-1]


@pytest.mark.parametrize("windows", ["random", "grid"])
def test_every_other_file_is_tried_before_an_item_fails(make_video, tmp_path, windows):
    """Half of the files break while they are decoded, and every item still comes."""
    for i in range(2):
        make_video(f"set/{i}.mp4", frames=20)
        spoil(tmp_path / "set" / f"spoilt{i}.mp4")
    make = {"frames": 4, "size": (32, 64), "windows": windows, "max_bad": 0.5}
    data = ClipDataset(tmp_path / "set", **make)
    paths = {data[(epoch, i)]["path"] for epoch in range(25) for i in range(len(data))}
    assert {str(tmp_path / "set" / f"{i}.mp4") for i in range(2)} <= paths
    assert len(data.report.bad) == 2


def test_damage_met_while_reading_counts_towards_too_many(folder):
    for i in range(2):
        spoil(folder / f"spoilt{i}.mp4")
    data = ClipDataset(folder, frames=8, size=(32, 64))
    with pytest.raises(RuntimeError, match=r"too many files(.|\n)*spoilt0(.|\n)*spoilt1"):
        [data[(epoch, i)] for epoch in range(20) for i in range(6)]


def test_no_file_that_can_be_read_is_an_error_with_the_list(make_video, tmp_path):
    spoil(tmp_path / "spoilt.mp4")
    data = ClipDataset(tmp_path, frames=20, size=(32, 64))
    with pytest.raises(RuntimeError, match=r"none of the files gave clip 0(.|\n)*spoilt\.mp4"):
        data[0]


def test_too_many_bad_files_stop_the_run(folder):
    for i in range(2):
        (folder / f"bad{i}.mp4").write_bytes(b"no video")
    with pytest.raises(RuntimeError, match=r"too many files(.|\n)*bad0(.|\n)*bad1"):
        ClipDataset(folder, frames=4, size=(32, 64))
    assert len(ClipDataset(folder, frames=4, size=(32, 64), max_bad=0.4)) == 4


def test_a_cut_file_counts_as_bad(folder):
    import av

    path = folder / "cut.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        for image in torch.randint(256, (100, 32, 64, 3), dtype=torch.uint8).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    report = ClipDataset(folder, frames=4, size=(32, 64)).report
    assert "seems cut" in report.bad[str(path)]


def test_short_files_are_counted_and_only_short_ones_refused(make_video, tmp_path):
    make_video("set/short.mp4", frames=5)
    with pytest.raises(RuntimeError, match=r"needs 15 frames \(8 at stride 2\)(.|\n)*short.mp4: 5"):
        ClipDataset(tmp_path / "set", frames=8, size=(32, 64), stride=2)
    make_video("set/long.mp4", frames=15)
    data = ClipDataset(tmp_path / "set", frames=8, size=(32, 64), stride=2)
    assert len(data) == 1
    assert data.report.short == {str(tmp_path / "set/short.mp4"): 5}


def test_nothing_readable_is_an_error_that_names_the_folder(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(RuntimeError, match=f"no clip can be read from {tmp_path}"):
        ClipDataset(tmp_path, frames=4, size=(8, 8))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no video in"):
        ClipDataset(tmp_path / "empty", frames=4, size=(8, 8))


def test_wrong_arguments_are_refused(folder):
    with pytest.raises(ValueError, match="frames=0"):
        ClipDataset(folder, frames=0, size=(8, 8))
    with pytest.raises(ValueError, match="windows must be"):
        ClipDataset(folder, frames=4, size=(8, 8), windows="all")
    with pytest.raises(ValueError, match="empty list"):
        ClipDataset([], frames=4, size=(8, 8))
    with pytest.raises(IndexError):
        ClipDataset(folder, frames=4, size=(8, 8))[4]


def test_cards_can_be_told_apart():
    assert numbers(numbered(200)) == list(range(200))
