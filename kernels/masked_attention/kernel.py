"""The Triton kernels of `masked_attention` and their launchers.

A program owns one tile of query tokens inside one frame (backward also: of key tokens) of one
sample and head, and walks the spans that its frame sees in one loop, always with the predicate:
a branch or a second loop would end the pipelining of loads. The tables list the frames with the
most keys first, so the longest programs start first. A head width that is no power of two is
computed as two parts, 72 as 64 + 16.

Backward is two kernels, dQ over the rows and dK with dV over the columns of the table. Each output
tile is summed by one program in a fixed order: no atomics, the same bits in every run.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._shared import intervals_kernel
from .._shared.tiles import (
    LN2,
    LOG2E,
    load_tile,
    online_softmax,
    precision,
    split,
    store_tile,
)
from .._shared.variants import Variant
from .._shared.views import rows_together
from . import descriptors
from .tiles import Blocks, advance, own_tile, span, steps

# By the padded head width, for 16-bit and for 32-bit inputs: the largest found that spill nothing
# on any of the budgeted architectures. Float32 wider than 64 may. One table serves all
# until a measurement splits it.
FORWARD = {
    16: {
        64: Blocks(128, 64, 8, 3),
        80: Blocks(128, 64, 8, 3),
        128: Blocks(128, 32, 8, 3),
        256: Blocks(64, 32, 8, 2),
    },
    32: {64: Blocks(32, 32, 4, 2), 128: Blocks(32, 32, 8, 2), 256: Blocks(16, 16, 8, 2)},
}
BACKWARD_Q = {
    16: {
        64: Blocks(64, 64, 4, 2),
        80: Blocks(64, 32, 4, 2),
        128: Blocks(64, 32, 8, 2),
        256: Blocks(32, 32, 8, 2),
    },
    32: {64: Blocks(32, 32, 8, 2), 128: Blocks(16, 16, 4, 2), 256: Blocks(16, 16, 8, 1)},
}
BACKWARD_KV = {
    16: {
        64: Blocks(128, 32, 8, 2),
        80: Blocks(64, 32, 4, 2),
        128: Blocks(64, 32, 8, 2),
        256: Blocks(32, 32, 8, 1),
    },
    32: {64: Blocks(16, 32, 4, 2), 128: Blocks(16, 16, 4, 2), 256: Blocks(16, 16, 8, 1)},
}


@triton.jit(do_not_specialize=["frames", "others", "N", "M", "table_b", "spans_b"])
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, rows_ptr, spans_ptr,
    q_b, q_n, q_h, k_b, k_m, k_h, v_b, v_m, v_h,
    heads, frames, others, N, M, table_b, spans_b, scale,
    E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    bh, b, h, first, end, count, spans_ptr, alone, _ = own_tile(
        rows_ptr, spans_ptr, heads, frames, others, N, table_b, spans_b, BLOCK_N
    )
    n = first + tl.arange(0, BLOCK_N)
    live = n < end

    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    q1 = load_tile(q_ptr, n, live, q_n, 0, E1, E)  # [BLOCK_N, E1]
    acc1 = tl.zeros([BLOCK_N, E1], tl.float32)
    if E2 > 0:
        q2 = load_tile(q_ptr, n, live, q_n, E1, E2, E)
        acc2 = tl.zeros([BLOCK_N, E2], tl.float32)
    top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)

    i = 0
    at, stop = span(spans_ptr, i, count, M)
    for _ in range(steps(spans_ptr, count, M, BLOCK_M)):
        m = at + tl.arange(0, BLOCK_M)
        seen = m < stop
        k1 = load_tile(k_ptr, m, seen, k_m, 0, E1, E)
        scores = tl.dot(q1, k1.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        if E2 > 0:
            k2 = load_tile(k_ptr, m, seen, k_m, E1, E2, E)
            scores = tl.dot(q2, k2.T, scores, input_precision=PRECISION)
        weights, shrink, top, total = online_softmax(scores, seen, scale, top, total)
        v1 = load_tile(v_ptr, m, seen, v_m, 0, E1, E)
        weights = weights.to(v1.dtype)
        acc1 = tl.dot(weights, v1, acc1 * shrink[:, None], input_precision=PRECISION)
        if E2 > 0:
            v2 = load_tile(v_ptr, m, seen, v_m, E1, E2, E)
            acc2 = tl.dot(weights, v2, acc2 * shrink[:, None], input_precision=PRECISION)
        i, at, stop = advance(spans_ptr, i, at, stop, count, M, BLOCK_M)

    lse = (top + tl.log2(total)) * LN2  # -inf where nothing was seen
    share = tl.where(total == 0.0, 0.0, 1.0 / total)
    acc1 *= share[:, None]
    if E2 > 0:
        acc2 *= share[:, None]
    if alone:
        acc1 = load_tile(v_ptr, n, live, v_m, 0, E1, E).to(tl.float32)
        own = tl.sum(q1.to(tl.float32) * load_tile(k_ptr, n, live, k_m, 0, E1, E), axis=1)
        if E2 > 0:
            acc2 = load_tile(v_ptr, n, live, v_m, E1, E2, E).to(tl.float32)
            own += tl.sum(q2.to(tl.float32) * load_tile(k_ptr, n, live, k_m, E1, E2, E), axis=1)
        lse = own * scale
    out_ptr += (b * N * heads + h) * E
    store_tile(out_ptr, acc1, n, live, heads * E, 0, E1, E)
    if E2 > 0:
        store_tile(out_ptr, acc2, n, live, heads * E, E1, E2, E)
    tl.store(lse_ptr + bh * N + n, lse, mask=live)


@triton.jit(do_not_specialize=["frames", "others", "N", "M", "table_b", "spans_b"])
def _backward_q(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr, rows_ptr, spans_ptr,
    dout_b, dout_n, dout_h, q_b, q_n, q_h, k_b, k_m, k_h, v_b, v_m, v_h,
    heads, frames, others, N, M, table_b, spans_b, scale,
    E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, and delta = sum(dout * out) of every row for `_backward_kv`."""
    bh, b, h, first, end, count, spans_ptr, _, _ = own_tile(
        rows_ptr, spans_ptr, heads, frames, others, N, table_b, spans_b, BLOCK_N
    )
    n = first + tl.arange(0, BLOCK_N)
    live = n < end

    dout_ptr += b * dout_b + h * dout_h
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    out_ptr += (b * N * heads + h) * E
    q1 = load_tile(q_ptr, n, live, q_n, 0, E1, E)  # [BLOCK_N, E1]
    dout1 = load_tile(dout_ptr, n, live, dout_n, 0, E1, E)
    out1 = load_tile(out_ptr, n, live, heads * E, 0, E1, E)
    delta = tl.sum(dout1.to(tl.float32) * out1.to(tl.float32), axis=1)
    dq1 = tl.zeros([BLOCK_N, E1], tl.float32)
    if E2 > 0:
        q2 = load_tile(q_ptr, n, live, q_n, E1, E2, E)
        dout2 = load_tile(dout_ptr, n, live, dout_n, E1, E2, E)
        out2 = load_tile(out_ptr, n, live, heads * E, E1, E2, E)
        delta += tl.sum(dout2.to(tl.float32) * out2.to(tl.float32), axis=1)
        dq2 = tl.zeros([BLOCK_N, E2], tl.float32)
    tl.store(delta_ptr + bh * N + n, delta, mask=live)
    lse = tl.load(lse_ptr + bh * N + n, mask=live, other=0.0) * LOG2E

    i = 0
    at, stop = span(spans_ptr, i, count, M)
    for _ in range(steps(spans_ptr, count, M, BLOCK_M)):
        m = at + tl.arange(0, BLOCK_M)
        seen = m < stop
        k1 = load_tile(k_ptr, m, seen, k_m, 0, E1, E)
        v1 = load_tile(v_ptr, m, seen, v_m, 0, E1, E)
        scores = tl.dot(q1, k1.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        dweights = tl.dot(dout1, v1.T, input_precision=PRECISION)
        if E2 > 0:
            k2 = load_tile(k_ptr, m, seen, k_m, E1, E2, E)
            v2 = load_tile(v_ptr, m, seen, v_m, E1, E2, E)
            scores = tl.dot(q2, k2.T, scores, input_precision=PRECISION)
            dweights = tl.dot(dout2, v2.T, dweights, input_precision=PRECISION)
        weights = tl.exp2(scores * (scale * LOG2E) - lse[:, None])
        weights = tl.where(seen[None, :], weights, 0.0)
        dscores = (weights * (dweights - delta[:, None])).to(k1.dtype)
        dq1 = tl.dot(dscores, k1, dq1, input_precision=PRECISION)
        if E2 > 0:
            dq2 = tl.dot(dscores, k2, dq2, input_precision=PRECISION)
        i, at, stop = advance(spans_ptr, i, at, stop, count, M, BLOCK_M)

    dq_ptr += (b * N * heads + h) * E
    store_tile(dq_ptr, dq1 * scale, n, live, heads * E, 0, E1, E)
    if E2 > 0:
        store_tile(dq_ptr, dq2 * scale, n, live, heads * E, E1, E2, E)


@triton.jit(do_not_specialize=["frames", "others", "N", "M", "table_b", "spans_b"])
def _backward_kv(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, columns_ptr, spans_ptr,
    dout_b, dout_n, dout_h, q_b, q_n, q_h, k_b, k_m, k_h, v_b, v_m, v_h,
    heads, frames, others, N, M, table_b, spans_b, scale,
    E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys: every query that sees it, in the order of the tokens."""
    bh, b, h, first, end, count, spans_ptr, alone, valid_end = own_tile(
        columns_ptr, spans_ptr, heads, frames, others, M, table_b, spans_b, BLOCK_M
    )
    m = first + tl.arange(0, BLOCK_M)
    live = m < end
    valid = live & (m < valid_end)  # padding is not read

    dout_ptr += b * dout_b + h * dout_h
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    k1 = load_tile(k_ptr, m, valid, k_m, 0, E1, E)  # [BLOCK_M, E1]
    v1 = load_tile(v_ptr, m, valid, v_m, 0, E1, E)
    dk1 = tl.zeros([BLOCK_M, E1], tl.float32)
    dv1 = tl.zeros([BLOCK_M, E1], tl.float32)
    if E2 > 0:
        k2 = load_tile(k_ptr, m, valid, k_m, E1, E2, E)
        v2 = load_tile(v_ptr, m, valid, v_m, E1, E2, E)
        dk2 = tl.zeros([BLOCK_M, E2], tl.float32)
        dv2 = tl.zeros([BLOCK_M, E2], tl.float32)
    if alone:  # the token's own output was its v
        dv1 += load_tile(dout_ptr, m, live, dout_n, 0, E1, E)
        if E2 > 0:
            dv2 += load_tile(dout_ptr, m, live, dout_n, E1, E2, E)

    i = 0
    at, stop = span(spans_ptr, i, count, N)
    for _ in range(steps(spans_ptr, count, N, BLOCK_N)):
        n = at + tl.arange(0, BLOCK_N)
        seeing = n < stop
        q1 = load_tile(q_ptr, n, seeing, q_n, 0, E1, E)
        dout1 = load_tile(dout_ptr, n, seeing, dout_n, 0, E1, E)
        lse = tl.load(lse_ptr + bh * N + n, mask=seeing, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + bh * N + n, mask=seeing, other=0.0)
        scores = tl.dot(k1, q1.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        dweights = tl.dot(v1, dout1.T, input_precision=PRECISION)
        if E2 > 0:
            q2 = load_tile(q_ptr, n, seeing, q_n, E1, E2, E)
            dout2 = load_tile(dout_ptr, n, seeing, dout_n, E1, E2, E)
            scores = tl.dot(k2, q2.T, scores, input_precision=PRECISION)
            dweights = tl.dot(v2, dout2.T, dweights, input_precision=PRECISION)
        weights = tl.exp2(scores * (scale * LOG2E) - lse[None, :])
        weights = tl.where(valid[:, None] & seeing[None, :], weights, 0.0)
        dscores = (weights * (dweights - delta[None, :])).to(q1.dtype)
        weights = weights.to(dout1.dtype)
        dv1 = tl.dot(weights, dout1, dv1, input_precision=PRECISION)
        dk1 = tl.dot(dscores, q1, dk1, input_precision=PRECISION)
        if E2 > 0:
            dv2 = tl.dot(weights, dout2, dv2, input_precision=PRECISION)
            dk2 = tl.dot(dscores, q2, dk2, input_precision=PRECISION)
        i, at, stop = advance(spans_ptr, i, at, stop, count, N, BLOCK_N)

    dk_ptr += (b * M * heads + h) * E
    dv_ptr += (b * M * heads + h) * E
    store_tile(dk_ptr, dk1 * scale, m, live, heads * E, 0, E1, E)
    store_tile(dv_ptr, dv1, m, live, heads * E, 0, E1, E)
    if E2 > 0:
        store_tile(dk_ptr, dk2 * scale, m, live, heads * E, E1, E2, E)
        store_tile(dv_ptr, dv2, m, live, heads * E, E1, E2, E)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    row_spans: Tensor,
    scale: float,
    by_descriptors: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B, N, heads, E) in the dtype of q, and lse (B, heads, N) in float32.

    `by_descriptors` forces the kernel of `descriptors.py`, or the one here; None chooses.
    """
    q, k, v = rows_together(q), rows_together(k), rows_together(v)
    B, N, heads, E = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((B, heads, N), dtype=torch.float32)
    if not out.numel():
        return out, lse
    width = sum(split(E))
    if by_descriptors is None:
        by_descriptors = descriptors.chosen(q, k, v, width)
    elif by_descriptors and not descriptors.serves(q, k, v, width):
        raise ValueError(f"no descriptor reads q, k and v of strides {q.stride()}, {k.stride()}")
    blocks = _fitting(descriptors.BLOCKS, width) if by_descriptors else _blocks(FORWARD, q)
    kernel = descriptors.forward if by_descriptors else _forward
    launch = functools.partial(
        kernel[_grid(rows, N, B * heads, blocks)],
        q, k, v, out, lse, rows, row_spans,
        *_strides(q), *_strides(k), *_strides(v),
        heads, *_sizes(rows, row_spans, N, k.shape[1]), scale,
        **_constants(E, q.dtype), BLOCK_N=blocks.rows, BLOCK_M=blocks.steps,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    if by_descriptors:
        descriptors.with_scratch(launch, q.device)
    else:
        launch()
    return out, lse


def launch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    rows: Tensor, row_spans: Tensor, columns: Tensor, column_spans: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv, contiguous, in the dtype of q."""
    dout, q, k, v = (rows_together(tensor) for tensor in (dout, q, k, v))
    B, N, heads, E = q.shape
    M = k.shape[1]
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = torch.empty_like(lse)
    inputs = *_strides(dout), *_strides(q), *_strides(k), *_strides(v), heads
    constants = _constants(E, q.dtype)
    if dq.numel():
        blocks = _blocks(BACKWARD_Q, q)
        _backward_q[_grid(rows, N, B * heads, blocks)](
            dout, q, k, v, out, lse, delta, dq, rows, row_spans,
            *inputs, *_sizes(rows, row_spans, N, M), scale,
            **constants, BLOCK_N=blocks.rows, BLOCK_M=blocks.steps,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    if dk.numel():
        blocks = _blocks(BACKWARD_KV, q)
        _backward_kv[_grid(columns, M, B * heads, blocks)](
            dout, q, k, v, lse, delta, dk, dv, columns, column_spans,
            *inputs, *_sizes(columns, column_spans, N, M), scale,
            **constants, BLOCK_M=blocks.rows, BLOCK_N=blocks.steps,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return dq, dk, dv


def _blocks(table: dict[int, dict[int, Blocks]], q: Tensor) -> Blocks:
    return _fitting(table[32 if q.dtype == torch.float32 else 16], sum(split(q.shape[3])))


def _fitting(table: dict[int, Blocks], width: int) -> Blocks:
    """The entry of the narrowest head that has room for `width`."""
    return next(blocks for widest, blocks in table.items() if width <= widest)


def _constants(E: int, dtype: torch.dtype) -> dict:
    first, second = split(E)
    return {"E": E, "E1": first, "E2": second, "PRECISION": precision(dtype)}


def _grid(table: Tensor, tokens: int, heads: int, blocks: Blocks) -> tuple[int]:
    """As `own_tile` reads it, on the one axis that may be longer than 65535."""
    # Each frame may leave a part of a tile; how many there are is known on the device only.
    return ((triton.cdiv(tokens, blocks.rows) + table.shape[1]) * heads,)


def _sizes(table: Tensor, spans: Tensor, N: int, M: int) -> tuple[int, ...]:
    """frames, others, N, M and the batch strides of the two tables, 0 where they are shared."""
    steps = (t.stride(0) if t.shape[0] > 1 else 0 for t in (table, spans))
    return table.shape[1], spans.shape[2], N, M, *steps


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Steps along batch, tokens and heads; 0 along an axis of size 1, whose stride is arbitrary."""
    b, n, h, _ = tensor.stride()
    return tuple(s if size > 1 else 0 for s, size in zip((b, n, h), tensor.shape, strict=False))


def _variant(
    name: str, kernel, table: dict[int, Blocks], E: int, dtype: str = "bf16", architectures=None
) -> Variant:
    blocks = _fitting(table, sum(split(E)))
    owned, other = ("BLOCK_M", "BLOCK_N") if kernel is _backward_kv else ("BLOCK_N", "BLOCK_M")
    tensors = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
    types = {f"{tensor}_ptr": f"*{dtype}:16" for tensor in tensors}
    types |= {"lse_ptr": "*fp32:16", "delta_ptr": "*fp32:16"}
    types |= dict.fromkeys(("rows_ptr", "columns_ptr", "spans_ptr"), "*i32:16")
    types |= {f"{t}_{axis}": "i32:16" for t in ("q", "dout") for axis in "bnh"}
    types |= {f"{t}_{axis}": "i32:16" for t in ("k", "v") for axis in "bmh"}
    types |= dict.fromkeys(("frames", "others", "N", "M", "table_b", "spans_b"), "i32")
    types |= {"heads": "i32:16", "scale": "fp32"}
    constants = _constants(E, torch.float32 if dtype == "fp32" else torch.bfloat16)
    constants |= {owned: blocks.rows, other: blocks.steps}
    return Variant(name, kernel, types, constants, blocks.warps, blocks.stages, architectures)


# VDT-S, MarDini's generator and Pyramid Flow (64), VDT-L (72), MarDini's planner (128).
WIDTHS = (64, 72, 128)
VARIANTS = [
    *intervals_kernel.VARIANTS,
    *(_variant(f"forward_{E}", _forward, FORWARD[16], E) for E in WIDTHS),
    *(_variant(f"backward_q_{E}", _backward_q, BACKWARD_Q[16], E) for E in WIDTHS),
    *(_variant(f"backward_kv_{E}", _backward_kv, BACKWARD_KV[16], E) for E in WIDTHS),
    _variant("forward_fp32_64", _forward, FORWARD[32], 64, "fp32"),
    _variant("backward_kv_fp32_64", _backward_kv, BACKWARD_KV[32], 64, "fp32"),
    *(
        _variant(
            f"forward_descriptors_{E}", descriptors.forward, descriptors.BLOCKS, E,
            architectures=("sm_90",),
        ) for E in WIDTHS
    ),
]  # fmt: skip
