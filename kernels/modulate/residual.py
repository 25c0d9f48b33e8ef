"""The Triton kernels behind a gated residual, and their launchers: as `kernel.py`, with a branch.

Forward reads x and h and writes the sum and its modulated norm. Backward reads the gradients of
both, the sum and h, and writes dx and dh; the gradients of gate, shift and scale are summed in
registers over a chunk of tokens, then over the chunks. No atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._shared.variants import Variant
from .._shared.views import rows_together
from .groups import (
    block_d_of,
    chunk_of,
    chunks_of,
    split,
    starts_of,
    store_modulated,
    strides,
    sum_chunks,
)

# (BLOCK_N, warps) by BLOCK_D: as in `kernel.py`, half the rows: there are twice the streams.
FORWARD = {512: (2, 2), 1024: (2, 4), 2048: (2, 8), 4096: (1, 8), 8192: (1, 16)}
BACKWARD = {512: (1, 2), 1024: (1, 4), 2048: (1, 8), 4096: (1, 16), 8192: (1, 32)}


@triton.jit(do_not_specialize=["starts_b", "groups", "N", "chunks"])
def _forward(
    x_ptr, h_ptr, gate_ptr, shift_ptr, scale_ptr, starts_ptr, total_ptr, y_ptr, mean_ptr, rstd_ptr,
    starts_b, groups, N, chunks,
    x_b, x_n, h_b, h_n, gate_b, gate_g, shift_b, shift_g, scale_b, scale_g, eps,
    D: tl.constexpr, RMS: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b, g, first, last = chunk_of(program, starts_ptr, starts_b, groups, N, chunks)
    d = tl.arange(0, BLOCK_D)
    live_d = d < D
    shift = tl.load(shift_ptr + b * shift_b + g * shift_g + d, mask=live_d, other=0.0)
    scale = tl.load(scale_ptr + b * scale_b + g * scale_g + d, mask=live_d, other=0.0)
    if GATED:
        gate = tl.load(gate_ptr + b * gate_b + g * gate_g + d, mask=live_d, other=0.0)
    else:
        gate = shift  # not read
    if starts_ptr is None:
        _forward_block(
            x_ptr + b * x_b, h_ptr + b * h_b, gate, shift, scale, total_ptr, y_ptr, mean_ptr,
            rstd_ptr, first, last, b * N, x_n, h_n, eps, D, RMS, GATED, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        for start in range(first, last, BLOCK_N):
            _forward_block(
                x_ptr + b * x_b, h_ptr + b * h_b, gate, shift, scale, total_ptr, y_ptr, mean_ptr,
                rstd_ptr, start, last, b * N, x_n, h_n, eps, D, RMS, GATED, BLOCK_N, BLOCK_D,
            )  # fmt: skip


@triton.jit
def _forward_block(
    x_ptr, h_ptr, gate, shift, scale, total_ptr, y_ptr, mean_ptr, rstd_ptr,
    first, last, row, x_n, h_n, eps, D: tl.constexpr, RMS: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tokens from `first` on of a sample whose rows of results start at `row`."""
    n = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_N)  # the interpreter counts in int32
    d = tl.arange(0, BLOCK_D)
    live_n, live_d = n < last, d < D
    live = live_n[:, None] & live_d[None, :]
    x = tl.load(x_ptr + n[:, None] * x_n + d[None, :], mask=live, other=0.0)
    h = tl.load(h_ptr + n[:, None] * h_n + d[None, :], mask=live, other=0.0)
    branch = h.to(tl.float32)  # [BLOCK_N, BLOCK_D]
    if GATED:
        branch *= gate.to(tl.float32)
    total = (x.to(tl.float32) + branch).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + (row + n)[:, None] * D + d[None, :], total, mask=live)
    store_modulated(
        total.to(tl.float32), shift, scale, y_ptr, mean_ptr, rstd_ptr,
        row + n, live_n, live_d, eps, D, RMS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["starts_b", "groups", "N", "chunks"])
