"""The Triton kernels of `temporal_attention` and their launchers.

A program owns one head and a tile of 64 rows: as many whole sequences as fit, each a position with
its T frames. It computes the scores of all rows against all rows and keeps those within a sequence.
The products that this wastes are free, since memory is what limits the kernel; in return T is plain
data, nothing is padded, and the backward needs no partial sums. E is split into two powers of two
(72 = 64 + 8 of 16), so that 72 and 80 are not padded to 128.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_cuda

from .._shared.tiles import split
from .._shared.variants import Variant
from .._shared.views import bytes_of, rows_together, steps_of

ROWS = 64  # at least the most frames of a sequence
_SIZES = ["T", "N", "heads", "known_b", "known_t", "back", "forward"]
_Q, _K, _V, _DOUT = ([f"{name}_{axis}" for axis in "btnh"] for name in ("q", "k", "v", "dout"))


@triton.jit
def _tile(T, N, heads, ROWS: tl.constexpr):
    """Sample and head of this program; position and frame of each row, and whether it exists."""
    positions = ROWS // T
    blocks = tl.cdiv(N, positions)
    program = tl.program_id(0).to(tl.int64)  # heads next to each other: they share cache lines
    b, block, h = program // heads // blocks, program // heads % blocks, program % heads
    row = tl.arange(0, ROWS)
    n = block * positions + row // T
    return b, h, n, row % T, (row < positions * T) & (n < N)


@triton.jit
def _visible(T, known_ptr, known_row, known_t, back, forward, ROWS: tl.constexpr):
    """[ROWS, ROWS]: same sequence, within the window, not known; or the row itself."""
    row = tl.arange(0, ROWS)
    after = row[None, :] - row[:, None]
    near = (after >= -back) & (after <= forward) & (row[None, :] // T == row[:, None] // T)
    if known_ptr is not None:
        known = tl.load(known_ptr + known_row + row % T * known_t).to(tl.int32)
        near = near & (known == 0)[:, None]
    return near | (after == 0)


@triton.jit
def _load(ptr, at, live, E: tl.constexpr, first, WIDTH: tl.constexpr):
    e = first + tl.arange(0, WIDTH)
    return tl.load(ptr + at[:, None] + e[None, :], mask=live[:, None] & (e < E)[None, :], other=0.0)


@triton.jit
def _turn(x, cos_ptr, sin_ptr, t, sign, E: tl.constexpr, first, WIDTH: tl.constexpr):
    """Rotate the pairs of x [ROWS, WIDTH] by the angles of frame t; sign -1 turns back."""
    if cos_ptr is not None:
        ROWS: tl.constexpr = x.shape[0]
        pair = first // 2 + tl.arange(0, WIDTH // 2)
        at, real = t[:, None] * (E // 2) + pair[None, :], (pair < E // 2)[None, :]
        cos = tl.load(cos_ptr + at, mask=real, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + at, mask=real, other=0.0).to(tl.float32) * sign
        a, b = tl.split(tl.reshape(x.to(tl.float32), [ROWS, WIDTH // 2, 2]))
        x = tl.interleave(a * cos - b * sin, a * sin + b * cos).to(x.dtype)
    return x


@triton.jit
def _dot(a, b):
    """float32 in three tf32 products where there are such."""
    three: tl.constexpr = a.dtype == tl.float32 and is_cuda()
    return tl.dot(a, b, input_precision="tf32x3" if three else "ieee")


@triton.jit
def _probabilities(scores, visible, scale):
    scores = tl.where(visible, scores * (scale * 1.4426950408889634), -float("inf"))
    p = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    return p / tl.sum(p, axis=1)[:, None]


@triton.jit
def _store(ptr, x, at, live, E: tl.constexpr, first, WIDTH: tl.constexpr):
    e = first + tl.arange(0, WIDTH)
    where = ptr + at[:, None] + e[None, :]
    tl.store(where, x.to(ptr.dtype.element_ty), mask=live[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=[*_SIZES, *_Q, *_K, *_V, "scale"])
def _forward(
    q_ptr, k_ptr, v_ptr, known_ptr, cos_ptr, sin_ptr, out_ptr, T, N, heads,
    q_b, q_t, q_n, q_h, k_b, k_t, k_n, k_h, v_b, v_t, v_n, v_h,
    known_b, known_t, scale, back, forward,
    E: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    b, h, n, t, live = _tile(T, N, heads, ROWS)
    q_at = (b * q_b + h * q_h + n * q_n + t * q_t.to(tl.int64)) * UNIT
    k_at = (b * k_b + h * k_h + n * k_n + t * k_t.to(tl.int64)) * UNIT
    v_at = (b * v_b + h * v_h + n * v_n + t * v_t.to(tl.int64)) * UNIT
    q = _turn(_load(q_ptr, q_at, live, E, 0, WIDE), cos_ptr, sin_ptr, t, 1, E, 0, WIDE)
    k = _turn(_load(k_ptr, k_at, live, E, 0, WIDE), cos_ptr, sin_ptr, t, 1, E, 0, WIDE)
    v = _load(v_ptr, v_at, live, E, 0, WIDE)
    scores = _dot(q, tl.trans(k))
    if REST:
        q = _turn(_load(q_ptr, q_at, live, E, WIDE, REST), cos_ptr, sin_ptr, t, 1, E, WIDE, REST)
        k = _turn(_load(k_ptr, k_at, live, E, WIDE, REST), cos_ptr, sin_ptr, t, 1, E, WIDE, REST)
        scores += _dot(q, tl.trans(k))
    visible = _visible(T, known_ptr, b * known_b, known_t, back, forward, ROWS)
    p = _probabilities(scores, visible, scale).to(v.dtype)
    at = (((b * T + t) * N + n) * heads + h) * E
    _store(out_ptr, _keep(_dot(p, v), v, known_ptr, b * known_b, t, known_t), at, live, E, 0, WIDE)
    if REST:
        v = _load(v_ptr, v_at, live, E, WIDE, REST)
        out = _keep(_dot(p, v), v, known_ptr, b * known_b, t, known_t)
        _store(out_ptr, out, at, live, E, WIDE, REST)


@triton.jit
def _keep(out, v, known_ptr, known_row, t, known_t):
    """The very bits of v where known, whatever the other rows of the tile hold."""
    if known_ptr is not None:
        known = tl.load(known_ptr + known_row + t * known_t).to(tl.int32)
        out = tl.where((known != 0)[:, None], v.to(tl.float32), out)
    return out


@triton.jit(do_not_specialize=[*_SIZES, *_DOUT, *_Q, *_K, *_V, "scale"])
def _backward(
    dout_ptr, q_ptr, k_ptr, v_ptr, known_ptr, cos_ptr, sin_ptr, dq_ptr, dk_ptr, dv_ptr,
    T, N, heads, dout_b, dout_t, dout_n, dout_h,
    q_b, q_t, q_n, q_h, k_b, k_t, k_n, k_h, v_b, v_t, v_n, v_h,
    known_b, known_t, scale, back, forward,
    E: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    b, h, n, t, live = _tile(T, N, heads, ROWS)
    dout_at = (b * dout_b + h * dout_h + n * dout_n + t * dout_t.to(tl.int64)) * UNIT
    q_at = (b * q_b + h * q_h + n * q_n + t * q_t.to(tl.int64)) * UNIT
    k_at = (b * k_b + h * k_h + n * k_n + t * k_t.to(tl.int64)) * UNIT
    v_at = (b * v_b + h * v_h + n * v_n + t * v_t.to(tl.int64)) * UNIT
    q = _turn(_load(q_ptr, q_at, live, E, 0, WIDE), cos_ptr, sin_ptr, t, 1, E, 0, WIDE)
    k = _turn(_load(k_ptr, k_at, live, E, 0, WIDE), cos_ptr, sin_ptr, t, 1, E, 0, WIDE)
    v = _load(v_ptr, v_at, live, E, 0, WIDE)
    dout = _load(dout_ptr, dout_at, live, E, 0, WIDE)
    scores, dp = _dot(q, tl.trans(k)), _dot(dout, tl.trans(v))
    if REST:
        q2 = _turn(_load(q_ptr, q_at, live, E, WIDE, REST), cos_ptr, sin_ptr, t, 1, E, WIDE, REST)
        k2 = _turn(_load(k_ptr, k_at, live, E, WIDE, REST), cos_ptr, sin_ptr, t, 1, E, WIDE, REST)
        v2 = _load(v_ptr, v_at, live, E, WIDE, REST)
        dout2 = _load(dout_ptr, dout_at, live, E, WIDE, REST)
        scores += _dot(q2, tl.trans(k2))
        dp += _dot(dout2, tl.trans(v2))
    visible = _visible(T, known_ptr, b * known_b, known_t, back, forward, ROWS)
    p = _probabilities(scores, visible, scale)
    delta = tl.sum(p * dp, axis=1)
    ds = (p * (dp - delta[:, None]) * scale).to(q.dtype)
    p_turned, ds_turned = tl.trans(p.to(q.dtype)), tl.trans(ds)

    at = (((b * T + t) * N + n) * heads + h) * E
    _store(dv_ptr, _dot(p_turned, dout), at, live, E, 0, WIDE)
    dq = _turn(_dot(ds, k), cos_ptr, sin_ptr, t, -1, E, 0, WIDE)
    _store(dq_ptr, dq, at, live, E, 0, WIDE)
    dk = _turn(_dot(ds_turned, q), cos_ptr, sin_ptr, t, -1, E, 0, WIDE)
    _store(dk_ptr, dk, at, live, E, 0, WIDE)
    if REST:
        _store(dv_ptr, _dot(p_turned, dout2), at, live, E, WIDE, REST)
        dq = _turn(_dot(ds, k2), cos_ptr, sin_ptr, t, -1, E, WIDE, REST)
        _store(dq_ptr, dq, at, live, E, WIDE, REST)
        dk = _turn(_dot(ds_turned, q2), cos_ptr, sin_ptr, t, -1, E, WIDE, REST)
        _store(dk_ptr, dk, at, live, E, WIDE, REST)


@triton.jit(do_not_specialize=[*_SIZES, *_DOUT, *_Q, *_K, *_V, "scale"])
def _backward_in_steps(
    dout_ptr, q_ptr, k_ptr, v_ptr, known_ptr, cos_ptr, sin_ptr, dq_ptr, dk_ptr, dv_ptr,
    T, N, heads, dout_b, dout_t, dout_n, dout_h,
    q_b, q_t, q_n, q_h, k_b, k_t, k_n, k_h, v_b, v_t, v_n, v_h,
    known_b, known_t, scale, back, forward,
    E: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """`_backward` with STEP columns of E at a time, read twice, for what registers cannot hold."""
    b, h, n, t, live = _tile(T, N, heads, ROWS)
    dout_at = (b * dout_b + h * dout_h + n * dout_n + t * dout_t.to(tl.int64)) * UNIT
    q_at = (b * q_b + h * q_h + n * q_n + t * q_t.to(tl.int64)) * UNIT
    k_at = (b * k_b + h * k_h + n * k_n + t * k_t.to(tl.int64)) * UNIT
    v_at = (b * v_b + h * v_h + n * v_n + t * v_t.to(tl.int64)) * UNIT
    scores = tl.zeros([ROWS, ROWS], tl.float32)
    dp = tl.zeros([ROWS, ROWS], tl.float32)
    for e in tl.range(0, E, STEP, num_stages=1):
        q = _turn(_load(q_ptr, q_at, live, E, e, STEP), cos_ptr, sin_ptr, t, 1, E, e, STEP)
        k = _turn(_load(k_ptr, k_at, live, E, e, STEP), cos_ptr, sin_ptr, t, 1, E, e, STEP)
        scores += _dot(q, tl.trans(k))
        v = _load(v_ptr, v_at, live, E, e, STEP)
        dp += _dot(_load(dout_ptr, dout_at, live, E, e, STEP), tl.trans(v))
    visible = _visible(T, known_ptr, b * known_b, known_t, back, forward, ROWS)
    p = _probabilities(scores, visible, scale)
    delta = tl.sum(p * dp, axis=1)
    ds = (p * (dp - delta[:, None]) * scale).to(q_ptr.dtype.element_ty)
    p_turned, ds_turned = tl.trans(p.to(q_ptr.dtype.element_ty)), tl.trans(ds)

    at = (((b * T + t) * N + n) * heads + h) * E
    for e in tl.range(0, E, STEP, num_stages=1):
        dout = _load(dout_ptr, dout_at, live, E, e, STEP)
        _store(dv_ptr, _dot(p_turned, dout), at, live, E, e, STEP)
        k = _turn(_load(k_ptr, k_at, live, E, e, STEP), cos_ptr, sin_ptr, t, 1, E, e, STEP)
        dq = _turn(_dot(ds, k), cos_ptr, sin_ptr, t, -1, E, e, STEP)
        _store(dq_ptr, dq, at, live, E, e, STEP)
        q = _turn(_load(q_ptr, q_at, live, E, e, STEP), cos_ptr, sin_ptr, t, 1, E, e, STEP)
        dk = _turn(_dot(ds_turned, q), cos_ptr, sin_ptr, t, -1, E, e, STEP)
        _store(dk_ptr, dk, at, live, E, e, STEP)


def launch_forward(q, k, v, known, cos, sin, scale, back, forward) -> Tensor:
    """out (B, T, N, heads, E)."""
    out = q.new_empty(q.shape)
    if out.numel():
        rule = _rule(known, scale, back, forward)
        _launch(False, (q, k, v), (bytes_of(known), _table(cos), _table(sin), out), rule)
    return out


def launch_backward(dout, q, k, v, known, cos, sin, scale, back, forward) -> tuple[Tensor, ...]:
    """dq, dk, dv, each (B, T, N, heads, E)."""
    grads = tuple(q.new_empty(q.shape) for _ in range(3))
    if q.numel():
        rule = _rule(known, scale, back, forward)
        others = bytes_of(known), _table(cos), _table(sin), *grads
        _launch(True, (dout, q, k, v), others, rule)
    return grads


def _launch(backward, strided, others, rule):
    strided = [rows_together(tensor) for tensor in strided]
    B, T, N, heads, E = strided[0].shape
    unit, steps = steps_of(*strided)
    narrow, rotary = strided[0].itemsize == 2, others[1] is not None
    kernel, constants, warps = _configuration(backward, E, narrow, rotary)
    kernel[(B * triton.cdiv(N, ROWS // T) * heads,)](
        *strided, *others, T, N, heads, *steps, *rule,
        UNIT=unit, **constants, num_warps=warps,
    )  # fmt: skip


def _configuration(backward: bool, E: int, narrow: bool, rotary: bool) -> tuple[Any, dict, int]:
    """Kernel, constants and warps: whatever keeps all in registers on sm_80 and later."""
    constants = {"E": E, "ROWS": ROWS}
    if backward and (rotary or not narrow):  # three tf32 products have six operands
        return _backward_in_steps, constants | {"STEP": 32 if narrow and E % 32 == 0 else 16}, 8
    wide, rest = split(E)
    warps = (4 if E <= 80 and not rotary else 8) if narrow else 16
    return (_backward if backward else _forward), constants | {"WIDE": wide, "REST": rest}, warps


def _rule(known: Tensor | None, scale: float, back: int, forward: int) -> tuple:
    if known is None:
        return 0, 0, scale, back, forward
    return (known.stride(0) if known.shape[0] > 1 else 0), known.stride(1), scale, back, forward


def _table(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.contiguous()


def _variant(name, backward, E, dtype="bf16", known=False, rotary=False):
    """A call on views whose strides are multiples of 8."""
    kernel, constants, warps = _configuration(backward, E, dtype != "fp32", rotary)
    tensors = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "dout_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
    types = dict.fromkeys(tensors, f"*{dtype}:16") | dict.fromkeys([*_SIZES], "i32")
    types |= dict.fromkeys([*_DOUT, *_Q, *_K, *_V], "i32") | {"scale": "fp32", "known_ptr": "*u8"}
    types |= dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32:16")
    constants |= {"UNIT": 8}
    constants |= {} if known else {"known_ptr": None}
    constants |= {} if rotary else {"cos_ptr": None, "sin_ptr": None}
    return Variant(name, kernel, types, constants, warps)


# The heads of MarDini and VDT-S (64), of VDT-L (72), and the widest.
VARIANTS = [
    *(_variant(f"forward_{E}", False, E) for E in (64, 72, 128, 256)),
    *(_variant(f"backward_{E}", True, E) for E in (64, 72, 128, 256)),
    _variant("forward_known_rotary_64", False, 64, known=True, rotary=True),
    _variant("backward_known_rotary_64", True, 64, known=True, rotary=True),
    _variant("forward_fp32_64", False, 64, "fp32"),
    _variant("backward_fp32_64", True, 64, "fp32"),
]
