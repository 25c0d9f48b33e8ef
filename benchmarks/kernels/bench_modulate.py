"""`norm_modulate` against the line that users write and against `torch.compile` of it."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, backward_of, forward_of
from benchmarks.rivals import packages
from fastvid.functional import norm_modulate
from fastvid.kernels._shared import native
from fastvid.kernels.modulate import cpu, reference

# VDT-S/2 of one clip and of a batch, VDT-L/2 joint and spatial, MarDini G at 512 px.
SHAPES = [(1, 1024, 384), (16, 1024, 384), (1, 4096, 1152), (4, 1024, 1152)]
GPU_SHAPES = [*SHAPES[1:], (16, 4096, 1152), (2, 53248, 1024)]
QUICK = [(1, 64, 384)]


def eager(x, shift, scale):
    """Two passes of PyTorch after its LayerNorm."""
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def without_compiled_part(x, shift, scale):
    """Our CPU path on a machine that had no compiler."""
    return cpu.forward(x, shift, scale, False, 1e-6, x.dtype)[0]


def bytes_moved(forward: bool, B: int, N: int, D: int, itemsize: int) -> int:
    """x and y; backward x, dy and dx. The modulation is small beside them."""
    return (2 if forward else 3) * B * N * D * itemsize


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Forward and backward over the shapes that models use."""
    shapes = QUICK if quick else GPU_SHAPES if device.type == "cuda" else SHAPES
    dtypes = [torch.bfloat16] if device.type == "cuda" else [torch.float32, torch.bfloat16]
    return [
        _case(name, *shape, dtype, device, quick)
        for name in ("forward", "backward")
        for shape in shapes
        for dtype in dtypes
    ]


def _case(name, B, N, D, dtype, device, quick):
    forward = name == "forward"
    bind = forward_of if forward else backward_of
    rivals = {"fastvid": norm_modulate, "eager": eager}
    if not quick:
        rivals["compile"] = torch.compile(eager, dynamic=False)
    if device.type == "cpu" and native.loaded() and forward:
        rivals["no C++"] = without_compiled_part
    here, missing = packages.split_by_presence(device, {"liger": packages.liger_norm_modulate})
    rivals |= here

    def make_inputs(device):
        x, dy = torch.randn(2, B, N, D, device=device).to(dtype)
        shift, scale = torch.randn(B, 2 * D, device=device).to(dtype).chunk(2, -1)
        return (x, shift, scale) if forward else (x, shift, scale, dy)

    return Case(
        room="modulate",
        name=name,
        shape={"B": B, "N": N, "D": D},
        dtype=dtype,
        make_inputs=make_inputs,
        rivals={rival: bind(function) for rival, function in rivals.items()},
        oracle=bind(reference.norm_modulate),
        nbytes=bytes_moved(forward, B, N, D, dtype.itemsize),
        missing=missing,
    )
