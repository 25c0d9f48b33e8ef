"""What attention kernels share: tiles of any head width, and constants of the online softmax.

A head width that is no power of two is computed as two parts, 72 as 64 + 16.
"""

import math

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1 / math.log(2))
LN2 = tl.constexpr(math.log(2))


@triton.jit
def load_tile(ptr, n, live, step, FIRST: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr):
    """[tokens, WIDTH] of the columns from FIRST on; 0 for tokens that are not live, and past E."""
    e = FIRST + tl.arange(0, WIDTH)
    at = n.to(tl.int64)[:, None] * step + e[None, :]
    mask = live[:, None]
    if FIRST + WIDTH > E:
        mask = mask & (e < E)[None, :]
    return tl.load(ptr + at, mask=mask, other=0.0)


@triton.jit
def store_tile(
    ptr, value, n, live, step, FIRST: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr
):
    """The counterpart of `load_tile`."""
    e = FIRST + tl.arange(0, WIDTH)
    at = n.to(tl.int64)[:, None] * step + e[None, :]
    mask = live[:, None]
    if FIRST + WIDTH > E:
        mask = mask & (e < E)[None, :]
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def online_softmax(scores, seen, scale, top, total):
    """One block of scores [queries, keys] more, with at least one key that is `seen`.

    `top` and `total` [queries] are the highest score so far, of base 2, and the sum of weights.
    Returns the weights of the block, what the sums so far shrink by, and `top` and `total` anew.
    """
    scores = tl.where(seen[None, :], scores * (scale * LOG2E), -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))  # finite: every block has a seen key
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    return weights, shrink, new_top, total * shrink + tl.sum(weights, axis=1)


def split(E: int) -> tuple[int, int]:
    """The powers of two that cover a head width: 64 is (64, 0), 72 is (64, 16), 96 is (64, 32)."""
    first = 1 << (E.bit_length() - 1)
    return first, max(16, triton.next_power_of_2(E - first)) if first < E else 0


def precision(dtype: torch.dtype) -> str:
    """Of a product: one tf32 is off by 1e-3, three reach float32's rounding. AMD has neither."""
    return "ieee" if torch.version.hip or dtype != torch.float32 else "tf32x3"
