"""Views that the kernels of any device want."""

import torch
from torch import Tensor


def merges(x: Tensor, dim: int) -> bool:
    """Whether the axes `dim` and `dim + 1` are one axis without a copy."""
    outer, inner = x.shape[dim : dim + 2]
    return 1 in (outer, inner) or x.stride(dim) == inner * x.stride(dim + 1)


def rows_together(x: Tensor) -> Tensor:
    """The tensor, copied if its last stride is not 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def steps_of(*tensors: Tensor) -> tuple[int, list[int]]:
    """A unit, and the strides of all axes but the last in it: 8 numbers (one load), or one.

    The stride of an axis of size 1 is arbitrary; 0 also makes one sample serve all.
    """
    axes = [(x, axis) for x in tensors for axis in range(x.dim() - 1)]
    steps = [0 if x.shape[axis] == 1 else x.stride(axis) for x, axis in axes]
    unit = 1 if any(step % 8 for step in steps) else 8
    return unit, [step // unit for step in steps]


def bytes_of(known: Tensor | None) -> Tensor | None:
    """A bool tensor as the bytes that a kernel reads."""
    return None if known is None else known.view(torch.uint8)
