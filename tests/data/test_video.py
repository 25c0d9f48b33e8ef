import os
import pickle
import random
from fractions import Fraction

import pytest
import torch

from fastvid.data.video import (
    VideoError,
    count_frames,
    find_videos,
    probe,
    read_clip,
    resize,
    write_gif,
    write_mp4,
)
from tests.data.cards import numbered, numbers

av = pytest.importorskip("av")


def encode(path, video, *, codec="libx264", pixels="yuv420p", format=None, options=None, pts=None):
    """Write frames by hand, for containers and codecs that `write_mp4` does not make."""
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=Fraction(25), options=options or {})
        stream.height, stream.width, stream.pix_fmt = *video.shape[-2:], pixels
        for i, image in enumerate(video.permute(0, 2, 3, 1).contiguous().numpy()):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = (pts[i] if pts else i), Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_a_file_gives_back_what_was_written(make_video):
    path = make_video(frames=40)
    info = probe(path)
    assert (info.frames, info.height, info.width, info.fps) == (40, 32, 64, 25.0)
    assert (info.codec, info.pixel_format, info.rotation, info.cut) == ("h264", "yuv420p", 0, False)
    clip = read_clip(path)
    assert clip.dtype == torch.uint8
    assert clip.shape == (40, 3, 32, 64)
    assert numbers(clip) == list(range(40))
    assert count_frames(path) == 40


def test_colours_survive_the_file(tmp_path):
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 120, 40], [128, 128, 128]])
    video = colours.to(torch.uint8)[:, :, None, None].expand(5, 3, 32, 32)
    back = read_clip(write_mp4(tmp_path / "c.mp4", video, 25, quality=0))
    assert (back.int() - video.int()).abs().max() <= 4


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("b-frames.mp4", "libx264", {"bf": "3", "g": "10"}),
        ("open-gop.mkv", "libx264", {"bf": "3", "g": "10", "x264-params": "open-gop=1"}),
        ("one-key.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
        ("no-stamps.avi", "mpeg4", {"g": "10", "bf": "2"}),
        ("stream.ts", "libx264", {"bf": "2", "g": "10"}),
    ],
)
def test_random_access_equals_sequential_decoding(tmp_path, name, codec, options):
    path = encode(tmp_path / name, numbered(60), codec=codec, options=options)
    whole = read_clip(path)
    assert numbers(whole) == list(range(60))
    rng = random.Random(0)
    for _ in range(20):
        stride = rng.choice([1, 2, 5])
        frames = rng.randint(1, 8)
        start = rng.randint(0, 59 - (frames - 1) * stride)
        clip = read_clip(path, start, frames, stride=stride)
        assert torch.equal(clip, whole[start : start + frames * stride : stride][:frames])


class Counting:
    """A container that notes the time stamps of the frames it decodes."""

    def __init__(self, container, decoded):
        self.container, self.decoded = container, decoded

    def __getattr__(self, name):
        return getattr(self.container, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.container.close()

    def decode(self, stream):
        for frame in self.container.decode(stream):
            self.decoded.append(frame.pts)
            yield frame


def test_a_seek_decodes_only_what_it_must(make_video, monkeypatch):
    path = make_video(frames=200, key_every=10)
    probe(path)
    from fastvid.data import video

    decoded, plain = [], video._open
    monkeypatch.setattr(video, "_open", lambda *args: Counting(plain(*args), decoded))
    assert numbers(read_clip(path, 153, 5)) == list(range(153, 158))
    assert len(decoded) <= 20  # from a key frame at most ten frames back


def test_frames_decoded_from_damage_are_refused(tmp_path):
    """The decoder conceals a lost part, tells so by a flag, and gives as many frames as before."""
    torch.manual_seed(0)
    noise = torch.randint(256, (20, 3, 64, 64), dtype=torch.uint8)
    path = encode(tmp_path / "noise.mp4", noise, options={"g": "5"})
    with av.open(str(path)) as container:
        packet = [(p.pos, p.size) for p in container.demux(video=0) if p.size][7]
    data = bytearray(path.read_bytes())
    start, end = packet[0] + packet[1] // 2, sum(packet)
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    with av.open(str(path)) as container:
        damaged = [frame.is_corrupt for frame in container.decode(video=0)]
    assert len(damaged) == probe(path).frames == 20
    assert sum(damaged) == 1
    bad = damaged.index(True)
    with pytest.raises(VideoError, match=f"frames between {bad} and {bad} are missing or damaged"):
        read_clip(path, bad, 1)
    assert len(read_clip(path, 0, 4)) == 4


def test_what_a_seek_does_not_give_is_decoded_from_the_start(make_video, monkeypatch):
    path = make_video(frames=40, key_every=5)
    from fastvid.data import video

    decode = video._decode
    for answer in (lambda: None, lambda: 1 / 0):
        broken = lambda *a, answer=answer: decode(*a) if a[2] is None else answer()  # noqa: E731
        monkeypatch.setattr(video, "_decode", broken)
        assert numbers(read_clip(path, 30, 3)) == [30, 31, 32]


def test_metadata_may_hold_any_bytes(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        container.metadata["title"] = "a rather plain title"
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(64, 32, "rgb24")))
        container.mux(stream.encode())
    data = (tmp_path / "a.mkv").read_bytes().replace(b"plain title", b"\xff\xfe\xfd\xfc\xfb title")
    (tmp_path / "a.mkv").write_bytes(data)
    assert count_frames(tmp_path / "a.mkv") == 1