def _backward(
    dsum_ptr, dy_ptr, total_ptr, h_ptr, gate_ptr, scale_ptr, starts_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dh_ptr, dgate_ptr, dshift_ptr, dscale_ptr, starts_b, groups, N, chunks,
    dsum_b, dsum_n, dy_b, dy_n, total_b, total_n, h_b, h_n, gate_b, gate_g, scale_b, scale_g,
    D: tl.constexpr, RMS: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Without NORM the sum goes nowhere but out: `gated_residual`, and dx is `dsum`."""
    program = tl.program_id(0).to(tl.int64)
    b, g, first, last = chunk_of(program, starts_ptr, starts_b, groups, N, chunks)
    d = tl.arange(0, BLOCK_D)
    live_d = d < D

    if NORM:
        scale = tl.load(scale_ptr + b * scale_b + g * scale_g + d, mask=live_d, other=0.0)
        gain = 1 + scale.to(tl.float32)
        dshift = tl.zeros([BLOCK_D], tl.float32)
        dscale = tl.zeros([BLOCK_D], tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + b * gate_b + g * gate_g + d, mask=live_d, other=0.0)
        gate = gate.to(tl.float32)
        dgate = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_N):
        n = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_N)  # the interpreter counts in int32
        at = b * N + n
        live_n = n < last
        live = live_n[:, None] & live_d[None, :]
        to = at[:, None] * D + d[None, :]  # [BLOCK_N, BLOCK_D]
        dsum = tl.load(
            dsum_ptr + b * dsum_b + n[:, None] * dsum_n + d[None, :], mask=live, other=0.0
        )
        dx = dsum.to(tl.float32)
        if NORM:
            dy = tl.load(dy_ptr + b * dy_b + n[:, None] * dy_n + d[None, :], mask=live, other=0.0)
            total = tl.load(
                total_ptr + b * total_b + n[:, None] * total_n + d[None, :], mask=live, other=0.0
            )
            rstd = tl.load(rstd_ptr + at, mask=live_n, other=0.0)
            dy, normed = dy.to(tl.float32), total.to(tl.float32)
            if not RMS:
                normed -= tl.load(mean_ptr + at, mask=live_n, other=0.0)[:, None]
            normed *= rstd[:, None]
            dshift += tl.sum(dy, axis=0)
            dscale += tl.sum(dy * normed, axis=0)
            dnormed = dy * gain  # 0 past D, so the sums below need no mask
            through = dnormed - normed * (tl.sum(dnormed * normed, axis=1) / D)[:, None]
            if not RMS:
                through -= (tl.sum(dnormed, axis=1) / D)[:, None]
            dx += through * rstd[:, None]
            tl.store(dx_ptr + to, dx.to(dx_ptr.dtype.element_ty), mask=live)
        if GATED:
            h = tl.load(h_ptr + b * h_b + n[:, None] * h_n + d[None, :], mask=live, other=0.0)
            dgate += tl.sum(dx * h.to(tl.float32), axis=0)
            tl.store(dh_ptr + to, (dx * gate).to(dh_ptr.dtype.element_ty), mask=live)
    partial = program * D + d
    if NORM:
        tl.store(dshift_ptr + partial, dshift.to(dshift_ptr.dtype.element_ty), mask=live_d)
        tl.store(dscale_ptr + partial, dscale.to(dscale_ptr.dtype.element_ty), mask=live_d)
    if GATED:
        tl.store(dgate_ptr + partial, dgate.to(dgate_ptr.dtype.element_ty), mask=live_d)


def launch_forward(
    x: Tensor, h: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor,
    rms: bool, eps: float, dtype: torch.dtype, starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum in the dtype of x, y in `dtype`, mean (empty for RMSNorm) and rstd in float32."""
    B, N, D = x.shape
    x, h, shift, scale = (rows_together(t) for t in (x, h, shift, scale))
    gated, gate = gate is not None, shift if gate is None else rows_together(gate)
    total, y = x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype)
    mean = x.new_empty((0,) if rms else (B, N), dtype=torch.float32)
    rstd = x.new_empty((B, N), dtype=torch.float32)
    if y.numel() == 0:
        return total, y, mean, rstd
    groups, rows, block_d = split(N, D, scale)
    block_n, warps = FORWARD[block_d]
    chunks = triton.cdiv(rows, block_n)
    starts, starts_b = starts_of(starts)
    _forward[(B * groups * chunks,)](
        x, h, gate, shift, scale, starts, total, y, mean, rstd, starts_b, groups, N, chunks,
        *strides(x), *strides(h), *strides(gate), *strides(shift), *strides(scale), eps,
        D=D, RMS=rms, GATED=gated, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=warps,
    )  # fmt: skip
    return total, y, mean, rstd


