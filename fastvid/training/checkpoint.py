"""Training state on disk: written whole or not at all, checked before it is read.

    checkpoints/step-00001000/
        __0_0.distcp ...   tensors, one file per rank (torch.distributed.checkpoint)
        .metadata          where each tensor lies
        state.json         everything that is no tensor
        manifest.json      size and SHA-256 of each file above, step, world size, versions

A checkpoint is written to `step-00001000.tmp/`, synced, listed in its manifest and then renamed: a
name without `.tmp` is always complete. torch unpickles such folders without limits; `load_state`
admits tensors only, and nothing in a planted folder runs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

import fastvid
from fastvid.training.distributed import World, local, on_first
from fastvid.training.tensors_only import TensorReader, TensorWriter

ALONE = World(0, 1, torch.device("cpu"))
_MANIFEST, _STATE = "manifest.json", "state.json"
_NAME = re.compile(r"step-(\d{8})")
_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not what its manifest says."""


def save_state(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    *,
    world: World = ALONE,
    config_hash: str = "",
) -> Path:
    """Write `folder/step-<step>`, all of it or nothing. Every rank calls this.

    Args:
        tensors: flat; plain ones must be equal on all ranks unless their names differ by rank.
        state: anything JSON can hold.
    Returns:
        The finished folder.
    Raises:
        TypeError: one of `tensors` is none.
        CheckpointError: it could not be written (disk full, no permission). Older checkpoints are
            untouched and nothing unfinished stays behind.
    """
    final = folder / f"step-{step:08d}"
    unfinished = final.with_name(final.name + ".tmp")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors must be tensors, {name} is a {type(tensor).__name__}")
    nbytes = sum(local(t).nbytes for t in tensors.values())

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        unfinished.mkdir()

    def finish() -> None:
        _write_synced(unfinished / _STATE, json.dumps(state, indent=1))
        manifest = {
            "step": step,
            "world_size": world.size,
            "config": config_hash,
            "versions": {"fastvid": fastvid.__version__, "torch": torch.__version__},
            "files": _digests(unfinished, sorted(p.name for p in unfinished.iterdir())),
        }
        _write_synced(unfinished / _MANIFEST, json.dumps(manifest, indent=1))
        _sync_folder(unfinished)
        if final.exists():
            shutil.rmtree(final)
        unfinished.rename(final)
        _sync_folder(folder)

    try:
        on_first(world, prepare)
        with _quiet():
            dcp.save(tensors, storage_writer=TensorWriter(unfinished), no_dist=world.mesh is None)
        on_first(world, finish)
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        if world.first:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(
            f"could not save {final}: it needs {nbytes:,} bytes per process, {_free(folder)} are "
            f"free; older checkpoints are kept ({_cause(error)})"
        ) from error
    return final


def load_state(
    path: Path,
    tensors: dict[str, Tensor],
    *,
    optional: Collection[str] = (),
    world: World = ALONE,
    verified: bool = False,
) -> dict[str, Any]:
    """Fill `tensors` in place from a checkpoint and return its state. Every rank calls this.

    The world may have another size than the one that saved. Names in `optional` stay as they are
    when the checkpoint lacks them. `verified` says that `verify` or `latest` has just read it: the
    files, which may be many gigabytes, are not hashed again.

    Raises:
        CheckpointError: a file is missing, shorter or changed, a tensor is missing or has another
            shape, or the folder holds anything but tensors. The message names which.
    """
    if not verified:
        on_first(world, lambda: verify(path))
    try:
        reader = TensorReader(path)
        wanted = {n: t for n, t in tensors.items() if n in reader.shapes or n not in optional}
        for name, tensor in wanted.items():
            if name not in reader.shapes:
                raise CheckpointError(f"{path} has no tensor {name}")
            if (shape := reader.shapes[name]) != tensor.shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(shape)} in {path}, needs {tuple(tensor.shape)}"
                )
        with _quiet():
            dcp.load(wanted, storage_reader=reader, no_dist=world.mesh is None)
    except CheckpointError:
        raise
    except (Exception, dcp.CheckpointException) as error:  # the second is no Exception
        raise CheckpointError(f"could not read {path}: {_cause(error)}") from error
    return json.loads((path / _STATE).read_text(encoding="utf-8"))


def verify(path: Path) -> dict[str, Any]:
    """Compare every file with the manifest and return the manifest.

    Raises:
        CheckpointError: naming the first file that is missing, of another size or changed.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        files = {
            name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()
        }
    except FileNotFoundError as error:
        raise CheckpointError(f"{path / _MANIFEST} is missing: no finished checkpoint") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / _MANIFEST} is damaged: {error}") from error
    for name, (size, _) in files.items():
        if Path(name).name != name:
            raise CheckpointError(f"{path / _MANIFEST} names a file outside the checkpoint: {name}")
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing")
        if (path / name).stat().st_size != size:
            raise CheckpointError(
                f"{path / name} has {(path / name).stat().st_size:,} bytes, saved were {size:,}"
            )
    for name in (_STATE, ".metadata"):
        if name not in files:
            raise CheckpointError(f"{path / _MANIFEST} does not list {name}")
    found = _digests(path, files)
    for name, (_, digest) in files.items():
        if found[name]["sha256"] != digest:
            raise CheckpointError(f"{path / name} was changed after it was saved (SHA-256 differs)")
    return manifest


def checkpoints(folder: Path) -> dict[int, Path]:
    """Finished checkpoints by step, oldest first, unchecked."""
    found = [(m, p) for p in folder.glob("step-*") if (m := _NAME.fullmatch(p.name))]
    return {int(match[1]): path for match, path in sorted(found, key=lambda pair: pair[1].name)}


def latest(folder: Path) -> Path | None:
    """The newest checkpoint whose manifest checks; damaged ones are passed over with a warning."""
    for path in reversed(checkpoints(folder).values()):
        try:
            verify(path)
        except CheckpointError as error:
            _log.warning("passing over a damaged checkpoint: %s", error)
            continue
        return path
    return None


def prune(folder: Path, step: int, keep: int, best: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints up to `step`, just saved, and that of `best`.

    Later ones go too: the run passed them over as damaged, or it would be further on.
    """
    found = checkpoints(folder)
    kept = {*[number for number in found if number <= step][-keep:], best}
    for number, path in found.items():
        if number not in kept:
            # Renamed first: a deletion cut short must not leave a damaged checkpoint.
            doomed = path.with_name(path.name + ".tmp")
            path.rename(doomed)
            shutil.rmtree(doomed)


def _digests(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    def digest(name: str) -> tuple[str, dict[str, Any]]:
        sha256 = hashlib.sha256()
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 20):
                sha256.update(block)
            return name, {"size": file.tell(), "sha256": sha256.hexdigest()}

    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        return dict(pool.map(digest, names))


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns of a world of one, which is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path)


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number"


def _cause(error: BaseException) -> str:
    """The message at the root of DCP's wrapped errors."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}"
