"""Encoded clips on disk: written once, read by every epoch after.

A folder holds safetensors shards and `index.json`, which names the codec, the shards with their
SHA-256 and every clip. The folder gets its name only when all of it is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .atomic import whole

INDEX = "index.json"
_FORMAT = "fastvid-latents-1"
_SHARD = re.compile(r"latents-\d{5}\.safetensors")


class LatentWriter:
    """Write a latent folder, whole or not at all.

        with LatentWriter(folder, codec={"name": "pixel", "factor": 4}) as writer:
            writer.add(latents, path="clips/rabbit.mp4", start=0)

    Leaving the block without an error gives the folder its name. With an error nothing is left.

    Args:
        folder: must not exist, or be empty.
        codec: what decodes these latents, as JSON-able data: its name, its configuration, the
            SHA-256 of its weights. Readers compare it as a whole.
        per_shard: clips per file.
    Raises:
        FileExistsError: the folder holds something.
        OSError: the disk is full or refuses; the message names the file.
        ValueError: when the block ends: no clip was added.
    """

    def __init__(
        self, folder: str | os.PathLike[str], codec: dict[str, Any], *, per_shard: int = 256
    ):
        if per_shard < 1:
            raise ValueError(f"per_shard must be >= 1, got {per_shard}")
        self.folder = Path(folder)
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise FileExistsError(f"{self.folder} exists and is not an empty folder")
        self.codec = json.loads(json.dumps(codec))
        self.per_shard = per_shard
        self._whole = whole(self.folder)
        self._waiting: dict[str, Tensor] = {}
        self._shards: list[dict[str, Any]] = []
        self._items: list[dict[str, Any]] = []

    def add(self, latents: Tensor, *, path: str, start: int) -> None:
        """Append a clip: latents (C, T, H, W), the file it came from, its first frame there."""
        if latents.ndim != 4:
            raise ValueError(f"latents must be (C, T, H, W), got {tuple(latents.shape)}")
        key = f"{len(self._items):08d}"
        self._waiting[key] = latents.detach().cpu().clone(memory_format=torch.contiguous_format)
        self._items.append(
            {"shard": len(self._shards), "key": key, "path": str(path), "start": int(start)}
        )
        if len(self._waiting) == self.per_shard:
            self._flush()

    def __enter__(self) -> LatentWriter:
        self._part = self._whole.__enter__()
        self._part.mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with ExitStack() as stack:
            stack.push(self._whole)  # exits last: with no error it publishes, else it removes
            if error is not None:
                raise error
            self._finish()

    def _finish(self) -> None:
        if not self._items:
            raise ValueError(f"no clip was added to {self.folder}")
        self._flush()
        index = {
            "format": _FORMAT,
            "codec": self.codec,
            "shards": self._shards,
            "items": self._items,
        }
        with _disk_errors(self.folder / INDEX):
            (self._part / INDEX).write_text(json.dumps(index, indent=1))

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if not self._waiting:
            return
        name = f"latents-{len(self._shards):05d}.safetensors"
        with _disk_errors(self.folder / name):
            save_file(self._waiting, self._part / name)
        self._shards.append({"file": name, "sha256": _digest(self._part / name)})
        self._waiting = {}


class LatentDataset(torch.utils.data.Dataset):
    """Clips of a latent folder as `{"latents": (C, T, H, W), "path": str, "start": int}`.

    An index is an int or the `(epoch, index)` of `ResumableSampler`; epochs are all the same.

    Args:
        folder: what `LatentWriter` wrote.
        codec: the codec that the model will decode with; None takes what the folder names.
        verify: check the SHA-256 of every shard now, which reads the whole folder once.
    Raises:
        FileNotFoundError: no such folder, or no index or shard in it.
        ValueError: another codec made it (both are named), the index is malformed, names a file
            outside the folder, or a shard was changed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        codec: dict[str, Any] | None = None,
        verify: bool = True,
    ):
        self.folder = Path(folder)
        source = self.folder / INDEX
        if not source.is_file():
            raise FileNotFoundError(f"no {INDEX} in {self.folder}: not a finished latent folder")
        try:
            index = json.loads(source.read_text())
            if index["format"] != _FORMAT:
                raise ValueError(f"format must be {_FORMAT}, got {index['format']}")
            self.codec: dict[str, Any] = index["codec"]
            self._shards = [self._shard(entry["file"]) for entry in index["shards"]]
            self._digests = [str(entry["sha256"]) for entry in index["shards"]]
            self._items = [
                (
                    _below(len(self._shards), item["shard"]),
                    str(item["key"]),
                    item["path"],
                    item["start"],
                )
                for item in index["items"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{source} is malformed: {error!r}") from error
        if not self._items:
            raise ValueError(f"{source} lists no clip")
        if codec is not None and json.loads(json.dumps(codec)) != self.codec:
            raise ValueError(f"{self.folder} was encoded with codec {self.codec}, not with {codec}")
        for shard, digest in zip(self._shards, self._digests, strict=True):
            if not shard.is_file():
                raise FileNotFoundError(f"shard {shard} is missing")
            if verify and _digest(shard) != digest:
                raise ValueError(f"shard {shard} is not what was written: its SHA-256 differs")

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        index = index[1] if isinstance(index, tuple) else index
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        shard, key, path, start = self._items[index]
        latents = _opened(self._shards[shard], self._digests[shard]).get_tensor(key)
        return {"latents": latents, "path": path, "start": start}

    def _shard(self, name: str) -> Path:
        """A file of the folder itself: names that lead elsewhere are refused, links too."""
        if not _SHARD.fullmatch(name) or (self.folder / name).is_symlink():
            raise ValueError(f"shard {name!r} is not latents-00000.safetensors in the folder")
        return self.folder / name


@lru_cache(maxsize=64)
def _opened(shard: Path, digest: str) -> Any:
    """A shard mapped into memory, kept open by each process; a rewritten one is opened anew."""
    from safetensors import safe_open

    return safe_open(shard, framework="pt")


def _below(count: int, number: Any) -> int:
    if not isinstance(number, int) or not 0 <= number < count:
        raise ValueError(f"a shard number must be in [0, {count}), got {number!r}")
    return number


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn what safetensors and the system say of a full disk into one error with the path."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