def launch_backward(
    dsum: Tensor, dy: Tensor, total: Tensor, h: Tensor | None, gate: Tensor | None, scale: Tensor,
    mean: Tensor, rstd: Tensor, rms: bool, starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dh, dgate, dshift, dscale; dh and dgate are empty without a gate."""
    make = torch.Tensor.new_empty if total.numel() else torch.Tensor.new_zeros
    dx, dshift, dscale = (make(t, t.shape) for t in (total, scale, scale))
    dh, dgate = (make(total, 0) if t is None else make(t, t.shape) for t in (h, gate))
    if total.numel():
        outputs = dx, dh, dgate, dshift, dscale
        _launch((dsum, dy, total, h, gate, scale), starts, (mean, rstd), outputs, rms)
    return dx, dh, dgate, dshift, dscale


def launch_residual_backward(
    dsum: Tensor, h: Tensor, gate: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dh, dgate of `gated_residual`."""
    if h.numel() == 0:
        return h.new_empty(h.shape), gate.new_zeros(gate.shape)
    dh, dgate = h.new_empty(h.shape), gate.new_empty(gate.shape)
    inputs, outputs = (dsum, None, None, h, gate, None), (None, dh, dgate, None, None)
    _launch(inputs, starts, (None, None), outputs, False)
    return dh, dgate


def _launch(inputs, starts, stats, outputs, rms):
    """`_backward`, then the sums over chunks and over samples that share a modulation."""
    dsum, *others = inputs
    dsum = rows_together(dsum)
    dy, total, h, gate, scale = (t if t is None else rows_together(t) for t in others)
    dx, dh, dgate, dshift, dscale = outputs
    norm, gated = scale is not None, gate is not None
    B, N, D = dsum.shape
    groups, rows, block_d = split(N, D, inputs[4] if gated else inputs[5])
    block_n, warps = BACKWARD[block_d]
    chunks = chunks_of(B * groups, rows)
    starts, starts_b = starts_of(starts)
    size = (B * groups * chunks, D)

    def parts_of(result):
        if result is None or (chunks == 1 and len(result) == B):
            return result
        return dsum.new_empty(size, dtype=torch.float32)

    parts = [parts_of(result) for result in (dgate if gated else None, dshift, dscale)]
    steps = [(0, 0) if t is None else strides(t) for t in (dsum, dy, total, h, gate, scale)]
    pointers = [
        dsum if t is None else t for t in (dy, total, h, gate, scale, *stats, dx, dh, *parts)
    ]
    _backward[size[:1]](
        dsum, *pointers[:5], starts, *pointers[5:], starts_b, groups, N, chunks,
        *(step for pair in steps for step in pair),
        D=D, RMS=rms, NORM=norm, GATED=gated, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=warps,
    )  # fmt: skip
    if norm and parts[1] is not dshift:
        sum_chunks(parts[1], parts[2], dshift, dscale, B, groups, chunks)
    if gated and parts[0] is not dgate:
        shared = len(dgate) < B
        summed = parts[0].view(B, groups, chunks, D).sum((0, 2) if shared else 2)
        dgate.copy_(summed.view(dgate.shape))


def _variant(name, kernel, table, D):
    """A bf16 call of width D with a gate per sample or frame."""
    block_d = block_d_of(D)
    block_n, warps = table[block_d]
    names = kernel.arg_names
    types = {name: "*bf16:16" for name in names if name.endswith("_ptr")}
    types |= dict.fromkeys(("mean_ptr", "rstd_ptr"), "*fp32:16") | {"eps": "fp32"}
    if kernel is _backward:
        partial = ("dgate_ptr", "dshift_ptr", "dscale_ptr")
        types |= dict.fromkeys(partial, "*fp32:16")
    types |= {name: "i32:16" for name in names if name[-2:] in ("_b", "_n", "_g")}
    types |= dict.fromkeys(("starts_b", "groups", "N", "chunks"), "i32")
    constants = {"starts_ptr": None, "D": D, "RMS": False, "NORM": True, "GATED": True}
    constants |= {"BLOCK_N": block_n, "BLOCK_D": block_d}
    return Variant(name, kernel, types, constants, warps)


VARIANTS = [
    _variant("residual_forward_1152", _forward, FORWARD, 1152),
    _variant("residual_backward_1152", _backward, BACKWARD, 1152),
]
