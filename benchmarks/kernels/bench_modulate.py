"""The ops of the room against the lines that users write and against `torch.compile` of them."""

import functools

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, backward_of, forward_of, without_cpp
from benchmarks.rivals import packages
from fastvid.functional import (
    FrameLayout,
    gated_residual,
    gated_residual_norm_modulate,
    norm_modulate,
)
from fastvid.kernels._shared import native
from fastvid.kernels.modulate import reference

# VDT-S/2 of one clip and of a batch, VDT-L/2 joint and spatial, MarDini G at 512 px.
SHAPES = [(1, 1024, 384), (16, 1024, 384), (1, 4096, 1152), (4, 1024, 1152)]
GPU_SHAPES = [*SHAPES[1:], (16, 4096, 1152), (2, 53248, 1024)]
QUICK = [(1, 64, 384)]


# Tokens and rows of modulation so that they broadcast, by what a row is of.
FRAMES = 16  # of equal length
UNEQUAL = (1, 3, 4, 8)  # sixteenths of the tokens
SPREAD = {
    "": lambda x, *rows: (x, *(row.unsqueeze(1) for row in rows)),
    "frame_": lambda x, *rows: (
        x.unflatten(1, (FRAMES, -1)),
        *(row.unsqueeze(2) for row in rows),
    ),
    "frames_": lambda x, *rows: (
        x,
        *(row.repeat_interleave(_lengths(x), 1, output_size=x.shape[1]) for row in rows),
    ),
    "token_": lambda x, *rows: (x, *rows),
}


def eager_norm(x, shift, scale, rows_of=""):
    """Two passes of PyTorch after its LayerNorm."""
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    normed, shift, scale = SPREAD[rows_of](normed, shift, scale)
    return (normed * (1 + scale) + shift).view_as(x)


def eager_residual(x, h, gate, rows_of=""):
    """The line of the DiT block."""
    h, gate = SPREAD[rows_of](h, gate)
    return x + (gate * h).view_as(x)


def eager_both(x, h, gate, shift, scale, rows_of=""):
    """The end of one branch and the start of the next."""
    total = eager_residual(x, h, gate, rows_of)
    return total, eager_norm(total, shift, scale, rows_of)


def _lengths(x):
    """Tokens of each unequal frame."""
    return torch.tensor(UNEQUAL, device=x.device) * (x.shape[1] // sum(UNEQUAL))


# Ours, eager's, the definition; full-size inputs, rows of modulation, results.
OPS = {
    "": (norm_modulate, eager_norm, reference.norm_modulate, 1, 2, 1),
    "residual_": (gated_residual, eager_residual, reference.gated_residual, 2, 1, 1),
    "residual_norm_": (
        gated_residual_norm_modulate,
        eager_both,
        reference.gated_residual_norm_modulate,
        *(2, 3, 2),
    ),
}
# What must be read and written backward, in tensors of the size of x: the gradient of the plain
# sum is handed on as it is.
BACKWARD_STREAMS = {"": 3, "residual_": 3, "residual_norm_": 6}
LIGER = {"liger": packages.liger_norm_modulate}  # has the norm, no residual through a gate


def bytes_moved(
    forward: bool, B: int, N: int, D: int, itemsize: int, op: str = "", per_token: bool = False
) -> int:
    """What is of the size of x, read and written: the modulation too if every token has its own."""
    _, _, _, inputs, rows, results = OPS[op]
    streams = inputs + results if forward else BACKWARD_STREAMS[op]
    if per_token:  # backward all but shift are read, and the gradients of all are written
        streams += rows if forward else rows + max(1, rows - 1)
    return streams * B * N * D * itemsize


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Forward and backward over the shapes that models use."""
    shapes = QUICK if quick else GPU_SHAPES if device.type == "cuda" else SHAPES
    dtypes = [torch.bfloat16] if device.type == "cuda" else [torch.float32, torch.bfloat16]
    kinds = [(op, "", shape) for op in OPS for shape in shapes]
    kinds += [(op, rows_of, shapes[-1]) for op in OPS for rows_of in SPREAD if rows_of]
    return [
        _case(op, rows_of, direction, *shape, dtype, device, quick)
        for op, rows_of, shape in kinds
        for direction in ("forward", "backward")
        for dtype in dtypes
    ]


def _case(op, rows_of, direction, B, N, D, dtype, device, quick):
    ours, eager, oracle, inputs, rows, results = OPS[op]
    forward = direction == "forward"
    bind = forward_of if forward else functools.partial(backward_of, results=results)
    if rows_of == "frames_":
        layout = FrameLayout([N // sum(UNEQUAL) * part for part in UNEQUAL], device)
        ours = functools.partial(ours, frames=layout)
        oracle = functools.partial(eager, rows_of=rows_of)
    if rows_of:
        eager = functools.partial(eager, rows_of=rows_of)
    rivals = {"fastvid": ours, "eager": eager}
    if not quick:
        rivals["compile"] = torch.compile(eager, dynamic=False)
    here, missing = packages.split_by_presence(device, {} if op or rows_of else LIGER)
    rivals = {rival: bind(function) for rival, function in (rivals | here).items()}
    if device.type == "cpu" and native.loaded() and not (forward and op == "residual_"):
        rivals["no C++"] = without_cpp(rivals["fastvid"])

    def make_inputs(device):
        full = torch.randn(inputs + (0 if forward else results), B, N, D, device=device).to(dtype)
        groups = {"": (), "frame_": (FRAMES,), "frames_": (len(UNEQUAL),), "token_": (N,)}[rows_of]
        modulation = torch.randn(B, *groups, rows * D, device=device).to(dtype).chunk(rows, -1)
        return (*full[:inputs], *modulation, *full[inputs:])

    return Case(
        room="modulate",
        name=f"{rows_of}{op}{direction}",
        shape={"B": B, "N": N, "D": D},
        dtype=dtype,
        make_inputs=make_inputs,
        rivals=rivals,
        oracle=bind(oracle),
        nbytes=bytes_moved(forward, B, N, D, dtype.itemsize, op, rows_of == "token_"),
        missing=missing,
    )
