"""Files and folders that appear under their name only when they are complete."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a hidden name beside `path`, under which the block makes a file or a folder.

    At the end of the block it is flushed to the disk and takes the place of `path`: of a file, or
    of an empty folder. After an error nothing is left. A killed process leaves its hidden name,
    which no later one draws again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        for written in [*part.rglob("*"), part]:
            _flush(written)
        os.replace(part, path)
        _flush(path.parent)
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
