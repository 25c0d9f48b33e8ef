"""The Triton kernels of `norm_modulate` and their launchers.

A program never leaves its group of tokens (`groups.py`), so shift and scale are read once and their
gradients are summed in registers; the few partial rows per group are added up by `_sum_partials`.
No atomics, so two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._shared.variants import Variant
from .._shared.views import rows_together
from . import residual
from .groups import (
    SUM_PARTIALS,
    block_d_of,
    chunk_of,
    chunks_of,
    split,
    starts_of,
    store_modulated,
    strides,
    sum_chunks,
)

# (BLOCK_N, warps) by BLOCK_D: 32 numbers of x per thread forward, 16 of x and of dy backward.
# The warps lie along D, so that sums over tokens stay inside a thread.
# One table serves all architectures until a measurement splits it.
FORWARD = {512: (4, 2), 1024: (4, 4), 2048: (4, 8), 4096: (2, 8), 8192: (1, 8)}
BACKWARD = {512: (2, 2), 1024: (2, 4), 2048: (2, 8), 4096: (1, 8), 8192: (1, 16)}
# One modulation per token leaves one row to a program.
PER_TOKEN = {512: (1, 1), 1024: (1, 2), 2048: (1, 4), 4096: (1, 8), 8192: (1, 16)}


@triton.jit(do_not_specialize=["starts_b", "groups", "N", "chunks"])
def _forward(
    x_ptr, shift_ptr, scale_ptr, starts_ptr, y_ptr, mean_ptr, rstd_ptr,
    starts_b, groups, N, chunks, x_b, x_n, shift_b, shift_g, scale_b, scale_g, eps,
    D: tl.constexpr, RMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b, g, first, last = chunk_of(program, starts_ptr, starts_b, groups, N, chunks)
    d = tl.arange(0, BLOCK_D)
    live_d = d < D
    shift = tl.load(shift_ptr + b * shift_b + g * shift_g + d, mask=live_d, other=0.0)
    scale = tl.load(scale_ptr + b * scale_b + g * scale_g + d, mask=live_d, other=0.0)
    if starts_ptr is None:
        _forward_block(
            x_ptr + b * x_b, shift, scale, y_ptr, mean_ptr, rstd_ptr,
            first, last, b * N, x_n, eps, D, RMS, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        for start in range(first, last, BLOCK_N):
            _forward_block(
                x_ptr + b * x_b, shift, scale, y_ptr, mean_ptr, rstd_ptr,
                start, last, b * N, x_n, eps, D, RMS, BLOCK_N, BLOCK_D,
            )  # fmt: skip


@triton.jit
def _forward_block(
    x_ptr, shift, scale, y_ptr, mean_ptr, rstd_ptr, first, last, row, x_n, eps,
    D: tl.constexpr, RMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tokens from `first` on of a sample whose rows of results start at `row`."""
    n = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_N)  # the interpreter counts in int32
    d = tl.arange(0, BLOCK_D)
    live_n, live_d = n < last, d < D
    live = live_n[:, None] & live_d[None, :]
    x = tl.load(x_ptr + n[:, None] * x_n + d[None, :], mask=live, other=0.0).to(tl.float32)
    store_modulated(
        x, shift, scale, y_ptr, mean_ptr, rstd_ptr, row + n, live_n, live_d, eps, D, RMS
    )


@triton.jit(do_not_specialize=["starts_b", "groups", "N", "chunks"])
def _backward(
    dy_ptr, x_ptr, scale_ptr, starts_ptr, mean_ptr, rstd_ptr, dx_ptr, dshift_ptr, dscale_ptr,
    starts_b, groups, N, chunks, dy_b, dy_n, x_b, x_n, scale_b, scale_g,
    D: tl.constexpr, RMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b, g, first, last = chunk_of(program, starts_ptr, starts_b, groups, N, chunks)
    d = tl.arange(0, BLOCK_D)
    live_d = d < D

    scale = tl.load(scale_ptr + b * scale_b + g * scale_g + d, mask=live_d, other=0.0)
    gain = 1 + scale.to(tl.float32)
    dshift = tl.zeros([BLOCK_D], tl.float32)
    dscale = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_N):
        n = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_N)  # the interpreter counts in int32
        at = b * N + n
        live_n = n < last
        live = live_n[:, None] & live_d[None, :]
        dy = tl.load(dy_ptr + b * dy_b + n[:, None] * dy_n + d[None, :], mask=live, other=0.0)
        x = tl.load(x_ptr + b * x_b + n[:, None] * x_n + d[None, :], mask=live, other=0.0)
        rstd = tl.load(rstd_ptr + at, mask=live_n, other=0.0)
        dy, normed = dy.to(tl.float32), x.to(tl.float32)  # [BLOCK_N, BLOCK_D]
        if not RMS:
            normed -= tl.load(mean_ptr + at, mask=live_n, other=0.0)[:, None]
        normed *= rstd[:, None]
        dshift += tl.sum(dy, axis=0)
        dscale += tl.sum(dy * normed, axis=0)

        dnormed = dy * gain  # 0 past D, so the sums below need no mask
        dx = dnormed - normed * (tl.sum(dnormed * normed, axis=1) / D)[:, None]
        if not RMS:
            dx -= (tl.sum(dnormed, axis=1) / D)[:, None]
        dx *= rstd[:, None]
        tl.store(dx_ptr + at[:, None] * D + d[None, :], dx.to(dx_ptr.dtype.element_ty), mask=live)
    partial = program * D + d
    tl.store(dshift_ptr + partial, dshift.to(dshift_ptr.dtype.element_ty), mask=live_d)
    tl.store(dscale_ptr + partial, dscale.to(dscale_ptr.dtype.element_ty), mask=live_d)


