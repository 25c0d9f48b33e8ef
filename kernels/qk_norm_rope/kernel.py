"""The Triton kernels of `qk_norm_rope` and their launchers.

A program owns whole tokens of q or of k, all heads of them, as two tiles: `a` holds the first of
each pair of channels that turn together, `b` the second. Neighbours are loaded as one row and
split in registers, halves are two loads. Angles are read once per token, for all heads. Backward a
program goes through a chunk of tokens and keeps the sums for weight and bias in registers; the
chunks are added up in a fixed order by `_add_chunks`. No atomics, so two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._shared.variants import Variant
from .._shared.views import rows_together, steps_of

NORMS = {None: 0, "rms": 1, "layer": 2}
PER_THREAD = 16  # numbers of a tile
TILE = 2048  # at least, in numbers: as many tokens as that takes
# Backward: enough programs to fill a large GPU, but no chunk so short that its sums weigh.
PROGRAMS, SHORTEST_CHUNK = 512, 8  # programs of q, and as many of k
_FORWARD_STEPS = [f"{x}_{axis}" for x in "qk" for axis in "bnh"]
_BACKWARD_STEPS = [f"{x}_{axis}" for x in ("dqo", "dko", "q", "k") for axis in "bnh"]


@triton.jit
def _load(
    ptr, at, live, E: tl.constexpr, HALF_E: tl.constexpr, HALVES: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """The pairs of the rows that start at `at` [BLOCK_N, HEADS, 1], as two float32 tiles."""
    if HALVES:
        first, second, real = _places(E, HALF_E, D0, D1, D2)
        a = tl.load(ptr + at + first, mask=live & real, other=0.0)
        b = tl.load(ptr + at + second, mask=live & real, other=0.0)
    else:
        e = tl.arange(0, 2 * HALF_E)[None, None, :]
        x = tl.load(ptr + at + e, mask=live & (e < E), other=0.0)
        a, b = tl.split(tl.reshape(x, [at.shape[0], at.shape[1], HALF_E, 2]))
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store(
    ptr, a, b, at, live, E: tl.constexpr, HALF_E: tl.constexpr, HALVES: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = ptr.dtype.element_ty
    if HALVES:
        first, second, real = _places(E, HALF_E, D0, D1, D2)
        tl.store(ptr + at + first, a.to(dtype), mask=live & real)
        tl.store(ptr + at + second, b.to(dtype), mask=live & real)
    else:
        e = tl.arange(0, 2 * HALF_E)[None, None, :]
        tl.store(ptr + at + e, tl.interleave(a, b).to(dtype), mask=live & (e < E))


@triton.jit
def _places(
    E: tl.constexpr, HALF_E: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr
):
    """Channels of both of each pair where the pairs of an axis are its halves; which are real.

    What is not turned is one more axis.
    """
    pair = tl.arange(0, HALF_E)[None, None, :]
    first, second = pair, pair + D0 // 2
    if D1:
        first = tl.where(pair >= D0 // 2, pair + D0 // 2, first)
        second = tl.where(pair >= D0 // 2, pair + D0 // 2 + D1 // 2, second)
    if D2:
        start: tl.constexpr = (D0 + D1) // 2
        first = tl.where(pair >= start, pair + start, first)
        second = tl.where(pair >= start, pair + start + D2 // 2, second)
    if D0 + D1 + D2 < E:
        start_of_rest: tl.constexpr = (D0 + D1 + D2) // 2
        first = tl.where(pair >= start_of_rest, pair + start_of_rest, first)
        second = tl.where(pair >= start_of_rest, pair + E // 2, second)
    return first, second, pair < E // 2


@triton.jit
def _turn(
    a, b, cos_ptr, sin_ptr, index_ptr, at, live, sign,
    HALF_E: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """Turn the pairs by the angles of their tokens, [BLOCK_N]; sign -1 turns back."""
    if cos_ptr is not None:
        PAIRS: tl.constexpr = (D0 + D1 + D2) // 2
        pair = tl.arange(0, HALF_E)[None, :]
        row = tl.load(index_ptr + at, mask=live, other=0)[:, None]
        if D1:
            other = tl.load(index_ptr + at + 1, mask=live, other=0)[:, None]
            row = tl.where(pair >= D0 // 2, other, row)
        if D2:
            other = tl.load(index_ptr + at + 2, mask=live, other=0)[:, None]
            row = tl.where(pair >= (D0 + D1) // 2, other, row)
        place = row.to(tl.int64) * PAIRS + pair
        real = live[:, None] & (pair < PAIRS)
        cos = tl.load(cos_ptr + place, mask=real, other=1.0)[:, None, :].to(tl.float32)
        sin = tl.load(sin_ptr + place, mask=real, other=0.0)[:, None, :].to(tl.float32) * sign
        a, b = a * cos - b * sin, a * sin + b * cos
    return a, b


@triton.jit
def _sum(a, b, ACROSS: tl.constexpr):
    """Over the numbers that a norm is of: [BLOCK_N, HEADS or 1, 1]."""
    total = tl.sum(a + b, axis=2, keep_dims=True)
    if ACROSS:
        total = tl.sum(total, axis=1, keep_dims=True)
    return total


@triton.jit
def _normalize(a, b, real, eps, COUNT: tl.constexpr, NORM: tl.constexpr, ACROSS: tl.constexpr):
    if NORM == 2:
        mean = _sum(a, b, ACROSS) / COUNT
        a = tl.where(real, a - mean, 0.0)
        b = tl.where(real, b - mean, 0.0)
    rstd = tl.rsqrt(_sum(a * a, b * b, ACROSS) / COUNT + eps)
    # Rows that are only padding have no deviation: without an eps, 0 times infinity.
    return tl.where(real, a * rstd, 0.0), tl.where(real, b * rstd, 0.0), rstd


@triton.jit
def _forward_block(
    x_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, index_ptr, y_ptr,
    tokens, N, index_b, x_b, x_n, x_h, eps,
    heads: tl.constexpr, E: tl.constexpr, UNIT: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, AXES: tl.constexpr,
    HALVES: tl.constexpr, NORM: tl.constexpr, ACROSS: tl.constexpr,
    BLOCK_N: tl.constexpr, HEADS: tl.constexpr, HALF_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, n = row // N, row % N
    h = tl.arange(0, HEADS)[None, :, None]
    live = (row < tokens)[:, None, None] & (h < heads)
    real = live & (tl.arange(0, HALF_E)[None, None, :] < E // 2)
    at = (b * x_b + n * x_n)[:, None, None] * UNIT + h.to(tl.int64) * x_h * UNIT
    x0, x1 = _load(x_ptr, at, live, E, HALF_E, HALVES, D0, D1, D2)
    if NORM:
        count: tl.constexpr = heads * E if ACROSS else E
        x0, x1, _ = _normalize(x0, x1, real, eps, count, NORM, ACROSS)
        h_ = h if ACROSS else h * 0
        if weight_ptr is not None:
            w0, w1 = _load(weight_ptr, h_ * E, h < heads, E, HALF_E, HALVES, D0, D1, D2)
            x0, x1 = x0 * w0, x1 * w1
        if bias_ptr is not None:
            b0, b1 = _load(bias_ptr, h_ * E, h < heads, E, HALF_E, HALVES, D0, D1, D2)
            x0, x1 = x0 + b0, x1 + b1
    where = b * index_b + n * AXES
    y0, y1 = _turn(x0, x1, cos_ptr, sin_ptr, index_ptr, where, row < tokens, 1, HALF_E, D0, D1, D2)
    _store(y_ptr, y0, y1, (row[:, None, None] * heads + h) * E, live, E, HALF_E, HALVES, D0, D1, D2)


@triton.jit(do_not_specialize=["tokens", "N", "index_b", *_FORWARD_STEPS])
def _forward(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_bias_ptr, k_bias_ptr, cos_ptr, sin_ptr, index_ptr,
    q_out_ptr, k_out_ptr, tokens, N, index_b, q_b, q_n, q_h, k_b, k_n, k_h, eps,
    heads: tl.constexpr, E: tl.constexpr, UNIT: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, AXES: tl.constexpr,
    HALVES: tl.constexpr, NORM: tl.constexpr, ACROSS: tl.constexpr,
    BLOCK_N: tl.constexpr, HEADS: tl.constexpr, HALF_E: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _forward_block(
            q_ptr, q_weight_ptr, q_bias_ptr, cos_ptr, sin_ptr, index_ptr, q_out_ptr,
            tokens, N, index_b, q_b, q_n, q_h, eps, heads, E, UNIT, D0, D1, D2, AXES,
            HALVES, NORM, ACROSS, BLOCK_N, HEADS, HALF_E,
        )  # fmt: skip
    else:
        _forward_block(
            k_ptr, k_weight_ptr, k_bias_ptr, cos_ptr, sin_ptr, index_ptr, k_out_ptr,
            tokens, N, index_b, k_b, k_n, k_h, eps, heads, E, UNIT, D0, D1, D2, AXES,
            HALVES, NORM, ACROSS, BLOCK_N, HEADS, HALF_E,
        )  # fmt: skip


@triton.jit
def _backward_chunk(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, index_ptr, dx_ptr,
    weight_parts_ptr, bias_parts_ptr, tokens, N, chunk, index_b, dy_b, dy_n, dy_h,
    x_b, x_n, x_h, eps,
    heads: tl.constexpr, E: tl.constexpr, UNIT: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, AXES: tl.constexpr,
    HALVES: tl.constexpr, NORM: tl.constexpr, ACROSS: tl.constexpr,
    BLOCK_N: tl.constexpr, HEADS: tl.constexpr, HALF_E: tl.constexpr,
):  # fmt: skip
    h = tl.arange(0, HEADS)[None, :, None]
    h_ = h if ACROSS else h * 0
    count: tl.constexpr = heads * E if ACROSS else E
    if weight_ptr is not None:
        w0, w1 = _load(weight_ptr, h_ * E, h < heads, E, HALF_E, HALVES, D0, D1, D2)
    dw0 = tl.zeros([BLOCK_N, HEADS, HALF_E], tl.float32)
    dw1 = tl.zeros([BLOCK_N, HEADS, HALF_E], tl.float32)
    db0 = tl.zeros([BLOCK_N, HEADS, HALF_E], tl.float32)
    db1 = tl.zeros([BLOCK_N, HEADS, HALF_E], tl.float32)
    start = tl.program_id(0).to(tl.int64) * chunk
    last = tl.minimum(start + chunk, tokens)
    for first in range(start, last, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N).to(tl.int64)
        b, n = row // N, row % N
        live_n = row < last
        live = live_n[:, None, None] & (h < heads)
        real = live & (tl.arange(0, HALF_E)[None, None, :] < E // 2)
        at = (b * dy_b + n * dy_n)[:, None, None] * UNIT + h.to(tl.int64) * dy_h * UNIT
        g0, g1 = _load(dy_ptr, at, live, E, HALF_E, HALVES, D0, D1, D2)
        where = b * index_b + n * AXES
        g0, g1 = _turn(g0, g1, cos_ptr, sin_ptr, index_ptr, where, live_n, -1, HALF_E, D0, D1, D2)
        if NORM:
            at = (b * x_b + n * x_n)[:, None, None] * UNIT + h.to(tl.int64) * x_h * UNIT
            x0, x1 = _load(x_ptr, at, live, E, HALF_E, HALVES, D0, D1, D2)
            x0, x1, rstd = _normalize(x0, x1, real, eps, count, NORM, ACROSS)
            if bias_ptr is not None:
                db0 += g0
                db1 += g1
            if weight_ptr is not None:
                dw0 += g0 * x0
                dw1 += g1 * x1
                g0, g1 = g0 * w0, g1 * w1
            along = _sum(g0 * x0, g1 * x1, ACROSS) / count
            if NORM == 2:
                mean = _sum(g0, g1, ACROSS) / count
                g0, g1 = g0 - mean, g1 - mean
            g0 = (g0 - x0 * along) * rstd
            g1 = (g1 - x1 * along) * rstd
        at = (row[:, None, None] * heads + h) * E
        _store(dx_ptr, g0, g1, at, live, E, HALF_E, HALVES, D0, D1, D2)
    if weight_ptr is not None:
        _store_sums(weight_parts_ptr, dw0, dw1, heads, E, HALF_E, HALVES, D0, D1, D2, ACROSS)
    if bias_ptr is not None:
        _store_sums(bias_parts_ptr, db0, db1, heads, E, HALF_E, HALVES, D0, D1, D2, ACROSS)


@triton.jit
def _store_sums(
    parts_ptr, a, b, heads: tl.constexpr, E: tl.constexpr, HALF_E: tl.constexpr,
    HALVES: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    ACROSS: tl.constexpr,
):  # fmt: skip
    """Row `program` of the parts: the sum over the tokens of a tile, and over heads that share."""
    a, b = tl.sum(a, axis=0, keep_dims=True), tl.sum(b, axis=0, keep_dims=True)
    rows: tl.constexpr = heads if ACROSS else 1
    if not ACROSS:
        a, b = tl.sum(a, axis=1, keep_dims=True), tl.sum(b, axis=1, keep_dims=True)
    h = tl.arange(0, a.shape[1])[None, :, None]
    at = (tl.program_id(0).to(tl.int64) * rows + h) * E
    _store(parts_ptr, a, b, at, h < rows, E, HALF_E, HALVES, D0, D1, D2)


@triton.jit(do_not_specialize=["tokens", "N", "chunk", "index_b", *_BACKWARD_STEPS])
def _backward(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_bias_ptr, k_bias_ptr,
    cos_ptr, sin_ptr, index_ptr, dq_ptr, dk_ptr, q_weight_parts_ptr, k_weight_parts_ptr,
    q_bias_parts_ptr, k_bias_parts_ptr, tokens, N, chunk, index_b,
    dqo_b, dqo_n, dqo_h, dko_b, dko_n, dko_h, q_b, q_n, q_h, k_b, k_n, k_h, eps,
    heads: tl.constexpr, E: tl.constexpr, UNIT: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, AXES: tl.constexpr,
    HALVES: tl.constexpr, NORM: tl.constexpr, ACROSS: tl.constexpr,
    BLOCK_N: tl.constexpr, HEADS: tl.constexpr, HALF_E: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _backward_chunk(
            dq_out_ptr, q_ptr, q_weight_ptr, q_bias_ptr, cos_ptr, sin_ptr, index_ptr, dq_ptr,
            q_weight_parts_ptr, q_bias_parts_ptr, tokens, N, chunk, index_b, dqo_b, dqo_n, dqo_h,
            q_b, q_n, q_h, eps, heads, E, UNIT, D0, D1, D2, AXES,
            HALVES, NORM, ACROSS, BLOCK_N, HEADS, HALF_E,
        )  # fmt: skip
    else:
        _backward_chunk(
            dk_out_ptr, k_ptr, k_weight_ptr, k_bias_ptr, cos_ptr, sin_ptr, index_ptr, dk_ptr,
            k_weight_parts_ptr, k_bias_parts_ptr, tokens, N, chunk, index_b, dko_b, dko_n, dko_h,
            k_b, k_n, k_h, eps, heads, E, UNIT, D0, D1, D2, AXES,
            HALVES, NORM, ACROSS, BLOCK_N, HEADS, HALF_E,
        )  # fmt: skip


@triton.jit(do_not_specialize=["chunks"])
def _add_chunks(
    parts_ptr, sum0_ptr, sum1_ptr, sum2_ptr, sum3_ptr, chunks,
    W: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Add the rows of the parts (sums, chunks, W), one of the up to four per program_id(1)."""
    which = tl.program_id(1).to(tl.int64)
    w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    total = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    for start in range(0, chunks, BLOCK_R):
        chunk = start + tl.arange(0, BLOCK_R)
        at = (which * chunks + chunk)[:, None] * W + w[None, :]
        total += tl.load(parts_ptr + at, mask=(chunk < chunks)[:, None] & (w < W)[None, :], other=0)
    total = tl.sum(total, axis=0)
    if which == 0:
        _store_row(sum0_ptr, total, w, W)
    elif which == 1:
        _store_row(sum1_ptr, total, w, W)
    elif which == 2:
        _store_row(sum2_ptr, total, w, W)
    else:
        _store_row(sum3_ptr, total, w, W)


