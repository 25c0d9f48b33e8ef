"""torch.distributed.checkpoint, restricted to tensors.

A DCP folder can carry code: torch unpickles `.metadata` and every non-tensor entry without limits.
The reader here admits a list of harmless names in `.metadata` and refuses non-tensor entries.
"""

from __future__ import annotations

import pickle
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

_METADATA = "torch.distributed.checkpoint.metadata"
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_WHOLES = ("int64", "int32", "int16", "int8", "uint8", "bool")
_ALLOWED = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata")),
    *((_METADATA, name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("torch", name) for name in _FLOATS + _WHOLES),
}


class _AllowList(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"refused {module}.{name}")
        return super().find_class(module, name)


class TensorReader(FileSystemReader):
    """Reads a DCP folder that holds tensors and nothing else.

    Raises:
        pickle.UnpicklingError: the folder holds anything more, or points outside itself.
    """

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every tensor in the folder."""
        entries = self.read_metadata().state_dict_metadata
        return {n: e.size for n, e in entries.items() if isinstance(e, TensorStorageMetadata)}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _AllowList(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f".metadata holds a {type(metadata).__name__}")
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise pickle.UnpicklingError(f"refused {name}: not a tensor")
        for index, info in metadata.storage_data.items():
            if Path(info.relative_path).name != info.relative_path:
                raise pickle.UnpicklingError(f"refused {index.fqn}: stored outside the folder")
            if info.transform_descriptors:
                raise pickle.UnpicklingError(f"refused {index.fqn}: stored through a transform")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class TensorWriter(FileSystemWriter):
    """Writes a DCP folder, synced to disk, without the absolute path that DCP would note in it."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()
