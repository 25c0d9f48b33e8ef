"""What the Triton kernels of `masked_attention` share: the tile of a program and its way through
the spans that the tile sees."""

from typing import NamedTuple

import triton
import triton.language as tl

from .._shared.intervals import FIELDS

ENTRY = tl.constexpr(FIELDS)
FRAMES = tl.constexpr(32)  # table entries looked at together


class Blocks(NamedTuple):
    """How a kernel cuts its work."""

    rows: int  # tokens that a program owns
    steps: int  # tokens of the other side that it takes at a time
    warps: int
    stages: int


@triton.jit
def frame_tiles(table_ptr, j, frames, tokens, BLOCK: tl.constexpr):
    """Of table entries `j`: first token, end, and how many tiles they make."""
    starts = tl.load(table_ptr + j * ENTRY, mask=j < frames, other=0)
    ends = tl.minimum(tl.load(table_ptr + j * ENTRY + 1, mask=j < frames, other=0), tokens)
    return starts, ends, tl.cdiv(tl.maximum(ends - starts, 0), BLOCK)


@triton.jit
def own_tile(
    table_ptr, spans_ptr, heads, frames, others, tokens, table_b, spans_b, BLOCK: tl.constexpr
):
    """Which sample and head this program serves, which tokens it owns, and what they see.

    Returns bh, b, h; the first token and the end of its frame (both 0 where no tile is left); the
    number of spans and where they lie; self-only; the end of the valid tokens.
    """
    each = tl.cdiv(tokens, BLOCK) + frames  # programs of a sample and head, as in the launcher
    bh, tile = (tl.program_id(0) // each).to(tl.int64), tl.program_id(0) % each
    b, h = bh // heads, bh % heads
    table_ptr += b * table_b
    entry, first, end, before = 0, 0, 0, 0
    for chunk in range(0, frames, FRAMES):
        j = chunk + tl.arange(0, FRAMES)
        starts, ends, tiles = frame_tiles(table_ptr, j, frames, tokens, BLOCK)
        i = chunk + tl.arange(0, FRAMES)[None, :]
        _, _, earlier = frame_tiles(table_ptr, i, frames, tokens, BLOCK)
        at = tile - before - tl.sum(tl.where(i < j[:, None], earlier, 0), axis=1)
        mine = (at >= 0) & (at < tiles)  # true of one frame, or of none
        entry += tl.sum(tl.where(mine, j, 0), axis=0)
        first += tl.sum(tl.where(mine, starts + at * BLOCK, 0), axis=0)
        end += tl.sum(tl.where(mine, ends, 0), axis=0)
        before += tl.sum(tiles, axis=0)
    entry_ptr = table_ptr + entry * ENTRY
    count = tl.where(first < end, tl.load(entry_ptr + 2), 0)
    spans_ptr += b * spans_b + tl.cast(entry, tl.int64) * others * 2
    return bh, b, h, first, end, count, spans_ptr, tl.load(entry_ptr + 3), tl.load(entry_ptr + 4)


@triton.jit
def steps(spans_ptr, count, tokens, BLOCK: tl.constexpr):
    """How many blocks the spans make."""
    total = 0
    for i in range(count):
        end = tl.minimum(tl.load(spans_ptr + 2 * i + 1), tokens)
        total += tl.cdiv(tl.maximum(end - tl.load(spans_ptr + 2 * i), 0), BLOCK)
    return total


@triton.jit
def span(spans_ptr, i, count, tokens):
    """The first token and the end of span `i`; both 0 behind the last."""
    start = tl.load(spans_ptr + 2 * i, mask=i < count, other=0)
    end = tl.load(spans_ptr + 2 * i + 1, mask=i < count, other=0)
    return start, tl.minimum(end, tokens)


@triton.jit
def advance(spans_ptr, i, at, end, count, tokens, BLOCK: tl.constexpr):
    """The next block: further in this span, or at the start of the next one."""
    at += BLOCK
    over = at >= end
    i += over.to(tl.int32)
    next_at, next_end = span(spans_ptr, i, count, tokens)
    return i, tl.where(over, next_at, at), tl.where(over, next_end, end)