@triton.jit
def _store_row(ptr, row, w, W: tl.constexpr):
    if ptr is not None:
        tl.store(ptr + w, row.to(ptr.dtype.element_ty), mask=w < W)


def launch_forward(
    q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, index, dims, interleaved, norm,
    across_heads, eps,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q and k, (B, N, heads, E)."""
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if q.numel():
        (q, k), steps, unit = _strided(q, k)
        constants, warps = _constants(q.shape, dims, interleaved, norm, across_heads)
        tokens = q.shape[0] * q.shape[1]
        affine = map(_packed, (q_weight, k_weight, q_bias, k_bias))
        _forward[(triton.cdiv(tokens, constants["BLOCK_N"]), 2)](
            q, k, *affine, *map(_packed, (cos, sin, index)), q_out, k_out,
            tokens, q.shape[1], _index_step(index), *steps, eps,
            **constants, UNIT=unit, num_warps=warps,
        )  # fmt: skip
    return q_out, k_out


def launch_backward(
    dq_out, dk_out, q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, index, dims, interleaved,
    norm, across_heads, eps,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dq, dk, dq_weight, dk_weight, dq_bias, dk_bias; empty where there is no such argument."""
    affine = q_weight, k_weight, q_bias, k_bias
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    if q.numel() == 0:
        return dq, dk, *(q.new_zeros(0 if t is None else t.shape) for t in affine)
    strided, steps, unit = _strided(dq_out, dk_out, q, k)
    constants, warps = _constants(q.shape, dims, interleaved, norm, across_heads)
    tokens, N = q.shape[0] * q.shape[1], q.shape[1]
    wanted = min(PROGRAMS, triton.cdiv(tokens, max(SHORTEST_CHUNK, constants["BLOCK_N"])))
    chunk = triton.cdiv(tokens, wanted)
    chunks = triton.cdiv(tokens, chunk)
    width = constants["heads"] * constants["E"] if across_heads else constants["E"]
    sums = [None if t is None else t.new_empty(t.shape) for t in affine]
    asked = [t for t in sums if t is not None]
    parts = q.new_empty((len(asked), chunks, width), dtype=torch.float32)
    each = iter(parts.unbind())
    _backward[(chunks, 2)](
        *strided, *map(_packed, affine), *map(_packed, (cos, sin, index)), dq, dk,
        *(None if t is None else next(each) for t in sums),
        tokens, N, chunk, _index_step(index), *steps, eps, **constants, UNIT=unit, num_warps=warps,
    )  # fmt: skip
    if asked:
        _add_chunks[(triton.cdiv(width, 32), len(asked))](
            parts, *asked, *[None] * (4 - len(asked)), chunks,
            W=width, BLOCK_R=32, BLOCK_W=32, num_warps=4,
        )  # fmt: skip
    return dq, dk, *(q.new_empty(0) if t is None else t for t in sums)


def _strided(*tensors: Tensor) -> tuple[list[Tensor], list[int], int]:
    """The tensors with rows together, their steps in units, and the unit: 8 numbers, or one."""
    rows = [rows_together(x) for x in tensors]
    unit, steps = steps_of(*rows)
    return rows, steps, unit


def _packed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _index_step(index: Tensor | None) -> int:
    return 0 if index is None or len(index) == 1 else index.shape[1] * index.shape[2]


def _constants(shape, dims, interleaved, norm, across_heads):
    """The constexpr arguments but UNIT, and the warps."""
    heads, E = shape[-2:]
    HEADS, HALF_E = triton.next_power_of_2(heads), triton.next_power_of_2(E) // 2
    width = 2 * HEADS * HALF_E
    block_n = max(1, TILE // width)
    D0, D1, D2 = (*dims, 0, 0, 0)[:3]
    constants = {
        "heads": heads, "E": E, "D0": D0, "D1": D1, "D2": D2, "AXES": len(dims),
        "HALVES": not interleaved, "NORM": NORMS[norm], "ACROSS": across_heads,
        "BLOCK_N": block_n, "HEADS": HEADS, "HALF_E": HALF_E,
    }  # fmt: skip
    return constants, max(1, min(16, block_n * width // (32 * PER_THREAD)))


def _variant(name, kernel, heads, E, dims, norm="rms", across=False, affine="wb", **options):
    """A bf16 call on views whose strides are multiples of 8, with float32 weights."""
    dtype = options.pop("dtype", "bf16")
    constants, warps = _constants((heads, E), dims, options.pop("interleaved", True), norm, across)
    own = ("q", "k", "q_out", "k_out", "dq_out", "dk_out", "dq", "dk")
    types = dict.fromkeys((f"{t}_ptr" for t in own), f"*{dtype}:16")
    rows = [f"{x}_{row}" for x in "qk" for row in ("weight", "bias")]
    types |= dict.fromkeys((f"{row}_ptr" for row in rows), "*fp32:16")
    types |= dict.fromkeys((f"{row}_parts_ptr" for row in rows), "*fp32:16")
    types |= {"cos_ptr": "*fp32:16", "sin_ptr": "*fp32:16", "index_ptr": "*i32:16", "eps": "fp32"}
    types |= dict.fromkeys(("tokens", "N", "chunk", "index_b"), "i32")
    types |= dict.fromkeys(_BACKWARD_STEPS, "i32")
    for letter, row in (("w", "weight"), ("b", "bias")):
        if letter not in affine:
            constants |= {f"{x}_{row}{part}_ptr": None for x in "qk" for part in ("", "_parts")}
    return Variant(name, kernel, types, {**constants, "UNIT": 8}, warps)


def _variants():
    # Pyramid Flow's two, MarDini's planner and generator, and a turn alone.
    calls = {
        "30x64": (30, 64, (16, 24, 24), "rms", False, "w"),
        "24x64": (24, 64, (64,), "rms", False, "w"),
        "across_32x128": (32, 128, (64, 64), "layer", True, "wb"),
        "16x64": (16, 64, (32, 32), "layer", False, "wb"),
    }
    for direction, kernel in (("forward", _forward), ("backward", _backward)):
        for name, call in calls.items():
            yield _variant(f"{direction}_{name}", kernel, *call)
    plain = (16, 72, (72,), None, False, "")
    yield _variant("forward_turn_16x72", _forward, *plain)
    yield _variant("backward_halves_16x128", _backward, 16, 128, (128,), affine="w",
                   interleaved=False)  # fmt: skip
    yield _variant("backward_fp32_16x64", _backward, 16, 64, (64,), affine="w", dtype="fp32")
    types = {"parts_ptr": "*fp32:16", "chunks": "i32"}
    types |= dict.fromkeys((f"sum{i}_ptr" for i in range(4)), "*fp32:16")
    constants = {"W": 4096, "BLOCK_R": 32, "BLOCK_W": 32}
    yield Variant("add_chunks_4096", _add_chunks, types, constants, num_warps=4)


VARIANTS = list(_variants())
