"""`qk_norm_rope` against the lines that users write and against `torch.compile` of them.

"liger" is its norm before the same turn: its rotary op has no positions on several axes.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, backward_of, forward_of, without_cpp
from benchmarks.rivals import packages
from fastvid.functional import Rotary, qk_norm_rope, rotary_table
from fastvid.kernels._shared import native
from fastvid.kernels.qk_norm_rope import reference

# Norm, across heads, grid (T, H, W), heads, E, channels of each axis: Pyramid Flow's miniFLUX,
# MarDini's planner and generator.
SHAPES = {
    "pyramid": ("rms", False, (2, 24, 40), 30, 64, (16, 24, 24)),
    "planner": ("layer", True, (2, 16, 16), 32, 128, (64, 64)),
    "generator": ("layer", False, (4, 32, 32), 16, 64, (32, 32)),
}
GPU_SHAPES = {
    "pyramid": ("rms", False, (8, 24, 40), 30, 64, (16, 24, 24)),
    "planner": ("layer", True, (13, 32, 32), 32, 128, (64, 64)),
    "generator": ("layer", False, (13, 64, 64), 16, 64, (32, 32)),
}
QUICK = {"quick": ("rms", False, (2, 3, 4), 2, 24, (8, 8, 8))}


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Forward and backward, from views of a packed projection."""
    shapes = QUICK if quick else GPU_SHAPES if device.type == "cuda" else SHAPES
    dtypes = [torch.bfloat16] if device.type == "cuda" else [torch.float32, torch.bfloat16]
    return [
        _case(f"{direction} of {name}", direction == "forward", *shape, dtype, device, quick)
        for direction in ("forward", "backward")
        for name, shape in shapes.items()
        for dtype in dtypes
    ]


def plain_norm(kind: str, x: Tensor, weight: Tensor) -> Tensor:
    """ "layer" or "rms", over the last axis."""
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, None, 1e-6)
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def _case(name, forward, norm, across, grid, heads, E, dims, dtype, device, quick):
    N, rotary = _positions(grid, dims, device)
    # One cosine and one sine per pair and token, made beforehand: the plainest fast way.
    columns = [dim // 2 for dim in dims]
    cos, sin = (
        torch.cat(
            [t[rotary.rows[0, :, i].long()] for i, t in enumerate(joint.split(columns, 1))], 1
        )
        for joint in (rotary.cos, rotary.sin)
    )
    cos, sin = cos[:, None].to(dtype), sin[:, None].to(dtype)  # (N, 1, E / 2)

    def one(x, weight, turn, normed=plain_norm):
        rows = x.flatten(2) if across else x
        return turn(normed(norm, rows, weight).view(x.shape))

    def stacked(x):
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)

    angles = torch.complex(cos.float(), sin.float())

    def multiplied(x):
        turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * angles
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)

    def eager(q, k, q_weight, k_weight):
        return one(q, q_weight, stacked), one(k, k_weight, stacked)

    def with_liger():
        normed = packages.liger_norm()
        return lambda q, k, q_weight, k_weight: (
            one(q, q_weight, stacked, normed),
            one(k, k_weight, stacked, normed),
        )

    def as_complex(q, k, q_weight, k_weight):
        return one(q, q_weight, multiplied), one(k, k_weight, multiplied)

    def ours(q, k, q_weight, k_weight, f=qk_norm_rope, rotary=rotary):
        rule = {"norm": norm, "across_heads": across, "rotary": rotary}
        return f(q, k, q_weight=q_weight, k_weight=k_weight, **rule)

    def oracle(q, k, q_weight, k_weight):
        wide = rotary._replace(cos=rotary.cos.double(), sin=rotary.sin.double())
        return ours(q, k, q_weight, k_weight, reference.qk_norm_rope, wide)

    def make_inputs(device):
        qkv = torch.randn(1, N, 3, heads, E, device=device).to(dtype)
        q, k, _ = qkv.unbind(2)
        weights = torch.randn(2, heads * E if across else E, device=device).to(dtype)
        douts = torch.randn(2, 1, N, heads, E, device=device).to(dtype)
        return (q, k, *weights, *(() if forward else douts))

    here, missing = packages.split_by_presence(device, {"liger": with_liger})
    rivals = {"fastvid": ours, "eager": eager, "complex": as_complex, **here}
    if not quick:
        rivals["compile"] = torch.compile(eager, dynamic=False)
    bind = forward_of if forward else functools.partial(backward_of, results=2)
    rivals = {rival: bind(function) for rival, function in rivals.items()}
    if device.type == "cpu" and native.loaded():
        rivals["no C++"] = without_cpp(rivals["fastvid"])
    return Case(
        room="qk_norm_rope",
        name=name,
        shape={"N": N, "heads": heads, "E": E},
        dtype=dtype,
        make_inputs=make_inputs,
        rivals=rivals,
        oracle=bind(oracle),
        nbytes=(4 if forward else 6) * N * heads * E * dtype.itemsize,
        missing=missing,
    )


def _positions(grid, dims, device):
    """Tokens of a (T, H, W) grid; on two axes their frame and their place in it."""
    T, H, W = grid
    sides = grid if len(dims) == 3 else (T, H * W)
    index = torch.cartesian_prod(*(torch.arange(side, device=device) for side in sides))
    tables = [
        rotary_table(torch.arange(side, device=device), dim)
        for side, dim in zip(sides, dims, strict=True)
    ]
    return T * H * W, Rotary.of(tables, index.int()[None])
