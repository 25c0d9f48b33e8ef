"""Video files in and out: frame-exact clips as uint8 tensors, every failure one exception.

Frame k is the k-th frame in order of presentation. One pass over the packets of a file (no decoding
but of the first frame) lists the time stamps of its frames and its key frames; a clip is then read
by a seek to the key frame before it and decoded until each wanted time stamp has come. Where time
stamps are missing or repeated, and where a seek did not give every frame, the file is decoded from
its start, so that random access always equals sequential decoding.

PyAV is imported where it is used. It comes with `pip install fastvid[video]`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .atomic import whole

EXTENSIONS = (
    ".mp4",
    ".m4v",
    ".mov",
    ".mkv",
    ".webm",
    ".avi",
    ".mpg",
    ".mpeg",
    ".ts",
    ".ogv",
    ".flv",
)
MAX_PIXELS = 2**25  # per frame: 8K passes, a small file that claims 8192 x 8192 does not
MAX_FRAMES = 2**20  # per file: nine hours at 30 frames per second

# Demuxers that read one file only. A playlist renamed to .mp4 would make FFmpeg open other files.
_FORMATS = "mov,matroska,avi,mpegts,mpeg,ogg,flv"

Fit = Literal["crop", "letterbox"]


class VideoError(RuntimeError):
    """A video file that cannot be read or written: `path`, `reason`, and the cause behind it."""

    def __init__(self, path: str | os.PathLike[str], reason: str = ""):
        super().__init__(str(path), reason)  # the arguments, so that it survives pickling
        self.path = str(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.reason else self.path


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds. Height and width in pixels, as shown: after its rotation."""

    path: str
    frames: int  # counted from the packets, not believed from the header
    fps: float  # frames per second, on average
    height: int
    width: int
    rotation: int  # degrees clockwise that `read_clip` turns the stored pixels by
    codec: str
    pixel_format: str
    cut: bool  # the file ends before its header says: an interrupted copy or download


@dataclass(frozen=True)
class _Index:
    info: VideoInfo
    stream: int
    keys: np.ndarray  # (frames,) time stamp of every frame in order; its number where not timed
    seeks: np.ndarray  # (key frames, 2): time stamp of a key frame, and where to seek for it
    timed: bool


