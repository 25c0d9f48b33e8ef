"""Motion clips made from nothing: coloured shapes that drift, bounce and pass over one another.

They are written once as real video files and read back through the reader of `video.py`, so a model
trained on them sees what a model trained on footage sees, compression included.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .atomic import whole
from .video import write_mp4

RECORD = "clips.json"  # what a folder was made from, and its files with their SHA-256
_VERSION = 1  # of the drawing: a change makes old folders stale


def make_motion_clips(
    folder: str | os.PathLike[str],
    *,
    clips: int = 200,
    frames: int = 32,
    size: int | tuple[int, int] = 32,
    seed: int = 0,
    shapes: tuple[int, int] = (2, 3),
    radius: tuple[float, float] = (0.12, 0.24),
    speed: tuple[float, float] = (0.03, 0.09),
    acceleration: float = 0.0,
    spin: float = 0.1,
    texture: float = 0.5,
    fps: float = 12,
    quality: int = 6,
) -> list[Path]:
    """Fill a folder with motion clips, or find that it already holds them.

    Deterministic by its arguments. The folder appears only when every clip is written. A folder
    that an earlier call filled with other settings is replaced; one with anything else in it is
    left alone.

    Args:
        folder: where the files go.
        clips, frames: how many clips, and frames in each.
        size: side, or (H, W), in pixels; even, as the files need it.
        seed: another seed, other clips.
        shapes: fewest and most shapes in a clip; the later ones pass in front of the earlier.
        radius: least and greatest half extent of a shape, as a share of the smaller side.
        speed: least and greatest speed, in smaller sides per frame: at 0.1 a shape crosses the
            picture in ten frames, and blending two frames four apart shows it twice.
        acceleration: greatest change of speed, in smaller sides per frame and frame.
        spin: greatest turn of boxes and triangles, in radians per frame.
        texture: strength of the soft pattern on the background, 0 to 1; 0 leaves it plain.
        fps: frames per second that the files state.
        quality: of `write_mp4`; 6 leaves next to no compression noise.
    Returns:
        The paths, in order.
    Raises:
        ValueError: a range is empty, a size is odd, or the folder holds files of its own.
        VideoError: a file could not be written.
    """
    H, W = (size, size) if isinstance(size, int) else size
    if min(clips, frames, H, W) < 1 or H % 2 or W % 2:
        raise ValueError(
            f"clips and frames must be >= 1, size even, got clips={clips}, frames={frames}, "
            f"size={(H, W)}"
        )
    for name, (low, high) in {"shapes": shapes, "radius": radius, "speed": speed}.items():
        if not 0 <= low <= high:
            raise ValueError(f"{name} must be (least, greatest), got {(low, high)}")
    if radius[1] >= 0.5:
        raise ValueError(f"radius must stay below 0.5 of the smaller side, got {radius}")
    settings: dict[str, Any] = {
        "version": _VERSION,
        "clips": clips,
        "frames": frames,
        "size": [H, W],
        "seed": seed,
        "shapes": list(shapes),
        "radius": list(radius),
        "speed": list(speed),
        "acceleration": acceleration,
        "spin": spin,
        "texture": texture,
        "fps": fps,
        "quality": quality,
    }
    folder = Path(folder)
    names = [f"clip-{i:05d}.mp4" for i in range(clips)]
    if _holds(folder, settings, names):
        return [folder / name for name in names]
    if folder.exists() and any(folder.iterdir()) and not _made_here(folder):
        raise ValueError(f"folder {folder} holds other files: give an empty or a new one")

    with whole(folder) as part:
        digests = {}
        for i, name in enumerate(names):
            video = draw_motion(
                np.random.default_rng([seed, i]),
                frames=frames,
                size=(H, W),
                shapes=shapes,
                radius=radius,
                speed=speed,
                acceleration=acceleration,
                spin=spin,
                texture=texture,
            )
            write_mp4(part / name, video, fps, quality=quality, key_every=8)
            digests[name] = _digest(part / name)
        (part / RECORD).write_text(json.dumps({"settings": settings, "files": digests}, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
    return [folder / name for name in names]


def draw_motion(
    rng: np.random.Generator,
    *,
    frames: int,
    size: tuple[int, int],
    shapes: tuple[int, int],
    radius: tuple[float, float],
    speed: tuple[float, float],
    acceleration: float,
    spin: float,
    texture: float,
) -> Tensor:
    """Draw one clip; arguments as in `make_motion_clips`.

    Every shape follows its path as if there were no walls, and the path is folded back into the
    picture: that is the bounce. Edges are drawn at sub-pixel places by the share of a pixel that
    they cover.

    Returns:
        (frames, 3, H, W) uint8.
    """
    H, W = size
    side = min(H, W)
    y, x = np.meshgrid(np.arange(H) + 0.5, np.arange(W) + 0.5, indexing="ij")
    t = np.arange(frames)[:, None, None]
    picture = np.broadcast_to(_background(rng, y / side, x / side, texture), (frames, H, W, 3))

    for _ in range(rng.integers(shapes[0], shapes[1] + 1)):
        kind = rng.integers(3)
        r = side * rng.uniform(*radius)
        pace, heading = side * rng.uniform(*speed), rng.uniform(0, 2 * math.pi)
        push, toward = side * rng.uniform(0, acceleration), rng.uniform(0, 2 * math.pi)
        start_y, start_x = rng.uniform(r, H - r), rng.uniform(r, W - r)
        path_y = start_y + pace * math.sin(heading) * t + push * math.sin(toward) * t * t / 2
        path_x = start_x + pace * math.cos(heading) * t + push * math.cos(toward) * t * t / 2
        dy, dx = y - _bounce(path_y, r, H - r), x - _bounce(path_x, r, W - r)
        angle = rng.uniform(0, 2 * math.pi) + rng.uniform(-spin, spin) * t
        u = np.cos(angle) * dx + np.sin(angle) * dy  # in the frame of the shape, [T, H, W]
        v = np.cos(angle) * dy - np.sin(angle) * dx
        outside = (_disc, _box, _triangle)[kind](u, v, r)
        cover = np.clip(0.5 - outside, 0, 1)[..., None]
        picture = picture + cover * (_colour(rng) - picture)

    levels = np.rint(255 * np.clip(picture, 0, 1)).astype(np.uint8)
    return torch.from_numpy(levels).permute(0, 3, 1, 2).contiguous()


def _bounce(path: np.ndarray, low: float, high: float) -> np.ndarray:
    """Fold a straight path into [low, high], as a mirror at both walls does."""
    span = high - low
    return low + span - np.abs((path - low) % (2 * span) - span)


# Signed distance to an edge in pixels, negative inside; `r` is the reach from the centre.
def _disc(u: np.ndarray, v: np.ndarray, r: float) -> np.ndarray:
    return np.hypot(u, v) - r


def _box(u: np.ndarray, v: np.ndarray, r: float) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - r / math.sqrt(2)


def _triangle(u: np.ndarray, v: np.ndarray, r: float) -> np.ndarray:
    slant = math.sqrt(3) / 2
    return np.maximum(np.maximum(-v, slant * u + v / 2), v / 2 - slant * u) - r / 2


def _colour(rng: np.random.Generator) -> np.ndarray:
    """A saturated colour of random hue, (3,) in [0, 1]."""
    hue = rng.uniform(0, 1) + np.array([0, 1 / 3, 2 / 3])
    full = np.clip(np.abs(6 * (hue % 1) - 3) - 1, 0, 1)
    return rng.uniform(0.75, 1) * (1 - rng.uniform(0.7, 1) * (1 - full))


def _background(
    rng: np.random.Generator, y: np.ndarray, x: np.ndarray, texture: float
) -> np.ndarray:
    """A dim plain colour under a few slow waves, (H, W, 3) in [0, 1]."""
    base = rng.uniform(0.1, 0.4, 3)
    waves = np.zeros((*y.shape, 3))
    for _ in range(3):
        fy, fx = rng.uniform(-2, 2, 2)
        phase = rng.uniform(0, 2 * math.pi)
        waves += np.sin(2 * math.pi * (fy * y + fx * x) + phase)[..., None] * rng.uniform(0, 1, 3)
    return base * (1 + texture * waves / 3)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("files"), dict) else None


def _holds(folder: Path, settings: dict[str, Any], names: list[str]) -> bool:
    """Whether the folder holds exactly these clips, byte for byte as they were written."""
    record = _read_record(folder)
    if record is None or record.get("settings") != json.loads(json.dumps(settings)):
        return False
    digests = record["files"]
    return set(digests) == set(names) and all(
        (folder / name).is_file() and _digest(folder / name) == digests[name] for name in names
    )


def _made_here(folder: Path) -> bool:
    """Whether everything in the folder was made by an earlier call, so that it may be replaced."""
    record = _read_record(folder)
    return record is not None and {p.name for p in folder.iterdir()} <= {RECORD, *record["files"]}
