"""Weights that others saved: a file, a folder with one file or an index of shards, or a dict."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvid.modules.hub import read_json, read_weights

_PATTERNS = ("*.index.json", "*.safetensors", "*.bin", "*.pt", "*.pth")  # the first that is there


def read(source: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, a folder or a dict; files are never allowed to run code.

    Raises:
        FileNotFoundError: there is no such file, or a shard of an index is missing.
        ValueError: a file is truncated, or something else than tensors; a folder holds several.
        TypeError: what it or `source` holds is no dict of tensors.
    """
    origin = str(source) if isinstance(source, str | Path) else "source"
    state = _load(Path(source)) if isinstance(source, str | Path) else source
    if not isinstance(state, Mapping):
        raise TypeError(f"{origin} must hold a dict of tensors, got {type(state).__name__}")
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        keys = ", ".join(map(str, state))
        raise TypeError(
            f"{origin} must hold tensors under the official names, got {others[0]!r}: "
            f"{type(state[others[0]]).__name__}, among the keys {keys:.200}; pass the inner dict"
        )
    return dict(state)


def _load(path: Path) -> Any:
    if path.is_dir():
        path = _weights_in(path)
    if path.name.endswith(".index.json"):
        return _load_shards(path)
    if path.suffix == ".safetensors":
        return read_weights(path)
    whole = zipfile.is_zipfile(path)  # what torch.save writes since 1.6; only this can be mapped
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=whole)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of any type, as bytes that are no checkpoint may mean anything
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a whole checkpoint of tensors: {reason}") from error


def _weights_in(folder: Path) -> Path:
    for pattern in _PATTERNS:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"{folder} holds several weights, name one file: {names}")
        if found:
            return found[0]
    raise FileNotFoundError(f"{folder} holds no weights: none of {', '.join(_PATTERNS)}")


def _load_shards(index: Path) -> dict[str, Tensor]:
    """The tensors that an index names, each from the shard that it says."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard for shard in places.values()
    ):
        raise ValueError(f"{index} must hold a weight_map from tensors to files beside it")
    state: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        path = index.parent / shard
        if not path.is_file():
            raise FileNotFoundError(f"{path}, a shard of {index.name}, is missing")
        found = _load(path)
        wanted = [name for name, its_shard in places.items() if its_shard == shard]
        if absent := [name for name in wanted if name not in found]:
            raise ValueError(f"{path} lacks {', '.join(absent)}, which {index.name} says it holds")
        state |= {name: found[name] for name in wanted}
    return state