def launch_forward(
    x: Tensor, shift: Tensor, scale: Tensor, rms: bool, eps: float, dtype: torch.dtype,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (B, N, D) in `dtype`, mean (B, N) (empty for RMSNorm) and rstd (B, N) in float32."""
    B, N, D = x.shape
    x, shift, scale = rows_together(x), rows_together(shift), rows_together(scale)
    y = x.new_empty(x.shape, dtype=dtype)
    mean = x.new_empty((0,) if rms else (B, N), dtype=torch.float32)
    rstd = x.new_empty((B, N), dtype=torch.float32)
    if y.numel() == 0:
        return y, mean, rstd
    groups, rows, block_d = split(N, D, scale)
    block_n, warps = (FORWARD if rows > 1 else PER_TOKEN)[block_d]
    chunks = triton.cdiv(rows, block_n)
    starts, starts_b = starts_of(starts)
    _forward[(B * groups * chunks,)](
        x, shift, scale, starts, y, mean, rstd, starts_b, groups, N, chunks,
        *strides(x), *strides(shift), *strides(scale), eps,
        D=D, RMS=rms, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=warps,
    )  # fmt: skip
    return y, mean, rstd


def launch_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, rms: bool,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx (B, N, D) in the dtype of x; dshift and dscale in the shape and dtype of scale."""
    B, N, D = x.shape
    dy, x, rows_of_scale = rows_together(dy), rows_together(x), rows_together(scale)
    dx = x.new_empty(x.shape)
    if dx.numel() == 0:
        return dx, scale.new_zeros(scale.shape), scale.new_zeros(scale.shape)
    groups, rows, block_d = split(N, D, scale)
    block_n, warps = (BACKWARD if rows > 1 else PER_TOKEN)[block_d]
    chunks = chunks_of(B * groups, rows)
    shared = scale.shape[0] < B  # one modulation for the whole batch
    dshift, dscale = scale.new_empty(scale.shape), scale.new_empty(scale.shape)
    shift_parts, scale_parts = dshift, dscale
    if chunks > 1 or shared:
        size = (B * groups * chunks, D)
        shift_parts, scale_parts = (x.new_empty(size, dtype=torch.float32) for _ in range(2))
    starts, starts_b = starts_of(starts)
    _backward[(B * groups * chunks,)](
        dy, x, rows_of_scale, starts, mean, rstd, dx, shift_parts, scale_parts,
        starts_b, groups, N, chunks,
        *strides(dy), *strides(x), *strides(rows_of_scale),
        D=D, RMS=rms, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=warps,
    )  # fmt: skip
    if chunks > 1 or shared:
        sum_chunks(shift_parts, scale_parts, dshift, dscale, B, groups, chunks)
    return dx, dshift, dscale


def _variant(name, kernel, table, D, x="bf16", rms=False):
    """A bf16 call of width D; `x="fp32"` is the residual stream under autocast."""
    block_d = block_d_of(D)
    block_n, warps = table[block_d]
    pointers = {"x_ptr": x, "dx_ptr": x}
    pointers |= dict.fromkeys(("y_ptr", "dy_ptr", "shift_ptr", "scale_ptr"), "bf16")
    pointers |= dict.fromkeys(("mean_ptr", "rstd_ptr", "dshift_ptr", "dscale_ptr"), "fp32")
    strides = [f"{name}_{axis}" for name in ("x", "dy") for axis in "bn"]
    strides += [f"{name}_{axis}" for name in ("shift", "scale") for axis in "bg"]
    types = {name: f"*{dtype}:16" for name, dtype in pointers.items()}
    types |= dict.fromkeys(strides, "i32:16") | {"eps": "fp32"}
    types |= dict.fromkeys(("starts_b", "groups", "N", "chunks"), "i32")
    constants = {"starts_ptr": None, "D": D, "RMS": rms, "BLOCK_N": block_n, "BLOCK_D": block_d}
    return Variant(name, kernel, types, constants, warps)


# The widths of VDT-S, MarDini and VDT-L.
VARIANTS = [
    *(_variant(f"forward_{D}", _forward, FORWARD, D) for D in (384, 1024, 1152)),
    *(_variant(f"backward_{D}", _backward, BACKWARD, D) for D in (384, 1024, 1152)),
    _variant("forward_autocast_1152", _forward, FORWARD, 1152, x="fp32"),
    _variant("backward_autocast_1152", _backward, BACKWARD, 1152, x="fp32"),
    _variant("forward_token_rms_1152", _forward, PER_TOKEN, 1152, rms=True),
    *residual.VARIANTS,
    SUM_PARTIALS,
]
