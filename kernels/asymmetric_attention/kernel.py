"""The Triton kernels of `asymmetric_attention` and their launchers.

A program owns one tile of queries inside one frame of one sample and head, and walks the keys that
its frame sees: those of one frame, or of all. Where all frames see the same keys and none is known,
the frames of a sample are one long frame, so that tiles do not end with each of them. Few keys are
loaded once for several tiles of queries (`_forward_resident`).

Backward is two kernels, dQ over the queries and dK with dV over the keys. A tile of keys walks all
queries that see it, whatever the sample, so that shared keys are summed where they are; where that
makes too few programs for a GPU, the queries are split and the parts added in a fixed order. No
atomics: the same bits in every run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from .._shared.views import bytes_of, merges, rows_together, steps_of


class Blocks(NamedTuple):
    rows: int  # tokens that a program owns
    steps: int  # tokens of the other side that it takes at a time
    warps: int
    stages: int


# By the padded head width, for 16-bit and for 32-bit inputs: the largest found that spill nothing
# on any of the budgeted architectures under Triton 3.7; under 3.6 two variants take 16 or 32
# bytes of stack (`budget.json`). Float32 wider than 64 may spill. One table serves all until a
# measurement splits it.
FORWARD = {
    16: {
        64: Blocks(128, 64, 8, 3),
        80: Blocks(128, 32, 8, 3),
        128: Blocks(128, 32, 8, 3),
        256: Blocks(64, 32, 8, 2),
    },
    32: {64: Blocks(64, 16, 8, 2), 128: Blocks(32, 32, 8, 2), 256: Blocks(16, 16, 8, 2)},
}
BACKWARD_Q = {
    16: {
        64: Blocks(128, 32, 8, 2),
        80: Blocks(64, 32, 4, 2),
        128: Blocks(64, 32, 8, 2),
        256: Blocks(32, 32, 8, 2),
    },
    32: {64: Blocks(32, 32, 8, 2), 128: Blocks(16, 16, 4, 2), 256: Blocks(16, 16, 8, 1)},
}
BACKWARD_KV = {
    16: {
        64: Blocks(128, 32, 8, 2),
        80: Blocks(64, 32, 8, 2),
        128: Blocks(64, 32, 8, 2),
        256: Blocks(32, 32, 8, 1),
    },
    32: {64: Blocks(16, 32, 4, 2), 128: Blocks(16, 16, 4, 2), 256: Blocks(16, 16, 8, 1)},
}
# Predictions, not measured: keys that stay in a program, tiles of queries that it takes at most,
# and the programs that keep a large GPU busy.
RESIDENT = 64
MOST_TILES = 8
BUSY = 512

_SIZES = ["known_b", "known_t", "heads", "T", "N", "F", "M", "clip"]
_Q, _K, _V, _DOUT = (
    [f"{name}_{axis}" for axis in axes]
    for name, axes in (("q", "btnh"), ("k", "btmh"), ("v", "btmh"), ("dout", "btnh"))
)


@triton.jit
def _tile(tile, tiles, frames, heads, BLOCK: tl.constexpr):
    """Sample, frame and head of a tile, and its tokens."""
    tokens = tile % tiles * BLOCK + tl.arange(0, BLOCK)
    rest = tile // tiles
    b, t, h = rest // heads // frames, rest // heads % frames, rest % heads
    return b.to(tl.int64), t.to(tl.int64), h.to(tl.int64), tokens


@triton.jit
def _wanted(known_ptr, at):
    """1, or 0 for a known frame."""
    wanted = 1
    if known_ptr is not None:
        wanted = 1 - tl.load(known_ptr + at).to(tl.int32)
    return wanted


@triton.jit(do_not_specialize=[*_Q, *_K, *_V, *_SIZES, "scale"])
def _forward(
    q_ptr, k_ptr, v_ptr, known_ptr, out_ptr, lse_ptr,
    q_b, q_t, q_n, q_h, k_b, k_t, k_m, k_h, v_b, v_t, v_m, v_h,
    known_b, known_t, heads, T, N, F, M, clip, scale,
    E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, t, h, n = _tile(tl.program_id(0), tl.cdiv(N, BLOCK_N), T, heads, BLOCK_N)
    live = n < N
    q_ptr += (b * q_b + t * q_t + h * q_h) * UNIT
    k_ptr += (b * k_b + h * k_h) * UNIT
    v_ptr += (b * v_b + h * v_h) * UNIT
    q_n, k_m, v_m = q_n.to(tl.int64) * UNIT, k_m.to(tl.int64) * UNIT, v_m.to(tl.int64) * UNIT
    q1 = load_tile(q_ptr, n, live, q_n, 0, E1, E)  # [BLOCK_N, E1]
    acc1 = tl.zeros([BLOCK_N, E1], tl.float32)
    if E2 > 0:
        q2 = load_tile(q_ptr, n, live, q_n, E1, E2, E)
        acc2 = tl.zeros([BLOCK_N, E2], tl.float32)
    top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)

    first = tl.where(clip != 0, 0, t)
    frames = tl.where(clip != 0, F, 1) * _wanted(known_ptr, b * known_b + t * known_t)
    for f in range(first, first + frames):
        far = tl.cast(f, tl.int64) * UNIT  # the interpreter counts loops in int32
        k_frame, v_frame = k_ptr + far * k_t, v_ptr + far * v_t
        for start in range(0, M, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            seen = m < M
            k1 = load_tile(k_frame, m, seen, k_m, 0, E1, E)
            scores = tl.dot(q1, k1.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
            if E2 > 0:
                k2 = load_tile(k_frame, m, seen, k_m, E1, E2, E)
                scores = tl.dot(q2, k2.T, scores, input_precision=PRECISION)
            weights, shrink, top, total = online_softmax(scores, seen, scale, top, total)
            v1 = load_tile(v_frame, m, seen, v_m, 0, E1, E)
            weights = weights.to(v1.dtype)
            acc1 = tl.dot(weights, v1, acc1 * shrink[:, None], input_precision=PRECISION)
            if E2 > 0:
                v2 = load_tile(v_frame, m, seen, v_m, E1, E2, E)
                acc2 = tl.dot(weights, v2, acc2 * shrink[:, None], input_precision=PRECISION)

    share = tl.where(total == 0.0, 0.0, 1.0 / total)  # 0 where known
    out_ptr += ((b * T + t) * N * heads + h) * E
    store_tile(out_ptr, acc1 * share[:, None], n, live, heads * E, 0, E1, E)
    if E2 > 0:
        store_tile(out_ptr, acc2 * share[:, None], n, live, heads * E, E1, E2, E)
    lse = (top + tl.log2(total)) * LN2
    tl.store(lse_ptr + ((b * heads + h) * T + t) * N + n, lse, mask=live)


@triton.jit(do_not_specialize=[*_Q, *_K, *_V, *_SIZES, "tiles", "scale"])
def _forward_resident(
    q_ptr, k_ptr, v_ptr, known_ptr, out_ptr, lse_ptr,
    q_b, q_t, q_n, q_h, k_b, k_t, k_m, k_h, v_b, v_t, v_m, v_h,
    known_b, known_t, heads, T, N, F, M, clip, tiles, scale,
    E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All keys that a frame sees are one block, for `tiles` tiles of queries."""
    own = tiles * BLOCK_N
    b, t, h, _ = _tile(tl.program_id(0), tl.cdiv(N, own), T, heads, BLOCK_N)
    chunk = tl.program_id(0) % tl.cdiv(N, own)
    f = tl.where(clip != 0, 0, t)
    m = tl.arange(0, BLOCK_M)
    seen = m < M
    q_ptr += (b * q_b + t * q_t + h * q_h) * UNIT
    k_ptr += (b * k_b + f * k_t + h * k_h) * UNIT
    v_ptr += (b * v_b + f * v_t + h * v_h) * UNIT
    q_n, k_m, v_m = q_n.to(tl.int64) * UNIT, k_m.to(tl.int64) * UNIT, v_m.to(tl.int64) * UNIT
    out_ptr += ((b * T + t) * N * heads + h) * E
    lse_ptr += ((b * heads + h) * T + t) * N
    k1 = load_tile(k_ptr, m, seen, k_m, 0, E1, E)  # [BLOCK_M, E1]
    v1 = load_tile(v_ptr, m, seen, v_m, 0, E1, E)
    if E2 > 0:
        k2 = load_tile(k_ptr, m, seen, k_m, E1, E2, E)
        v2 = load_tile(v_ptr, m, seen, v_m, E1, E2, E)
    wanted = _wanted(known_ptr, b * known_b + t * known_t) != 0
    for start in range(chunk * own, tl.minimum(chunk * own + own, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        live = n < N
        q1 = load_tile(q_ptr, n, live & wanted, q_n, 0, E1, E)  # [BLOCK_N, E1]
        scores = tl.dot(q1, k1.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        if E2 > 0:
            q2 = load_tile(q_ptr, n, live & wanted, q_n, E1, E2, E)
            scores = tl.dot(q2, k2.T, scores, input_precision=PRECISION)
        scores = tl.where(seen[None, :], scores * (scale * LOG2E), -float("inf"))
        top = tl.max(scores, axis=1)
        weights = tl.exp2(scores - top[:, None])
        total = tl.sum(weights, axis=1)
        weights = weights.to(v1.dtype)
        out = tl.dot(weights, v1, input_precision=PRECISION) / total[:, None]
        store_tile(out_ptr, tl.where(wanted, out, 0.0), n, live, heads * E, 0, E1, E)
        if E2 > 0:
            out = tl.dot(weights, v2, input_precision=PRECISION) / total[:, None]
            store_tile(out_ptr, tl.where(wanted, out, 0.0), n, live, heads * E, E1, E2, E)
        lse = tl.where(wanted, (top + tl.log2(total)) * LN2, -float("inf"))
        tl.store(lse_ptr + n, lse, mask=live)


@triton.jit(do_not_specialize=[*_DOUT, *_Q, *_K, *_V, *_SIZES, "scale"])
def _backward_q(
    dout_ptr, q_ptr, k_ptr, v_ptr, known_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr,
    dout_b, dout_t, dout_n, dout_h, q_b, q_t, q_n, q_h,
    k_b, k_t, k_m, k_h, v_b, v_t, v_m, v_h,
    known_b, known_t, heads, T, N, F, M, clip, scale,
    E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, and delta = sum(dout * out) of every row for `_backward_kv`."""
    b, t, h, n = _tile(tl.program_id(0), tl.cdiv(N, BLOCK_N), T, heads, BLOCK_N)
    live = n < N
    dout_ptr += (b * dout_b + t * dout_t + h * dout_h) * UNIT
    q_ptr += (b * q_b + t * q_t + h * q_h) * UNIT
    k_ptr += (b * k_b + h * k_h) * UNIT
    v_ptr += (b * v_b + h * v_h) * UNIT
    dout_n, q_n = dout_n.to(tl.int64) * UNIT, q_n.to(tl.int64) * UNIT
    k_m, v_m = k_m.to(tl.int64) * UNIT, v_m.to(tl.int64) * UNIT
    out_ptr += ((b * T + t) * N * heads + h) * E
    dq_ptr += ((b * T + t) * N * heads + h) * E
    row = ((b * heads + h) * T + t) * N + n
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
    tl.store(delta_ptr + row, delta, mask=live)
    lse = tl.load(lse_ptr + row, mask=live, other=0.0) * LOG2E

    first = tl.where(clip != 0, 0, t)
    frames = tl.where(clip != 0, F, 1) * _wanted(known_ptr, b * known_b + t * known_t)
    for f in range(first, first + frames):
        far = tl.cast(f, tl.int64) * UNIT  # the interpreter counts loops in int32
        k_frame, v_frame = k_ptr + far * k_t, v_ptr + far * v_t
        for start in range(0, M, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            seen = m < M
            k1 = load_tile(k_frame, m, seen, k_m, 0, E1, E)
            v1 = load_tile(v_frame, m, seen, v_m, 0, E1, E)
            scores = tl.dot(q1, k1.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
            dweights = tl.dot(dout1, v1.T, input_precision=PRECISION)
            if E2 > 0:
                k2 = load_tile(k_frame, m, seen, k_m, E1, E2, E)
                v2 = load_tile(v_frame, m, seen, v_m, E1, E2, E)
                scores = tl.dot(q2, k2.T, scores, input_precision=PRECISION)
                dweights = tl.dot(dout2, v2.T, dweights, input_precision=PRECISION)
            weights = tl.exp2(scores * (scale * LOG2E) - lse[:, None])
            weights = tl.where(seen[None, :], weights, 0.0)
            dscores = (weights * (dweights - delta[:, None])).to(k1.dtype)
            dq1 = tl.dot(dscores, k1, dq1, input_precision=PRECISION)
            if E2 > 0:
                dq2 = tl.dot(dscores, k2, dq2, input_precision=PRECISION)

    store_tile(dq_ptr, dq1 * scale, n, live, heads * E, 0, E1, E)
    if E2 > 0:
        store_tile(dq_ptr, dq2 * scale, n, live, heads * E, E1, E2, E)


@triton.jit(do_not_specialize=[*_DOUT, *_Q, *_K, *_V, *_SIZES, "samples", "scale"])
def _backward_kv(
    dout_ptr, q_ptr, k_ptr, v_ptr, known_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    dout_b, dout_t, dout_n, dout_h, q_b, q_t, q_n, q_h,
    k_b, k_t, k_m, k_h, v_b, v_t, v_m, v_h,
    known_b, known_t, heads, T, N, F, M, clip, samples, scale,
    E: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys, which `samples` samples share, over one part of the queries."""
    tiles = tl.cdiv(M, BLOCK_M)
    b, f, h, m = _tile(tl.program_id(0), tiles, F, heads, BLOCK_M)
    part, parts = tl.program_id(1), tl.num_programs(1)
    live = m < M
    k_ptr += (b * k_b + f * k_t + h * k_h) * UNIT
    v_ptr += (b * v_b + f * v_t + h * v_h) * UNIT
    dout_n, q_n = dout_n.to(tl.int64) * UNIT, q_n.to(tl.int64) * UNIT
    k_m, v_m = k_m.to(tl.int64) * UNIT, v_m.to(tl.int64) * UNIT
    k1 = load_tile(k_ptr, m, live, k_m, 0, E1, E)  # [BLOCK_M, E1]
    v1 = load_tile(v_ptr, m, live, v_m, 0, E1, E)
    dk1 = tl.zeros([BLOCK_M, E1], tl.float32)
    dv1 = tl.zeros([BLOCK_M, E1], tl.float32)
    if E2 > 0:
        k2 = load_tile(k_ptr, m, live, k_m, E1, E2, E)
        v2 = load_tile(v_ptr, m, live, v_m, E1, E2, E)
        dk2 = tl.zeros([BLOCK_M, E2], tl.float32)
        dv2 = tl.zeros([BLOCK_M, E2], tl.float32)

    # Frames of queries, counted through all samples: every one in the clip, or the f-th of each.
    first = b * T + tl.where(clip != 0, 0, f)
    for frame in range(first, (b + samples) * T, tl.where(clip != 0, 1, T)):
        sample, t = tl.cast(frame, tl.int64) // T, tl.cast(frame, tl.int64) % T
        q_frame = q_ptr + (sample * q_b + t * q_t + h * q_h) * UNIT
        dout_frame = dout_ptr + (sample * dout_b + t * dout_t + h * dout_h) * UNIT
        row = ((sample * heads + h) * T + t) * N
        wanted = _wanted(known_ptr, sample * known_b + t * known_t)
        for tile in range(part, tl.cdiv(N, BLOCK_N) * wanted, parts):
            n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            seeing = n < N
            q1 = load_tile(q_frame, n, seeing, q_n, 0, E1, E)  # [BLOCK_N, E1]
            dout1 = load_tile(dout_frame, n, seeing, dout_n, 0, E1, E)
            lse = tl.load(lse_ptr + row + n, mask=seeing, other=0.0) * LOG2E
            delta = tl.load(delta_ptr + row + n, mask=seeing, other=0.0)
            scores = tl.dot(k1, q1.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            dweights = tl.dot(v1, dout1.T, input_precision=PRECISION)
            if E2 > 0:
                q2 = load_tile(q_frame, n, seeing, q_n, E1, E2, E)
                dout2 = load_tile(dout_frame, n, seeing, dout_n, E1, E2, E)
                scores = tl.dot(k2, q2.T, scores, input_precision=PRECISION)
                dweights = tl.dot(v2, dout2.T, dweights, input_precision=PRECISION)
            weights = tl.exp2(scores * (scale * LOG2E) - lse[None, :])
            weights = tl.where(live[:, None] & seeing[None, :], weights, 0.0)
            dscores = (weights * (dweights - delta[None, :])).to(q1.dtype)
            weights = weights.to(dout1.dtype)
            dv1 = tl.dot(weights, dout1, dv1, input_precision=PRECISION)
            dk1 = tl.dot(dscores, q1, dk1, input_precision=PRECISION)
            if E2 > 0:
                dv2 = tl.dot(weights, dout2, dv2, input_precision=PRECISION)
                dk2 = tl.dot(dscores, q2, dk2, input_precision=PRECISION)

    before = part * (tl.num_programs(0) // tiles // heads) + b * F + f  # frames of keys
    dk_ptr += (before * M * heads + h) * E
    dv_ptr += (before * M * heads + h) * E
    store_tile(dk_ptr, dk1 * scale, m, live, heads * E, 0, E1, E)
    store_tile(dv_ptr, dv1, m, live, heads * E, 0, E1, E)
    if E2 > 0:
        store_tile(dk_ptr, dk2 * scale, m, live, heads * E, E1, E2, E)
        store_tile(dv_ptr, dv2, m, live, heads * E, E1, E2, E)


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, known: Tensor | None, scale: float, clip: bool
) -> tuple[Tensor, Tensor]:
    """out (B, T, Nq, heads, E) in the dtype of q, and lse (B, heads, T, Nq) in float32."""
    B, T, N, heads, E = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((B, heads, T, N), dtype=torch.float32)
    if out.numel():
        (q,), k, v, clip = _long_frames([q], k, v, known, clip)
        _, T, N, _, _ = q.shape
        blocks, sizes = _blocks(FORWARD, q), _sizes(q, k, known, clip)
        unit, steps = steps_of(q, k, v)
        if k.shape[2] <= RESIDENT and (k.shape[1] == 1 or not clip):
            tiles = _tiles_each(B * T * heads, triton.cdiv(N, blocks.rows))
            _forward_resident[(B * T * heads * triton.cdiv(N, tiles * blocks.rows),)](
                q, k, v, bytes_of(known), out, lse, *steps, *sizes, tiles, scale,
                **_constants(E, q.dtype), UNIT=unit, BLOCK_N=blocks.rows, BLOCK_M=RESIDENT,
                num_warps=blocks.warps, num_stages=blocks.stages,
            )  # fmt: skip
        else:
            _forward[(B * T * heads * triton.cdiv(N, blocks.rows),)](
                q, k, v, bytes_of(known), out, lse, *steps, *sizes, scale,
                **_constants(E, q.dtype), UNIT=unit, BLOCK_N=blocks.rows, BLOCK_M=blocks.steps,
                num_warps=blocks.warps, num_stages=blocks.stages,
            )  # fmt: skip
    return out, lse


def launch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    known: Tensor | None, scale: float, clip: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv, contiguous, in the shapes and the dtype of q, k and v."""
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = lse.new_empty(lse.shape)
    (dout, q), k, v, clip = _long_frames([dout, q], k, v, known, clip)
    B, T, N, heads, E = q.shape
    unit, steps = steps_of(dout, q, k, v)
    sizes, constants = _sizes(q, k, known, clip), _constants(E, q.dtype)
    if dq.numel():
        blocks = _blocks(BACKWARD_Q, q)
        _backward_q[(B * T * heads * triton.cdiv(N, blocks.rows),)](
            dout, q, k, v, bytes_of(known), out, lse, delta, dq, *steps, *sizes, scale,
            **constants, UNIT=unit, BLOCK_N=blocks.rows, BLOCK_M=blocks.steps,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    if dk.numel():
        blocks = _blocks(BACKWARD_KV, q)
        samples, F, M = k.shape[:3]
        programs = samples * F * heads * triton.cdiv(M, blocks.rows)
        parts = _parts(programs, triton.cdiv(N, blocks.steps))
        sums: tuple[Tensor, ...] = (dk, dv)
        if parts > 1:
            sums = tuple(x.new_empty((parts, *x.shape), dtype=torch.float32) for x in sums)
        _backward_kv[(programs, parts)](
            dout, q, k, v, bytes_of(known), lse, delta, *sums, *steps, *sizes,
            B // samples, scale,
            **constants, UNIT=unit, BLOCK_M=blocks.rows, BLOCK_N=blocks.steps,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        if parts > 1:
            for whole, each in zip((dk, dv), sums, strict=True):
                whole.copy_(each.sum(0))
    return dq, dk, dv


def _tiles_each(frames: int, tiles: int) -> int:
    """Tiles of queries per program, so that enough programs remain."""
    return max(1, min(MOST_TILES, frames * tiles // (2 * BUSY)))


def _parts(programs: int, tiles: int) -> int:
    """Into how many parts the queries of a tile of keys are split."""
    return max(1, min(BUSY // programs, tiles))


def _long_frames(queries, k, v, known, clip):
    """Views in which frames that see the same keys are one, and what `clip` then is."""
    queries, k, v = [rows_together(x) for x in queries], rows_together(k), rows_together(v)
    clip = clip or k.shape[1] == 1
    if clip and merges(k, 1) and merges(v, 1):
        k, v = (x.flatten(1, 2).unsqueeze(1) for x in (k, v))
    if clip and known is None and all(merges(x, 1) for x in queries):
        queries = [x.flatten(1, 2).unsqueeze(1) for x in queries]
    return queries, k, v, clip


def _blocks(table: dict[int, dict[int, Blocks]], q: Tensor) -> Blocks:
    widths = table[32 if q.dtype == torch.float32 else 16]
    return next(blocks for width, blocks in widths.items() if sum(split(q.shape[4])) <= width)


def _constants(E: int, dtype: torch.dtype) -> dict:
    first, second = split(E)
    return {"E": E, "E1": first, "E2": second, "PRECISION": precision(dtype)}


def _sizes(q: Tensor, k: Tensor, known: Tensor | None, clip: bool) -> tuple[int, ...]:
    steps = (0, 0) if known is None else known.stride()
    return *steps, q.shape[3], *q.shape[1:3], *k.shape[1:3], int(clip)


def _variant(name: str, kernel, table, E: int, dtype: str = "bf16", known: bool = False) -> Variant:
    """A call on views whose strides are multiples of 8."""
    bits, torch_dtype = (32, torch.float32) if dtype == "fp32" else (16, torch.bfloat16)
    blocks = next(b for width, b in table[bits].items() if sum(split(E)) <= width)
    owned, other = ("BLOCK_M", "BLOCK_N") if kernel is _backward_kv else ("BLOCK_N", "BLOCK_M")
    tensors = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
    types = {f"{tensor}_ptr": f"*{dtype}:16" for tensor in tensors}
    types |= {"lse_ptr": "*fp32:16", "delta_ptr": "*fp32:16", "known_ptr": "*u8", "scale": "fp32"}
    types |= dict.fromkeys([*_DOUT, *_Q, *_K, *_V, *_SIZES, "tiles", "samples"], "i32")
    constants = _constants(E, torch_dtype) | {"UNIT": 8, owned: blocks.rows}
    constants |= {other: RESIDENT if kernel is _forward_resident else blocks.steps}
    constants |= {} if known else {"known_ptr": None}
    return Variant(name, kernel, types, constants, blocks.warps, blocks.stages)


# MarDini's generator (64), heads of 72, and MarDini's planner (128).
VARIANTS = [
    *(_variant(f"forward_{E}", _forward, FORWARD, E) for E in (64, 72, 128)),
    _variant("forward_known_64", _forward, FORWARD, 64, known=True),
    _variant("forward_fp32_64", _forward, FORWARD, 64, "fp32"),
    *(_variant(f"resident_{E}", _forward_resident, FORWARD, E) for E in (64, 72)),
    *(_variant(f"backward_q_{E}", _backward_q, BACKWARD_Q, E) for E in (64, 72)),
    *(_variant(f"backward_kv_{E}", _backward_kv, BACKWARD_KV, E) for E in (64, 72)),
    _variant("backward_kv_known_64", _backward_kv, BACKWARD_KV, 64, known=True),
]
