"""The two sets of VIDIM-Bench, from local copies of DAVIS and UCF-101: clips of 9 frames as PNG.

    OUT/0000/frame_000.png ... frame_008.png, OUT/0001/...

Source: Jain et al., VIDIM, arXiv:2404.01203, and what its dataset scripts are described to do:
consecutive frames in chunks of 9 that share none, an unfinished last chunk dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .frames import read_image
from .video import find_videos, probe, read_clip

FRAMES, SIDE = 9, 256
COUNTS = {"davis": 357, "ucf101": 400}  # clips; the paper says 400 of DAVIS, its script 357
_GAMMA = 2.2


def prepare_davis(folder: str | Path, out: str | Path, *, count: int | None = 357) -> int:
    """Every shot of `folder/JPEGImages/480p`, cut square, made 256 pixels wide in linear light.

    Args:
        folder: DAVIS (2017, trainval, 480p): one folder of JPEGs per shot.
        out: must not exist.
        count: how many clips there have to be; None takes what there is.
    Returns:
        the number of clips.
    Raises:
        ValueError: another number of clips, or no shot at all.
        FileExistsError: `out` is there.
    """
    root = Path(folder, "JPEGImages", "480p")
    shots = [sorted(shot.glob("*.jpg")) for shot in sorted(root.glob("*"))]

    def clips() -> Iterator[Tensor]:
        for shot in shots:
            for start in range(0, len(shot) - FRAMES + 1, FRAMES):
                frames = shot[start : start + FRAMES]
                yield torch.stack([square_in_linear_light(read_image(path)) for path in frames])

    found = sum(len(shot) // FRAMES for shot in shots)
    _expect_count(found, count, f"{root} (one folder of JPEGs per shot)")
    return _write(clips(), out)


def prepare_ucf101(folder: str | Path, out: str | Path, *, count: int | None = 400) -> int:
    """The first `count` clips of the first test split, frames stretched to 256 x 256.

    TensorFlow Datasets, which the published scores were made with, keeps its videos in an order of
    its own, so its first 400 clips are others; the count, which biases FVD, is the same. Clips made
    by the published script can be scored as they are.

    Args:
        folder: UCF-101: `ucfTrainTestlist/testlist01.txt`, and the videos it names at any depth.
        out, count: as in `prepare_davis`.
    """
    listing = Path(folder, "ucfTrainTestlist", "testlist01.txt")
    if not listing.is_file():
        raise ValueError(f"{listing} is missing: it says which videos are the test split")
    names = [Path(line.split()[0]).name for line in listing.read_text().splitlines() if line]
    videos = {path.name: path for path in find_videos(folder)}
    if missing := [name for name in names if name not in videos]:
        raise ValueError(f"{folder} lacks {len(missing)} videos of the test split: {missing[0]}")

    def starts() -> Iterator[tuple[Path, int]]:
        for name in names:
            frames = probe(videos[name]).frames
            yield from ((videos[name], at) for at in range(0, frames - FRAMES + 1, FRAMES))

    chosen = list(islice(starts(), count))
    _expect_count(len(chosen), count, f"{folder}")
    return _write((_stretched(read_clip(path, at, FRAMES)) for path, at in chosen), out)


def prepared(folder: str | Path, *, count: int | None = None) -> list[list[Path]]:
    """The frames of every clip in a folder of either function, or of the published scripts.

    Raises:
        ValueError: a clip has not 9 frames, or there are not `count` clips.
    """
    clips = [sorted(clip.glob("frame_*.png")) for clip in sorted(Path(folder).glob("[0-9]*"))]
    for clip in clips:
        if len(clip) != FRAMES:
            raise ValueError(f"every clip in {folder} must have {FRAMES} frames, got {len(clip)}")
    _expect_count(len(clips), count, str(folder))
    return clips


def square_in_linear_light(image: Tensor) -> Tensor:
    """(3, H, W) uint8 to (3, 256, 256): the centre, by area if it shrinks, by cubics if it grows.

    Levels are taken to the power 2.2 before and back after, so that light is averaged.
    """
    side = min(image.shape[1:])
    top, left = ((size - side) // 2 for size in image.shape[1:])
    light = (image[:, top : top + side, left : left + side].double() / 255) ** _GAMMA
    if side > SIDE:
        weights = _area(side, SIDE)
        light = weights @ light @ weights.T
    elif side < SIDE:
        light = F.interpolate(light[None], (SIDE, SIDE), mode="bicubic")[0].clamp(0, 1)
    return (light ** (1 / _GAMMA) * 255).round().to(torch.uint8)


def _area(size: int, smaller: int) -> Tensor:
    """(smaller, size) shares of each old pixel in each new one, rows of sum 1, float64."""
    edges = torch.arange(smaller + 1, dtype=torch.float64) * (size / smaller)
    pixels = torch.arange(size, dtype=torch.float64)
    ends = torch.minimum(edges[1:, None], pixels + 1)
    covered = (ends - torch.maximum(edges[:-1, None], pixels)).clamp_min(0)
    return covered * (smaller / size)


def _stretched(frames: Tensor) -> Tensor:
    """(9, 3, H, W) uint8 to 256 x 256 whatever the shape, as the published frames are stored."""
    made = F.interpolate(frames.float(), (SIDE, SIDE), mode="bicubic", antialias=True)
    return made.round().clamp(0, 255).to(torch.uint8)


def _expect_count(found: int, count: int | None, where: str) -> None:
    if not found or count not in (None, found):
        wanted = "at least one clip" if count is None else f"{count} clips"
        raise ValueError(f"{where} must hold {wanted} of {FRAMES} frames, got {found}")


def _write(clips: Iterable[Tensor], out: str | Path) -> int:
    """Write clips (9, 3, H, W) uint8 under a temporary name, then rename."""
    from PIL import Image

    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another folder")
    part, number = out.with_name(f".{out.name}.part"), -1
    for number, clip in enumerate(clips):
        (part / f"{number:04d}").mkdir(parents=True, exist_ok=True)
        for index, frame in enumerate(clip):
            image = Image.fromarray(frame.permute(1, 2, 0).numpy())
            image.save(part / f"{number:04d}" / f"frame_{index:03d}.png")
    part.rename(out)
    return number + 1
