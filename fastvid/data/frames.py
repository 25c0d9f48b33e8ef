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
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .video import Fit, VideoError, resize

log = logging.getLogger(__name__)

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm")

_CITYSCAPES = re.compile(r"(?P<city>.+)_(?P<sequence>\d+)_(?P<frame>\d+)_leftImg8bit\.png")


class FrameFolderDataset(torch.utils.data.Dataset):
    """Clips of image sequences as `{"video": (3, T, H, W), "path": str, "start": int}`.

    `video` is float32 in [-1, 1]; `path` is the first image of the sequence, `start` the number of
    the clip's first image in it. An index is an int, which means epoch 0, or the `(epoch, index)`
    of `ResumableSampler`; with the seed it decides the window.

    Args:
        source: a folder of folders of images (see `frame_folders`), or the sequences themselves,
            each a list of image files, as `cityscapes_sequences` gives them.
        frames: T; None takes all frames of every sequence, which must then be equally long.
        size: (H, W) in pixels, fitted as `video.resize` says.
        stride: distance between two frames of a clip, in images.
        windows: "random", a random window of each sequence; "first", the one at its start.
        seed: of the windows and flips.
        hflip: mirror half of the clips, by chance.
        fit: "crop" or "letterbox".
    Raises:
        FileNotFoundError: the folder is missing or holds no images.
        ValueError: a sequence is too short (it is named), or an argument makes no sense.
        VideoError: when an item is read: an image is damaged; it is named.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[Sequence[Path]],
        *,
        frames: int | None,
        size: tuple[int, int],
        stride: int = 1,
        windows: Literal["random", "first"] = "random",
        seed: int = 0,
        hflip: bool = False,
        fit: Fit = "crop",
    ):
        if stride < 1 or seed < 0 or min(size) < 1 or (frames is not None and frames < 1):
            raise ValueError(
                "frames, stride and size must be >= 1, seed >= 0, "
                f"got frames={frames}, stride={stride}, size={size}, seed={seed}"
            )
        if windows not in ("random", "first"):
            raise ValueError(f'windows must be "random" or "first", got {windows!r}')
        if isinstance(source, (str, os.PathLike)):
            source = frame_folders(source)
        self.sequences = [list(sequence) for sequence in source]
        if not self.sequences:
            raise ValueError("source is an empty list of sequences")
        if frames is None:
            lengths = {len(sequence) for sequence in self.sequences}
            if len(lengths) > 1:
                raise ValueError(f"sequences have {sorted(lengths)} frames: give frames")
            frames = -(-lengths.pop() // stride)
        self.frames, self.size, self.stride = frames, size, stride
        self.windows, self.seed, self.hflip = windows, seed, hflip
        self.fit: Fit = fit
        self._span = (frames - 1) * stride + 1
        for sequence in self.sequences:
            if len(sequence) < self._span:
                where = sequence[0].parent if sequence else "an empty sequence"
                raise ValueError(
                    f"{where} holds {len(sequence)} images, a clip needs {self._span} "
                    f"({frames} frames at stride {stride})"
                )

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = index if isinstance(index, tuple) else (0, index)
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        sequence = self.sequences[index]
        rng = np.random.default_rng([self.seed, epoch, index])
        last = len(sequence) - self._span
        start = int(rng.integers(last + 1)) if self.windows == "random" else 0
        images = sequence[start : start + self._span : self.stride]
        clip = torch.stack([resize(read_image(p)[None], self.size, self.fit)[0] for p in images])
        if self.hflip and rng.random() < 0.5:
            clip = clip.flip(-1)
        video = clip.transpose(0, 1).float().div_(127.5).sub_(1)
        return {"video": video.contiguous(), "path": str(sequence[0]), "start": start}


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read an image as (3, H, W) uint8, RGB.

    Raises:
        VideoError: it is missing, damaged or no image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(path, f"cannot be read: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def frame_folders(root: str | os.PathLike[str]) -> list[list[Path]]:
    """Every folder at or below `root` that holds images, as a sequence in natural order.

    Natural order puts `frame2.png` before `frame10.png`.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}")
    found: dict[Path, list[Path]] = {}
    for path in root.rglob("*"):
        if path.suffix.lower() in IMAGES and not path.name.startswith("."):
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
