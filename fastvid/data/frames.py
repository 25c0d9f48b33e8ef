"""Clips out of folders of images, Cityscapes sequences among them.

Pillow is imported where it is used. It comes with `pip install fastvid[video]`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .video import MAX_PIXELS, Fit, VideoError, resize, shown
from .windows import How, WindowDataset

log = logging.getLogger(__name__)

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm")

_CITYSCAPES = re.compile(r"(?P<city>.+)_(?P<sequence>\d+)_(?P<frame>\d+)_leftImg8bit\.png")


class FrameFolderDataset(WindowDataset):
    """Clips of image sequences as `{"video": (3, T, H, W), "path": str, "start": int}`.

    `video` is float32 in [-1, 1]; `path` is the first image of the sequence, `start` the number of
    the clip's first image in it. An index is an int, which means epoch 0, or the `(epoch, index)`
    of `ResumableSampler`; with the seed it decides the window.

    A sequence that is too short is left out. One with a damaged image counts as bad when the image
    is met, and its turn goes to another sequence, as in `ClipDataset`. `report` names both.

    Args:
        source: a folder of folders of images (see `frame_folders`), or the sequences themselves,
            each a list of image files, as `cityscapes_sequences` gives them.
        frames: T; None takes all frames of every sequence, which must then be equally long.
        size: (H, W) in pixels, fitted as `video.resize` says.
        stride: distance between two frames of a clip, in images.
        windows: "random", a random window of each sequence; "grid", all that lie side by side.
        seed: of the windows and flips.
        hflip: mirror half of the clips, by chance.
        fit: "crop" or "letterbox".
        max_bad: share of bad sequences at which to stop; a single one is always tolerated.
    Raises:
        FileNotFoundError: the folder is missing or holds no images.
        RuntimeError: too many sequences are bad, or none is long enough: the message names them.
        ValueError: an argument makes no sense.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[Sequence[Path]],
        *,
        frames: int | None,
        size: tuple[int, int],
        stride: int = 1,
        windows: How = "random",
        seed: int = 0,
        hflip: bool = False,
        fit: Fit = "crop",
        max_bad: float = 0.1,
    ):
        if isinstance(source, (str, os.PathLike)):
            source, place = frame_folders(source), str(source)
        else:
            place = "the list of sequences"
        sequences = [list(sequence) for sequence in source]
        if frames is None:
            lengths = {len(sequence) for sequence in sequences}
            if len(lengths) > 1:
                raise ValueError(f"sequences have {sorted(lengths)} frames: give frames")
            frames = -(-max(lengths, default=1) // max(stride, 1))
        super().__init__(
            sequences,
            place,
            "sequences",
            frames=frames,
            size=size,
            stride=stride,
            windows=windows,
            seed=seed,
            hflip=hflip,
            fit=fit,
            max_bad=max_bad,
        )

    def _name(self, source: list[Path]) -> str:
        return str(source[0]) if source else "a sequence without images"

    def _length(self, source: list[Path]) -> int:
        return len(source)

    def _read(self, source: list[Path], start: int) -> Tensor:
        images = source[start : start + self._span : self.stride]
        return torch.stack([resize(read_image(p)[None], self.size, self.fit)[0] for p in images])


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read an image as (3, H, W) uint8, RGB, turned upright as its EXIF data say.

    Greyscale of 16 bits is scaled to 8.

    Raises:
        VideoError: it is missing, damaged, no image, larger than `video.MAX_PIXELS`, or holds
            floating-point levels, whose range no file tells.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.height * image.width > MAX_PIXELS:
                raise VideoError(
                    path, f"its {image.height} x {image.width} exceed {MAX_PIXELS} pixels"
                )
            if image.mode == "F":
                raise VideoError(path, "its levels are floating-point numbers of unknown range")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # Pillow itself would clip at 255: all white
                grey = np.rint(np.asarray(image, dtype=np.float64) / 257).clip(0, 255)
                image = Image.fromarray(grey.astype(np.uint8))
            pixels = np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(path, f"cannot be read: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def frame_folders(root: str | os.PathLike[str]) -> list[list[Path]]:
    """Every folder at or below `root` that holds images, as a sequence in natural order.

    Natural order puts `frame2.png` before `frame10.png`. Hidden files and folders are left out.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}")
    found: dict[Path, list[Path]] = {}
    for path in root.rglob("*"):
        if path.suffix.lower() in IMAGES and shown(path, root):
            found.setdefault(path.parent, []).append(path)
    if not found:
        raise FileNotFoundError(f"no image in {root}: looked for {', '.join(IMAGES)}")
    return [sorted(found[folder], key=_natural) for folder in sorted(found, key=_natural)]


def cityscapes_sequences(root: str | os.PathLike[str], length: int = 30) -> list[list[Path]]:
    """The clips of a Cityscapes split: city folders of `city_seq_frame_leftImg8bit.png`.

    Every `length` consecutive frames of a city and sequence are one clip. Frames that belong to no
    whole clip are left out, and the log names them and what is missing between them.

    Args:
        root: a split, such as `leftImg8bit_sequence/train`; images of any size.
        length: frames per clip, 30 in the published set.
    Raises:
        FileNotFoundError: no such folder, no image of that name, or no whole clip; the message
            names the first gap.
    Source: the grouping of Wektor607/VDT.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}")
    named = [(m, p) for p in root.glob("*/*.png") if (m := _CITYSCAPES.fullmatch(p.name))]
    if not named:
        raise FileNotFoundError(f"no */city_seq_frame_leftImg8bit.png in {root}")
    frames = sorted((m["city"], m["sequence"], int(m["frame"]), p) for m, p in named)

    clips: list[list[Path]] = []
    gaps: list[str] = []
    for (city, sequence), group in groupby(frames, key=lambda f: f[:2]):
        previous: int | None = None
        for run in _consecutive((number, path) for _, _, number, path in group):
            whole = len(run) - len(run) % length
            clips += [[path for _, path in run[i : i + length]] for i in range(0, whole, length)]
            if run[whole:] or (previous is not None and run[0][0] - previous < length):
                gaps.append(_describe_gap(city, sequence, previous, run[0][0], run[whole:], length))
            previous = run[-1][0]
    if gaps:
        log.warning("%s: frames outside a whole clip\n%s", root, "\n".join(gaps))
    if not clips:
        raise FileNotFoundError(f"no {length} consecutive frames in {root}: {gaps[0]}")
    return clips


def _consecutive(frames: Iterable[tuple[int, Path]]) -> list[list[tuple[int, Path]]]:
    """Cut numbered frames into runs without a gap."""
    runs: list[list[tuple[int, Path]]] = []
    for number, path in frames:
        if runs and number == runs[-1][-1][0] + 1:
            runs[-1].append((number, path))
        else:
            runs.append([(number, path)])
    return runs


def _describe_gap(
    city: str,
    sequence: str,
    previous: int | None,
    first: int,
    rest: list[tuple[int, Path]],
    length: int,
) -> str:
    """Name the frames that miss before a run, if few enough, and those left over after it."""
    parts = []
    if previous is not None and first - previous < length:
        missing = [f"{city}_{sequence}_{number:06d}" for number in range(previous + 1, first)]
        parts.append(f"missing {', '.join(missing)}")
    if rest:
        parts.append(f"{len(rest)} of {length} frames from {rest[0][1].name}")
    return "; ".join(parts)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """A key that compares digits by value and everything else as text."""
    pieces = re.split(r"(\d+)", str(path))
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in pieces]
