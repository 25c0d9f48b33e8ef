"""One process or many: the process group, FSDP2, and the few things ranks tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class World:
    """The processes of a run. Alone: rank 0 of size 1 and no mesh."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def autocast(self, precision: str) -> torch.autocast:
        """Where "bf16" computes in bfloat16; "fp32" changes nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def join(device: str = "auto") -> Iterator[World]:
    """The world that torchrun's environment describes, or a world of one.

    A process group that is there already is used and left alone.

    Args:
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
    Raises:
        RuntimeError: CUDA was asked for and is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "run.device is 'cuda' but torch sees no CUDA device; use 'cpu' or 'auto'"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    place = torch.device(device)
    if device == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(place)
    if size == 1:
        yield World(rank, size, place)
        return
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield World(rank, size, place, init_device_mesh(device, (size,), mesh_dim_names=("data",)))
        dist.barrier()  # a rank that leaves early takes its neighbours down
    finally:
        if own:
            dist.destroy_process_group()


def shard(model: nn.Module, world: World) -> nn.Module:
    """Split parameters, gradients and optimiser state over the mesh, block by block (FSDP2).

    A world of one wraps nothing.
    """
    if world.mesh is not None:
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=world.mesh)
        fully_shard(model, mesh=world.mesh)
        for method in getattr(model, "forward_methods", ()):
            register_fsdp_forward_method(model, method)
    return model


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together; a plain one as it is. Every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a plain one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total(values: list[float] | Tensor, world: World) -> Tensor:
    """Sum of every rank's numbers (float64, on the CPU)."""
    values = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    if world.mesh is not None:
        dist.all_reduce(values)
    return values


def on_first(world: World, action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 alone and return its result there, None elsewhere.

    If it fails, rank 0 raises its error and every other rank a RuntimeError: nobody waits for ever.
    """
    result, error = None, None
    if world.first:
        try:
            result = action()
        except Exception as caught:
            error = caught
    failed = total([float(error is not None)], world).item() > 0
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("rank 0 failed; its own message says why")
    return result
