"""Latents (B, C, T, H, W) as planes of H x W numbers: what elementwise kernels walk over.

A plane lies together in memory; steps between planes are free. Views of channels or frames, batches
expanded by stride 0 and swapped axes are therefore read where they lie.
"""

import torch
from torch import Tensor

from .checks import expect_device

# Numbers of a plane that one program takes, and its warps: 8 numbers per thread.
BLOCKS = ((256, 1), (512, 2), (1024, 4))


def expect_known(known: Tensor, name: str, latents: Tensor) -> None:
    """Check `known` against latents (B, C, T, H, W): bool (B|1, T) or (B|1, T, H, W)."""
    if not isinstance(known, Tensor) or known.dtype != torch.bool:
        came = known.dtype if isinstance(known, Tensor) else type(known).__name__
        raise TypeError(f"known must be a bool Tensor with True = given, got {came}")
    B, _, T, H, W = latents.shape
    shape, axes = known.shape, known.dim()
    # Size by size: Dynamo does not compare a tuple of fixed sizes with one of free ones.
    agrees = axes in (2, 4) and shape[0] in (1, B) and shape[1] == T
    if agrees and axes == 4:
        agrees = shape[2] == H and shape[3] == W
    if not agrees:
        raise ValueError(
            f"known must be (B|1, T) or (B|1, T, H, W), B={B} T={T} H={H} W={W},"
            f" got {tuple(known.shape)}"
        )
    expect_device("known", known, name, latents)


def known_cells(known: Tensor) -> Tensor:
    """`known` as (B|1, 1, T, H|1, W|1), to broadcast over latents."""
    return known[:, None, :, None, None] if known.dim() == 2 else known.unsqueeze(1)


def planes(tensor: Tensor) -> Tensor:
    """The tensor (..., H, W) itself if each of its planes lies together, else a copy."""
    if tensor.is_contiguous():  # the usual case, at a quarter of the price
        return tensor
    H, W = tensor.shape[-2:]
    together = (W == 1 or tensor.stride(-1) == 1) and (H == 1 or tensor.stride(-2) == W)
    return tensor if together else tensor.contiguous()


def like(tensor: Tensor) -> Tensor:
    """A new tensor of its shape and dtype, contiguous; `new_empty` costs three times as much."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def steps(tensor: Tensor, axes: int) -> tuple[int, ...]:
    """Strides of the first axes; 0 where the size is 1, whose stride means nothing."""
    return tuple(tensor.stride(i) if tensor.shape[i] > 1 else 0 for i in range(axes))


def pieces(size: int, overhang: int = 0) -> tuple[int, int, int]:
    """BLOCK, warps, and how many blocks cover a plane of `size` numbers and `overhang` more."""
    block, warps = next((pair for pair in BLOCKS if size <= pair[0]), BLOCKS[-1])
    return block, warps, -(-(size + overhang) // block)