def test_uneven_time_stamps_are_frames_in_order(tmp_path):
    stamps = [0, 1, 5, 6, 7, 30, 31, 90, 91, 92]
    path = encode(tmp_path / "vfr.mkv", numbered(10), pts=stamps)
    assert numbers(read_clip(path)) == list(range(10))
    assert numbers(read_clip(path, 5, 3)) == [5, 6, 7]
    assert not probe(path).cut


def test_ten_bits_come_as_eight(tmp_path):
    path = encode(tmp_path / "ten.mp4", numbered(5), pixels="yuv420p10le")
    assert probe(path).pixel_format == "yuv420p10le"
    assert numbers(read_clip(path)) == list(range(5))


def test_rotation_is_applied(make_video):
    path = make_video(frames=3)
    data = path.read_bytes()
    upright = (65536, 0, 0, 0, 65536)  # the display matrix of the track, row by row
    turned = (0, 65536, 0, -65536, 0)
    matrix = [b"".join(v.to_bytes(4, "big", signed=True) for v in m) for m in (upright, turned)]
    at = data.index(b"tkhd")
    at = data.index(matrix[0], at)
    path.write_bytes(data[:at] + matrix[1] + data[at + 20 :])
    info = probe(path)
    assert (info.height, info.width, info.rotation) == (64, 32, 90)
    # clockwise: what was left is on top now
    assert numbers(torch.rot90(read_clip(path), 1, (2, 3))) == [0, 1, 2]


def test_the_larger_of_two_streams_is_read(tmp_path):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = []
        for side in (16, 64):
            stream = container.add_stream("libx264", rate=25)
            stream.height = stream.width = side
            stream.pix_fmt = "yuv420p"
            streams.append(stream)
        for _ in range(5):
            for stream in streams:
                frame = av.VideoFrame(stream.width, stream.height, "rgb24")
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    assert probe(path).height == 64


def test_a_short_file_is_never_a_short_clip(make_video):
    path = make_video(frames=10)
    assert numbers(read_clip(path, 1, 5, stride=2)) == [1, 3, 5, 7, 9]
    for start, frames, stride in [(0, 11, 1), (5, 6, 1), (0, 6, 2), (10, None, 1)]:
        with pytest.raises(VideoError, match="the file holds 10") as caught:
            read_clip(path, start, frames, stride=stride)
        assert caught.value.path == str(path)


@pytest.mark.parametrize("fit", ["crop", "letterbox"])
def test_resize_keeps_proportions(fit):
    video = torch.zeros(2, 3, 40, 80, dtype=torch.uint8)
    video[..., 30:50] = 255  # a white square of 20 in the middle
    video[..., :10, :] = video[..., 30:, :] = 0
    out = resize(video, (20, 20), fit)
    assert out.shape == (2, 3, 20, 20)
    assert out.dtype == torch.uint8
    rows, columns = (out[0, 0] > 127).nonzero().unbind(1)
    side = 10 if fit == "crop" else 5
    assert abs(int(rows.max() - rows.min()) + 1 - side) <= 1
    assert abs(int(columns.max() - columns.min()) + 1 - side) <= 1
    if fit == "letterbox":
        assert not out[:, :, :5].any()
        assert not out[:, :, 15:].any()


def test_resize_is_antialiased():
    stripes = torch.zeros(1, 3, 63, 63, dtype=torch.uint8)
    stripes[..., ::2] = 255
    assert (resize(stripes, (21, 21)).int() - 127).abs().max() < 50  # plain sampling: 0 and 255


