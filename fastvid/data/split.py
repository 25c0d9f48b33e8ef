"""Training and validation files that never meet."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path


def split_files(
    paths: Sequence[str | os.PathLike[str]],
    validation: float = 0.1,
    seed: int = 0,
    *,
    root: str | os.PathLike[str] | None = None,
) -> tuple[list[Path], list[Path]]:
    """Split files by a hash of their names: stable when files are added, moved or re-encoded.

    A file keeps its side whatever else the folder holds, and two files of one name (the same
    footage as .mp4 and .webm) share a side. Sets too small for the share are the exception: of two
    names or more each side gets at least one, the one whose hash lies nearest.

    Args:
        paths: the files.
        validation: share of names for validation, in [0, 1).
        seed: another seed, another split.
        root: the name is the path below this folder, without its suffix; None takes the file's
            name alone, so that the folder does not matter.
    Returns:
        training and validation files, each in the order of `paths`.
    Raises:
        ValueError: no files, a share outside [0, 1), a path outside `root`, or one name for all.
    """
    if not 0 <= validation < 1:
        raise ValueError(f"validation must be a share in [0, 1), got {validation}")
    if not paths:
        raise ValueError("paths is empty: nothing to split")
    files = [Path(p) for p in paths]
    names = [(Path(p.name) if root is None else p.relative_to(root)).with_suffix("") for p in files]
    if len(files) > 1 and len(set(names)) == 1 and validation:
        raise ValueError(
            f"all {len(files)} paths are named {names[0]}: pass root, to tell them by their folders"
        )
    place = {name: _place(seed, name.as_posix()) for name in names}
    held = {name for name in place if place[name] < validation}
    if len(place) == len(held):
        held.discard(max(held, key=place.__getitem__))
    if not held and validation and len(place) > 1:
        held = {min(place, key=place.__getitem__)}
    train = [p for p, name in zip(files, names, strict=True) if name not in held]
    return train, [p for p, name in zip(files, names, strict=True) if name in held]


def _place(seed: int, name: str) -> float:
    """A fixed number in [0, 1) for a name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
