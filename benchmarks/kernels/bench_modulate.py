"""The ops of the room against the lines that users write and against `torch.compile` of them."""

import functools

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, backward_of, forward_of
from benchmarks.rivals import packages
from fastvid.functional import gated_residual, gated_residual_norm_modulate, norm_modulate
from fastvid.kernels._shared import native
from fastvid.kernels.modulate import cpu, reference

# VDT-S/2 of one clip and of a batch, VDT-L/2 joint and spatial, MarDini G at 512 px.
SHAPES = [(1, 1024, 384), (16, 1024, 384), (1, 4096, 1152), (4, 1024, 1152)]
GPU_SHAPES = [*SHAPES[1:], (16, 4096, 1152), (2, 53248, 1024)]
QUICK = [(1, 64, 384)]


def eager_norm(x, shift, scale):
    """Two passes of PyTorch after its LayerNorm."""
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def eager_residual(x, h, gate):
    """The line of the DiT block."""
    return x + gate.unsqueeze(1) * h


def eager_both(x, h, gate, shift, scale):
    """The end of one branch and the start of the next."""
    total = eager_residual(x, h, gate)
    return total, eager_norm(total, shift, scale)


def without_compiled_part(x, *others):
    """Our CPU path of `norm_modulate` or of both on a machine that had no compiler."""
    h, gate, shift, scale = others if len(others) == 4 else (None, None, *others)
    total, y, _, _ = cpu.forward(x, h, gate, shift, scale, None, False, 1e-6, x.dtype)
    return y if h is None else (total, y)


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


def bytes_moved(forward: bool, B: int, N: int, D: int, itemsize: int, op: str = "") -> int:
    """What is of the size of x, read and written; the modulation is small beside it."""
    _, _, _, inputs, _, results = OPS[op]
    streams = inputs + results if forward else BACKWARD_STREAMS[op]
    return streams * B * N * D * itemsize


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Forward and backward over the shapes that models use."""
    shapes = QUICK if quick else GPU_SHAPES if device.type == "cuda" else SHAPES
    dtypes = [torch.bfloat16] if device.type == "cuda" else [torch.float32, torch.bfloat16]
    return [
        _case(op, direction, *shape, dtype, device, quick)
        for op in OPS
        for direction in ("forward", "backward")
        for shape in shapes
        for dtype in dtypes
    ]


def _case(op, direction, B, N, D, dtype, device, quick):
    ours, eager, oracle, inputs, rows, results = OPS[op]
    forward = direction == "forward"
    bind = forward_of if forward else functools.partial(backward_of, results=results)
    rivals = {"fastvid": ours, "eager": eager}
    if not quick:
        rivals["compile"] = torch.compile(eager, dynamic=False)
    if device.type == "cpu" and native.loaded() and forward and op != "residual_":
        rivals["no C++"] = without_compiled_part
    here, missing = packages.split_by_presence(device, {} if op else LIGER)
    rivals |= here

    def make_inputs(device):
        full = torch.randn(inputs + (0 if forward else results), B, N, D, device=device).to(dtype)
        modulation = torch.randn(B, rows * D, device=device).to(dtype).chunk(rows, -1)
        return (*full[:inputs], *modulation, *full[inputs:])

    return Case(
        room="modulate",
        name=f"{op}{direction}",
        shape={"B": B, "N": N, "D": D},
        dtype=dtype,
        make_inputs=make_inputs,
        rivals={rival: bind(function) for rival, function in rivals.items()},
        oracle=bind(oracle),
        nbytes=bytes_moved(forward, B, N, D, dtype.itemsize, op),
        missing=missing,
    )