def test_an_odd_side_is_padded_by_its_last_line(tmp_path):
    video = torch.arange(33 * 35).mul(3).remainder(200).to(torch.uint8).reshape(1, 1, 33, 35)
    back = read_clip(write_mp4(tmp_path / "odd.mp4", video.repeat(2, 3, 1, 1), 10, quality=0))
    assert back.shape == (2, 3, 34, 36)
    assert (back[:, :, 33].int() - back[:, :, 32].int()).abs().max() <= 3


@pytest.mark.parametrize("write", [write_mp4, write_gif])
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, write):
    old = write(tmp_path / "old", numbered(3), 10).read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(VideoError, match=r"old: cannot be written.*No space left"):
        write(tmp_path / "old", numbered(5), 10)
    with pytest.raises(VideoError):
        write(tmp_path / "new", numbered(5), 10)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_bytes() == old


def test_gif_keeps_frames_and_time(tmp_path):
    from PIL import Image

    with Image.open(write_gif(tmp_path / "a.gif", numbered(7), 10)) as image:
        assert (image.n_frames, image.info["duration"], image.info["loop"]) == (7, 100, 0)


def test_gif_holds_no_frame_that_players_slow_down(tmp_path):
    from PIL import Image

    for fps, milliseconds in [(30, 30), (50, 20), (60, 20), (300, 20)]:
        with Image.open(write_gif(tmp_path / "a.gif", numbered(3), fps)) as image:
            assert image.info["duration"] == milliseconds


@pytest.mark.parametrize("write", [write_mp4, write_gif])
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, write):
    events = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: events.append(os.fstat(f).st_ino) or sync(f))
    monkeypatch.setattr(os, "replace", lambda *a: events.append("named") or replace(*a))
    path = write(tmp_path / "a", numbered(3), 10)
    assert events == [path.stat().st_ino, "named", tmp_path.stat().st_ino]


def test_writing_is_deterministic(tmp_path):
    a, b = (write_mp4(tmp_path / n, numbered(20), 25).read_bytes() for n in ("a.mp4", "b.mp4"))
    assert a == b


def test_wrong_tensors_are_refused(tmp_path):
    path = tmp_path / "x.mp4"
    with pytest.raises(TypeError, match=r"video must be uint8, got torch\.float32"):
        write_mp4(path, torch.zeros(2, 3, 8, 8), 10)
    with pytest.raises(ValueError, match=r"video must be \(T, 3, H, W\)"):
        write_mp4(path, torch.zeros(3, 2, 8, 8, dtype=torch.uint8), 10)
    with pytest.raises(ValueError, match="fps"):
        write_mp4(path, numbered(2), 0)
    with pytest.raises(ValueError, match="quality"):
        write_mp4(path, numbered(2), 10, quality=60)
    assert not path.exists()


def test_wrong_requests_are_refused(make_video):
    path = make_video()
    for request in [{"start": -1}, {"frames": 0}, {"stride": 0}]:
        with pytest.raises(ValueError, match="start must be >= 0"):
            read_clip(path, **request)
    with pytest.raises(ValueError, match="size must be"):
        read_clip(path, size=(0, 4))
    with pytest.raises(ValueError, match="fit must be"):
        read_clip(path, size=(4, 4), fit="stretch")


def test_a_missing_path_a_folder_and_an_empty_file_are_named(tmp_path):
    (tmp_path / "empty.mp4").touch()
    for path, reason in [
        (tmp_path / "none.mp4", "No such file"),
        (tmp_path, "is not a file"),
        (f"{tmp_path}/a\0.mp4", "null"),
        (tmp_path / "empty.mp4", "is empty"),
    ]:
        with pytest.raises(VideoError, match=reason) as caught:
            probe(path)
        assert caught.value.path == str(path)


def test_a_changed_file_is_looked_at_again(make_video):
    path = make_video(frames=10)
    assert count_frames(path) == 10
    make_video(frames=20)
    assert count_frames(path) == 20


def test_a_half_file_is_noticed(tmp_path):
    """A Matroska file cut in half gives its frames without an error; an MP4 has lost its table."""
    path = encode(tmp_path / "a.mkv", torch.randint(256, (100, 3, 32, 64), dtype=torch.uint8))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    info = probe(path)
    assert info.cut
    assert 20 < info.frames < 80
    assert read_clip(path, 0, 16).shape[0] == 16
    with pytest.raises(VideoError, match="seems cut"):
        read_clip(path, 80, 16)

    half = write_mp4(tmp_path / "b.mp4", numbered(40), 25)
    data = half.read_bytes()
    half.write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match="cannot be read") as caught:
        probe(half)
    assert caught.value.__cause__ is not None


