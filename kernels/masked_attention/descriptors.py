"""The forward kernel of Hopper: tensor descriptors feed it, and its warps are specialised.

A group of warps does nothing but load, two others compute, each on half of the queries. Triton
does that on sm_90 in a narrow case only: four warps, every tile of the loop through a descriptor
made on the device, one loop, no branch and no `while` before or after it, no scan. Outside it the
request is ignored without a word, or the compiler fails.

A descriptor reads whole blocks. What lies behind the end of a visible run has the weight 0, which
hides any number but not a NaN or an infinity, so values are set to 0 there. That takes them through
registers, and heads of 128 a smaller block; the pointers of `kernel.py` do not read them at all.
"""

import contextvars
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._shared.tiles import LN2, load_tile, online_softmax, store_tile
from .tiles import Blocks, advance, own_tile, span, steps

# By the padded head width, for 16-bit inputs.
BLOCKS = {
    64: Blocks(128, 128, 4, 2),
    80: Blocks(128, 64, 4, 2),
    128: Blocks(128, 32, 4, 3),
}
# The compute capabilities on which it was measured to be the faster one.
FASTER_ON: frozenset[tuple[int, int]] = frozenset()


def chosen(q: Tensor, k: Tensor, v: Tensor, width: int) -> bool:
    """Whether the launcher takes this kernel of its own accord."""
    measured = q.is_cuda and torch.cuda.get_device_capability(q.device) in FASTER_ON
    return measured and q.dtype != torch.float32 and serves(q, k, v, width)


def serves(q: Tensor, k: Tensor, v: Tensor, width: int) -> bool:
    """Whether the kernel can read these: a descriptor needs steps and starts of 16 bytes."""
    sizes = (size for t in (q, k, v) for size in (t.data_ptr(), *_bytes(t)))
    return width <= max(BLOCKS) and all(size and size % 16 == 0 for size in sizes)


def _bytes(tensor: Tensor) -> list[int]:
    """The steps in bytes along axes that have any, and along tokens; as in the launcher, a single
    token has none."""
    sizes = zip(tensor.stride(), tensor.shape[:3], strict=False)
    steps = [step if size > 1 else 0 for step, size in sizes]
    return [step * tensor.itemsize for axis, step in enumerate(steps) if axis == 1 or step]


def with_scratch(launch: Callable[[], object], device: torch.device) -> None:
    """Launch where Triton finds memory for descriptors; what the caller set for it stays set."""

    def run():
        triton.set_allocator(
            lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device=device)
        )
        launch()

    contextvars.copy_context().run(run)


@triton.jit(do_not_specialize=["frames", "others", "N", "M", "table_b", "spans_b"])
def forward(
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
    q_tile1 = tl.make_tensor_descriptor(q_ptr, [N, E], [q_n, 1], [BLOCK_N, E1])
    k_tile1 = tl.make_tensor_descriptor(k_ptr, [M, E], [k_m, 1], [BLOCK_M, E1])
    v_tile1 = tl.make_tensor_descriptor(v_ptr, [M, E], [v_m, 1], [BLOCK_M, E1])
    q1 = q_tile1.load([first, 0])  # [BLOCK_N, E1]
    acc1 = tl.zeros([BLOCK_N, E1], tl.float32)
    if E2 > 0:
        q_tile2 = tl.make_tensor_descriptor(q_ptr, [N, E], [q_n, 1], [BLOCK_N, E2])
        k_tile2 = tl.make_tensor_descriptor(k_ptr, [M, E], [k_m, 1], [BLOCK_M, E2])
        v_tile2 = tl.make_tensor_descriptor(v_ptr, [M, E], [v_m, 1], [BLOCK_M, E2])
        q2 = q_tile2.load([first, E1])
        acc2 = tl.zeros([BLOCK_N, E2], tl.float32)
    top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)

    i = 0
    at, stop = span(spans_ptr, i, count, M)
    for _ in tl.range(steps(spans_ptr, count, M, BLOCK_M), warp_specialize=True):
        seen = at + tl.arange(0, BLOCK_M) < stop
        k1 = k_tile1.load([at, 0])
        scores = tl.dot(q1, k1.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        if E2 > 0:
            k2 = k_tile2.load([at, E1])
            scores = tl.dot(q2, k2.T, scores, input_precision=PRECISION)
        weights, shrink, top, total = online_softmax(scores, seen, scale, top, total)
        v1 = tl.where(seen[:, None], v_tile1.load([at, 0]), 0.0)
        weights = weights.to(v1.dtype)
        acc1 = tl.dot(weights, v1, acc1 * shrink[:, None], input_precision=PRECISION)
        if E2 > 0:
            v2 = tl.where(seen[:, None], v_tile2.load([at, E1]), 0.0)
            acc2 = tl.dot(weights, v2, acc2 * shrink[:, None], input_precision=PRECISION)
        i, at, stop = advance(spans_ptr, i, at, stop, count, M, BLOCK_M)

    lse = (top + tl.log2(total)) * LN2  # -inf where nothing was seen
    share = tl.where(total == 0.0, 0.0, 1.0 / total)
    acc1 *= share[:, None]
    if E2 > 0:
        acc2 *= share[:, None]
    own = live & (alone != 0)  # instead of a branch
    score = tl.sum(
        load_tile(q_ptr, n, own, q_n, 0, E1, E).to(tl.float32)
        * load_tile(k_ptr, n, own, k_m, 0, E1, E),
        axis=1,
    )
    acc1 += load_tile(v_ptr, n, own, v_m, 0, E1, E).to(tl.float32)
    if E2 > 0:
        score += tl.sum(
            load_tile(q_ptr, n, own, q_n, E1, E2, E).to(tl.float32)
            * load_tile(k_ptr, n, own, k_m, E1, E2, E),
            axis=1,
        )
        acc2 += load_tile(v_ptr, n, own, v_m, E1, E2, E).to(tl.float32)
    tl.store(lse_ptr + bh * N + n, score * scale, mask=own)
    out_ptr += (b * N * heads + h) * E
    store_tile(out_ptr, acc1, n, live, heads * E, 0, E1, E)
    if E2 > 0:
        store_tile(out_ptr, acc2, n, live, heads * E, E1, E2, E)
    tl.store(lse_ptr + bh * N + n, lse, mask=live & (alone == 0))