def probe(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> VideoInfo:
    """Describe the video stream of a file; of several, the one with the largest picture.

    Reads the packets of the whole file once and decodes one frame; the answer is kept until the
    file changes.

    Raises:
        VideoError: no such file, no video in it, a format that may open other files, more than
            `max_pixels` per frame (told by the header, before any frame is decoded), or damage.
    """
    return _index_of(path, max_pixels).info


def count_frames(path: str | os.PathLike[str]) -> int:
    """Number of frames that a file holds, see `probe`."""
    return probe(path).frames


def read_clip(
    path: str | os.PathLike[str],
    start: int = 0,
    frames: int | None = None,
    *,
    stride: int = 1,
    size: tuple[int, int] | None = None,
    fit: Fit = "crop",
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Read frames `start, start + stride, ...` exactly.

    Args:
        path: a local file.
        start: number of the first frame.
        frames: how many; None reads to the end.
        stride: distance between two frames, in frames of the file.
        size: (H, W) in pixels; None keeps the file's own.
        fit: how another aspect ratio is fitted, see `resize`.
        max_pixels: a larger frame is refused before it is decoded.
    Returns:
        (frames, 3, H, W) uint8, RGB, turned upright by the file's rotation.
    Raises:
        VideoError: the file cannot be read, or holds fewer frames than asked: never a short clip.
        ValueError: `start`, `frames`, `stride`, `size` or `fit` makes no sense.
    """
    if start < 0 or stride < 1 or (frames is not None and frames < 1):
        raise ValueError(
            "start must be >= 0, frames >= 1, stride >= 1, "
            f"got start={start}, frames={frames}, stride={stride}"
        )
    if size is not None:
        _expect_size(size, fit)
    index = _index_of(path, max_pixels)
    held = index.info.frames
    if frames is None:
        frames = max(1, -(-(held - start) // stride))
    stop = start + (frames - 1) * stride + 1
    if stop > held:
        cut = " (the file ends before its header says: it seems cut)" if index.info.cut else ""
        asked = f"{frames} frames from {start}, stride {stride}"
        raise VideoError(path, f"{asked} need {stop} frames, the file holds {held}{cut}")

    wanted = index.keys[start:stop:stride]
    before = index.seeks[index.seeks[:, 0] <= wanted[0]] if index.timed else index.seeks[:0]
    if len(before) and before[-1, 0] > index.keys[0]:
        with suppress(VideoError), _one_error(path):  # what a seek breaks, the whole file may give
            clip = _decode(index, wanted, int(before[-1, 1]), size, fit, max_pixels)
            if clip is not None:
                return clip
    with _one_error(path):
        clip = _decode(index, wanted, None, size, fit, max_pixels)
    if clip is None:
        raise VideoError(path, f"frames between {start} and {stop - 1} are missing or damaged")
    return clip


def resize(video: Tensor, size: tuple[int, int], fit: Fit = "crop") -> Tensor:
    """Bring frames to a size without distortion: bilinear, antialiased.

    `crop` scales until both sides cover the size and cuts the centre out; `letterbox` scales until
    both sides fit into it and centres the frame on black. An odd pixel goes to the bottom or right.

    Args:
        video: (T, 3, H, W) uint8.
        size: (H, W) in pixels.
    Returns:
        (T, 3, *size) uint8.
    """
    _expect_size(size, fit)
    H, W = video.shape[-2:]
    if tuple(size) == (H, W):
        return video
    choose, bound = (max, max) if fit == "crop" else (min, min)
    scale = choose(size[0] / H, size[1] / W)
    h, w = (max(1, bound(side, round(old * scale))) for side, old in zip(size, (H, W), strict=True))
    if (h, w) != (H, W):
        video = F.interpolate(video, (h, w), mode="bilinear", antialias=True)
    if fit == "crop":
        top, left = (h - size[0]) // 2, (w - size[1]) // 2
        return video[..., top : top + size[0], left : left + size[1]]
    top, left = (size[0] - h) // 2, (size[1] - w) // 2
    return F.pad(video, (left, size[1] - w - left, top, size[0] - h - top))


def write_mp4(
    path: str | os.PathLike[str],
    video: Tensor,
    fps: float,
    *,
    quality: int = 18,
    key_every: int = 30,
) -> Path:
    """Write an H.264 file that plays everywhere (yuv420p), or nothing at all.

    The file appears under its name only when it is complete; on one machine the same frames always
    give the same bytes. Colours are stored at half the resolution, so both sides must be even: an
    odd side gets its last row or column twice.

    Args:
        video: (T, 3, H, W) uint8, RGB.
        fps: frames per second.
        quality: 0 (best) to 51; 18 looks like the original, each 6 more halve the file.
        key_every: frames between key frames, at most; small numbers make random access quick.
    Returns:
        The path written.
    Raises:
        ValueError: the tensor is not such a video, or a number is out of range.
        VideoError: the encoder or the disk refused.
    """
    import av

    _expect_video(video, fps)
    if not 0 <= quality <= 51 or key_every < 1:
        raise ValueError(
            f"quality must be 0 to 51 and key_every >= 1, got {quality} and {key_every}"
        )
    pixels = video.detach().cpu().permute(0, 2, 3, 1).numpy()
    H, W = pixels.shape[1:3]
    pixels = np.pad(pixels, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)), mode="edge")
    with _whole_file(path) as part, av.open(str(part), "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(65535))
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {
            "crf": str(quality),
            "g": str(key_every),
            "threads": "1",
            # Both read memory that x264 never wrote: the same pictures gave other bytes by chance.
            "x264-params": "mbtree=0:trellis=0",
        }
        stream.codec_context.colorspace = 6  # BT.601, which is what the conversion below makes
        stream.codec_context.color_range = 1
        for image in pixels:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            # A thread pool per frame, PyAV's default, costs seven times the conversion.
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU601", threads=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def write_gif(path: str | os.PathLike[str], video: Tensor, fps: float) -> Path:
    """Write an endless GIF through Pillow, or nothing at all. Arguments as in `write_mp4`.

    GIF keeps 256 colours per frame, and time in hundredths of a second. Players slow down frames
    that are shorter than two of them, so above 50 frames per second the GIF plays at 50.
    """
    from PIL import Image

    _expect_video(video, fps)
    pixels = video.detach().cpu().permute(0, 2, 3, 1).numpy()
    first, *rest = [Image.fromarray(np.ascontiguousarray(image)) for image in pixels]
    duration = max(20, round(1000 / fps))  # milliseconds
    with _whole_file(path) as part:
        first.save(part, "GIF", save_all=True, append_images=rest, duration=duration, loop=0)
    return Path(path)


def find_videos(folder: str | os.PathLike[str]) -> list[Path]:
    """All video files below a folder, by extension, sorted by name; hidden ones are left out.

    Raises:
        FileNotFoundError: no such folder, or no video in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}")
    found = [p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS and shown(p, root)]
    if not found:
        raise FileNotFoundError(f"no video in {root}: looked for {', '.join(EXTENSIONS)}")
    return sorted(found)


def shown(path: Path, root: Path) -> bool:
    """Whether no part of a path below `root` is hidden: what is half written has a hidden name."""
    return not any(part.startswith(".") for part in path.relative_to(root).parts)


def _index_of(path: str | os.PathLike[str], max_pixels: int) -> _Index:
    try:
        status = os.stat(path)
    except OSError as error:
        raise VideoError(path, f"cannot be opened: {error.strerror}") from error
    except ValueError as error:  # a null character in the name
        raise VideoError(path, f"cannot be opened: {error}") from error
    if not os.path.isfile(path):
        raise VideoError(path, "is not a file")
    return _index(os.path.abspath(path), status.st_mtime_ns, status.st_size, max_pixels)


@lru_cache(maxsize=4096)
def _index(path: str, modified: int, size: int, max_pixels: int) -> _Index:
    """List the frames of a file; `modified` and `size` make a changed file a new entry."""
    if size == 0:
        raise VideoError(path, "is empty")
    with _one_error(path), _open(path, max_pixels) as container:
        stream = _best_stream(container, path, max_pixels)
        first, end = None, 0.0
        listed: list[tuple[int | None, int | None, bool]] = []
        for packet in container.demux():
            if packet.size == 0:  # the end
                continue
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index != stream.index or packet.is_discard:
                continue
            if stream.codec_context.name == "vp8" and not bytes(packet)[0] >> 4 & 1:
                continue  # a reference frame that is never shown
            listed.append((packet.pts, packet.dts, packet.is_keyframe))
            if len(listed) > MAX_FRAMES:
                raise VideoError(path, f"holds more than {MAX_FRAMES} frames, the limit")
            if first is None:
                first = next(iter(packet.decode()), None)
        if not listed:
            raise VideoError(path, "holds no video frame")
        if first is None:  # a stream so short that its only frame waits for the end
            first = next(iter(stream.codec_context.decode(None)), None)
        if first is None:
            raise VideoError(path, "no frame of it can be decoded")

        stamps = [pts for pts, _, _ in listed if pts is not None]
        timed = len(set(stamps)) == len(listed)
        keys = np.sort(np.array(stamps)) if timed else np.arange(len(listed))
        seeks = np.array(
            [(pts, dts if dts is not None else pts) for pts, dts, key in listed if key and timed],
            dtype=np.int64,
        ).reshape(-1, 2)
        turned = round(-first.rotation / 90) % 4
        shape = (first.height, first.width)
        rate = stream.average_rate or stream.guessed_rate
        span = float(keys[-1] - keys[0]) * float(stream.time_base) if timed else 0.0
        info = VideoInfo(
            path=path,
            frames=len(listed),
            fps=float(rate) if rate else (len(listed) - 1) / span if span else 0.0,
            height=shape[turned % 2],
            width=shape[1 - turned % 2],
            rotation=turned * 90,
            codec=stream.codec_context.name,
            pixel_format=first.format.name,
            cut=_ends_early(container, stream, len(listed), end),
        )
        return _Index(info, stream.index, keys, seeks[np.argsort(seeks[:, 0])], timed)


def _ends_early(container: Any, stream: Any, frames: int, end: float) -> bool:
    """Whether the packets stop before the header's promise; `end` in seconds, over all streams."""
    if frames < stream.frames:
        return True
    if container.duration is None:
        return False
    promised = ((container.start_time or 0) + container.duration) / 1e6
    return end < promised - max(0.5, 0.05 * promised)


def _decode(
    index: _Index,
    wanted: np.ndarray,
    seek: int | None,
    size: tuple[int, int] | None,
    fit: Fit,
    max_pixels: int,
) -> Tensor | None:
    """Decode the wanted frames, from a seek or from the start; None when one did not come whole."""
    place = {int(key): i for i, key in enumerate(wanted)}
    clip: Tensor | None = None
    with _open(index.info.path, max_pixels) as container:
        stream = container.streams[index.stream]
        stream.codec_context.options = {"max_pixels": str(max_pixels)}
        stream.codec_context.thread_count = 1  # loaders run in parallel over clips
        if seek is not None:
            container.seek(seek, stream=stream)
        for number, frame in enumerate(container.decode(stream)):
            i = place.pop(frame.pts if index.timed else number, None)
            if i is None:
                continue
            if frame.is_corrupt:
                return None
            image = _upright(frame)
            image = image if size is None else resize(image[None], size, fit)[0]
            if clip is None:
                clip = image.new_empty((len(wanted), *image.shape))
            if image.shape != clip.shape[1:]:
                raise VideoError(index.info.path, "changes its size midway: pass size=(H, W)")
            clip[i] = image
            if not place:
                return clip
    return None


def _upright(frame: Any) -> Tensor:
    """A decoded frame as (3, H, W) uint8, RGB, its rotation applied."""
    image = torch.from_numpy(frame.to_ndarray(format="rgb24", threads=1)).permute(2, 0, 1)
    return torch.rot90(image, round(frame.rotation / 90) % 4, (1, 2))


def _open(path: str, max_pixels: int) -> Any:
    import av

    options = {
        "format_whitelist": _FORMATS,
        "protocol_whitelist": "file",
        "max_pixels": str(max_pixels),  # FFmpeg decodes frames to learn what a file holds
    }
    try:  # metadata may hold any bytes; an absolute path is never taken for a protocol
        return av.open(os.path.abspath(path), options=options, metadata_errors="ignore")
    except av.ArgumentError as error:  # the answer of the format list
        raise VideoError(path, f"is none of the formats {_FORMATS}") from error


def _best_stream(container: Any, path: str, max_pixels: int) -> Any:
    """The stream of the largest picture, after a look at what its header promises."""
    streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    if not streams:
        raise VideoError(path, "holds no video stream")
    stream = max(streams, key=lambda s: s.height * s.width)  # the first of equals
    height, width = stream.height, stream.width
    if height * width > max_pixels:
        raise VideoError(path, f"its {height} x {width} frames exceed {max_pixels} pixels")
    if stream.frames > MAX_FRAMES:
        raise VideoError(path, f"claims {stream.frames} frames, more than {MAX_FRAMES}")
    stream.codec_context.options = {"max_pixels": str(max_pixels)}
    stream.codec_context.thread_count = 1
    return stream


@contextmanager
def _one_error(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever a hostile file makes PyAV raise (six kinds were seen) into a VideoError."""
    try:
        yield
    except VideoError:
        raise
    except ImportError as error:
        raise RuntimeError("reading video needs PyAV: pip install 'fastvid[video]'") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(path, f"cannot be read: {reason}") from error


@contextmanager
def _whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`atomic.whole`, with the errors of the disk as VideoError; PyAV's own are OSErrors too."""
    try:
        with whole(path) as part:
            yield part
    except OSError as error:
        raise VideoError(path, f"cannot be written: {error}") from error


def _expect_video(video: Tensor, fps: float) -> None:
    if video.dtype != torch.uint8:
        raise TypeError(f"video must be uint8, got {video.dtype}")
    if video.ndim != 4 or video.shape[1] != 3 or 0 in video.shape:
        raise ValueError(f"video must be (T, 3, H, W), none of them 0, got {tuple(video.shape)}")
    if not 0 < fps < 65536:
        raise ValueError(f"fps must be above 0 frames per second, got {fps}")


def _expect_size(size: tuple[int, int], fit: str) -> None:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be (H, W) in pixels, both >= 1, got {size}")
    if fit not in ("crop", "letterbox"):
        raise ValueError(f'fit must be "crop" or "letterbox", got {fit!r}')