def test_a_playlist_opens_no_other_file(make_video, tmp_path):
    make_video("secret.mp4")
    playlist = tmp_path / "innocent.mp4"
    playlist.write_text("ffconcat version 1.0\nfile secret.mp4\n")
    with av.open(str(playlist)) as container:  # the danger is real
        assert next(container.decode(video=0))
    with pytest.raises(VideoError, match="none of the formats"):
        probe(playlist)
    playlist.write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nsecret.mp4\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(VideoError):
        probe(playlist)


def test_a_name_is_never_a_protocol(make_video, tmp_path, monkeypatch):
    make_video("a.mp4", frames=3)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VideoError, match="No such file"):
        probe("concat:a.mp4|a.mp4")
    os.rename("a.mp4", "http:a.mp4")
    assert count_frames("http:a.mp4") == 3


def test_a_huge_frame_is_refused_before_it_is_decoded(tmp_path):
    video = torch.zeros(1, 3, 2048, 2048, dtype=torch.uint8)
    path = write_mp4(tmp_path / "huge.mp4", video, 10)
    assert path.stat().st_size < 10_000
    with pytest.raises(VideoError, match=r"2048 x 2048 frames exceed 1000000 pixels"):
        probe(path, max_pixels=1_000_000)
    assert probe(path).height == 2048


def test_a_frame_that_grows_midway_is_refused_by_the_decoder(tmp_path):
    path = tmp_path / "grows.ts"
    sides = [torch.zeros(10, 3, side, side, dtype=torch.uint8) for side in (32, 512)]
    parts = [encode(tmp_path / f"{i}.ts", side).read_bytes() for i, side in enumerate(sides)]
    path.write_bytes(b"".join(parts))
    assert read_clip(path, size=(16, 16)).shape[0] == 20
    assert probe(path, max_pixels=10_000).frames == 20
    with pytest.raises(VideoError):
        read_clip(path, size=(16, 16), max_pixels=10_000)


def test_too_many_frames_are_refused(make_video, monkeypatch):
    from fastvid.data import video

    monkeypatch.setattr(video, "MAX_FRAMES", 20)
    with pytest.raises(VideoError, match="claims 40 frames, more than 20"):
        probe(make_video(frames=40))


def test_a_size_that_changes_midway_needs_a_target(tmp_path):
    parts = [
        encode(tmp_path / f"{i}.ts", numbered(10, 16 * (i + 1))).read_bytes() for i in range(2)
    ]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(parts))
    with pytest.raises(VideoError, match="changes its size midway"):
        read_clip(path)
    assert numbers(read_clip(path, size=(8, 32))) == [*range(10), *range(10)]


def test_mutants_give_frames_or_one_kind_of_error(tmp_path):
    """Flipped bits, cuts, new headers and splices over three containers: no other exception."""
    rng = random.Random(0)
    noise = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    seeds = [
        encode(tmp_path / "a.mp4", noise, options={"bf": "2"}).read_bytes(),
        encode(tmp_path / "b.webm", noise, codec="libvpx").read_bytes(),
        encode(tmp_path / "c.avi", noise, codec="mpeg4").read_bytes(),
    ]
    path = tmp_path / "mutant"
    named = []
    for i in range(120):
        data = bytearray(rng.choice(seeds))
        match i % 4:
            case 0:
                for _ in range(rng.choice([1, 10, 100])):
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                del data[rng.randrange(len(data)) :]
            case 2:
                for _ in range(8):
                    data[rng.randrange(400)] = rng.randrange(256)
            case 3:
                other = rng.choice(seeds)
                data = data[: len(data) // 2] + other[len(other) // 2 :]
        path.write_bytes(data)
        os.utime(path, ns=(i, i))
        try:
            shape = read_clip(path, 0, 4, size=(16, 16)).shape
        except VideoError as error:
            named.append(str(path) in str(error))
        else:
            assert shape == (4, 3, 16, 16)
    assert all(named)
    assert 20 < len(named) < 120  # some read, some refused: the mutants are worth something


def test_the_error_survives_a_worker():
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "is empty")))
    assert (error.path, error.reason, str(error)) == ("a.mp4", "is empty", "a.mp4: is empty")


def test_find_videos_names_an_empty_folder(make_video, tmp_path):
    make_video("deep/b.mp4", frames=2)
    make_video("A.MP4", frames=2)
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden.mp4").touch()
    make_video(".half/a.mp4", frames=2)
    assert [p.name for p in find_videos(tmp_path)] == ["A.MP4", "b.mp4"]
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no video in .*none"):
        find_videos(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_videos(tmp_path / "missing")
