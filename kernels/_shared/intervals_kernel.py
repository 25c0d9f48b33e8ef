"""The interval tables of `intervals.py` in one launch, without a host sync.

One program makes one entry of one table: it walks the other side's frames in blocks, finds where
runs open and close, and scatters their edges. Where the entry lies follows from how many frames of
its own side have more work, which every program counts for itself: over O(frames²) booleans that
is cheaper than a second launch. All programs of a sample together read O(frames³) of them, for each
table 4 thousand at 16 frames, 2 million at 128 and 1 billion at 1024: this is made for up to some
hundred frames. Frame counts are loop bounds, so one compilation serves them all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .intervals import FAR, FIELDS, common_batch, empty_tables
from .variants import Variant

ENTRY = tl.constexpr(FIELDS)
TAIL = tl.constexpr(FAR)
BLOCKS = {"BLOCK_OWN": 16, "BLOCK_OTHER": 64}


@triton.jit
def _bounds(offsets_ptr, lengths_ptr, has_lengths, frame, frames):
    """First token, end of the valid tokens and end of frames; empty outside 0..frames."""
    live = (frame >= 0) & (frame < frames)
    start = tl.load(offsets_ptr + frame, mask=live, other=0)
    end = tl.load(offsets_ptr + frame + 1, mask=live, other=0)
    length = tl.load(lengths_ptr + frame, mask=live & (has_lengths != 0), other=TAIL)
    return start, start + tl.minimum(tl.maximum(length, 0), end - start), end


@triton.jit
def _visible_tokens(
    table_ptr, alone_ptr, has_alone, own, other, owns, others, table_own, table_other,
    own_tokens, other_tokens, ROWS: tl.constexpr,
):  # fmt: skip
    """How many tokens of frame `other` frame `own` sees, 0 where either has none."""
    live = (own >= 0) & (own < owns) & (other >= 0) & (other < others)
    seen = tl.load(table_ptr + own * table_own + other * table_other, mask=live, other=0) != 0
    query, queries = (own, owns) if ROWS else (other, others)
    live = (query >= 0) & (query < queries) & (has_alone != 0)
    alone = tl.load(alone_ptr + query, mask=live, other=0)
    return tl.where(seen & (alone == 0) & (own_tokens > 0), other_tokens, 0)


@triton.jit
def _entry(
    table_ptr, alone_ptr, own_ptr, own_lengths_ptr, other_ptr, other_lengths_ptr, frames_ptr,
    spans_ptr, has_alone, has_own_lengths, has_other_lengths, own, owns, others, table_own,
    table_other, ROWS: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr,
):  # fmt: skip
    """The entry of frame `own`; that of the tokens behind the last frame for `own == owns`."""
    start, valid, end = _bounds(own_ptr, own_lengths_ptr, has_own_lengths, own, owns)
    work = 0
    for first in range(0, others, BLOCK_OTHER):
        g = first + tl.arange(0, BLOCK_OTHER)
        at, stop, _ = _bounds(other_ptr, other_lengths_ptr, has_other_lengths, g, others)
        work += tl.sum(
            _visible_tokens(
                table_ptr, alone_ptr, has_alone, own, g, owns, others, table_own, table_other,
                valid - start, stop - at, ROWS,
            ), axis=0,
        )  # fmt: skip

    place = 0  # after all with more work, and after equals that stand before it
    for first_rival in range(0, owns, BLOCK_OWN):
        rival = first_rival + tl.arange(0, BLOCK_OWN)
        f_start, f_valid, _f_end = _bounds(own_ptr, own_lengths_ptr, has_own_lengths, rival, owns)
        rivals_work = tl.zeros([BLOCK_OWN], tl.int32)
        for first in range(0, others, BLOCK_OTHER):
            g = first + tl.arange(0, BLOCK_OTHER)
            at, stop, _ = _bounds(other_ptr, other_lengths_ptr, has_other_lengths, g, others)
            rivals_work += tl.sum(
                _visible_tokens(
                    table_ptr, alone_ptr, has_alone, rival[:, None], g[None, :], owns, others,
                    table_own, table_other, (f_valid - f_start)[:, None], (stop - at)[None, :],
                    ROWS,
                ), axis=1,
            )  # fmt: skip
        before = (rivals_work > work) | ((rivals_work == work) & (rival < own))
        place += tl.sum((before & (rival < owns)).to(tl.int32), axis=0)

    tail = own == owns
    place = tl.where(tail, owns, place)
    spans_ptr += place.to(tl.int64) * others * 2
    count = 0
    for first in range(0, others, BLOCK_OTHER):
        g = first + tl.arange(0, BLOCK_OTHER)
        at, stop, close = _bounds(other_ptr, other_lengths_ptr, has_other_lengths, g, others)
        left_at, left_stop, left_close = _bounds(
            other_ptr, other_lengths_ptr, has_other_lengths, g - 1, others
        )
        right_at, right_stop, _ = _bounds(
            other_ptr, other_lengths_ptr, has_other_lengths, g + 1, others
        )
        seen = _visible_tokens(
            table_ptr, alone_ptr, has_alone, own, g, owns, others, table_own, table_other,
            valid - start, stop - at, ROWS,
        )  # fmt: skip
        left = _visible_tokens(
            table_ptr, alone_ptr, has_alone, own, g - 1, owns, others, table_own, table_other,
            valid - start, left_stop - left_at, ROWS,
        )  # fmt: skip
        right = _visible_tokens(
            table_ptr, alone_ptr, has_alone, own, g + 1, owns, others, table_own, table_other,
            valid - start, right_stop - right_at, ROWS,
        )  # fmt: skip
        # A run goes on only where nothing lies between: the frame before has all tokens valid.
        opens = (seen > 0) & ((left == 0) | (left_stop < left_close))
        closes = (seen > 0) & ((right == 0) | (stop < close))
        run = count + tl.cumsum(opens.to(tl.int32), axis=0) - 1
        tl.store(spans_ptr + 2 * run, at, mask=opens)
        tl.store(spans_ptr + 2 * run + 1, stop, mask=closes)
        count += tl.sum(opens.to(tl.int32), axis=0)
    for first in range(0, 2 * others, BLOCK_OTHER):
        edge = first + tl.arange(0, BLOCK_OTHER)
        tl.store(spans_ptr + edge, 0, mask=(edge >= 2 * count) & (edge < 2 * others))

    alone = tl.load(alone_ptr + own, mask=(has_alone != 0) & (own < owns), other=0)
    total = tl.load(own_ptr + owns)
    frames_ptr += place * ENTRY
    tl.store(frames_ptr, tl.where(tail, total, start))
    tl.store(frames_ptr + 1, tl.where(tail, TAIL, end))
    tl.store(frames_ptr + 2, count)
    tl.store(frames_ptr + 3, alone.to(tl.int32))
    tl.store(frames_ptr + 4, tl.where(tail, TAIL, valid))


INTEGERS = ["F", "G", "table_b", "table_f", "table_g", "query_b", "key_b", "alone_b", "lengths_b"]
INTEGERS += ["has_alone", "has_lengths"]


@triton.jit(do_not_specialize=INTEGERS)
def _intervals(
    table_ptr, query_ptr, key_ptr, alone_ptr, lengths_ptr,
    rows_ptr, row_spans_ptr, columns_ptr, column_spans_ptr,
    F, G, table_b, table_f, table_g, query_b, key_b, alone_b, lengths_b, has_alone, has_lengths,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr,
):  # fmt: skip
    entries = F + G + 2  # of a sample; all lie on the one axis of a grid that may pass 65535
    entry = tl.program_id(0) % entries
    b = (tl.program_id(0) // entries).to(tl.int64)
    table_ptr += b * table_b
    query_ptr += b * query_b
    key_ptr += b * key_b
    alone_ptr += b * alone_b
    lengths_ptr += b * lengths_b
    if entry <= F:
        _entry(
            table_ptr, alone_ptr, query_ptr, lengths_ptr, key_ptr, lengths_ptr,
            rows_ptr + b * (F + 1) * ENTRY, row_spans_ptr + b * (F + 1) * G * 2,
            has_alone, 0, has_lengths, entry, F, G, table_f, table_g,
            True, BLOCK_OWN, BLOCK_OTHER,
        )  # fmt: skip
    else:
        _entry(
            table_ptr, alone_ptr, key_ptr, lengths_ptr, query_ptr, lengths_ptr,
            columns_ptr + b * (G + 1) * ENTRY, column_spans_ptr + b * (G + 1) * F * 2,
            has_alone, has_lengths, 0, entry - F - 1, G, F, table_g, table_f,
            False, BLOCK_OWN, BLOCK_OTHER,
        )  # fmt: skip


def launch(
    table: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    self_only: Tensor | None,
    key_lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `intervals.reference` returns, on the device of `table`."""
    given = table, query_offsets, key_offsets, self_only, key_lengths
    tables = empty_tables(*given)
    F, G = table.shape[1:]
    table = table.view(torch.uint8)
    alone = table if self_only is None else self_only.contiguous().view(torch.uint8)
    lengths = query_offsets if key_lengths is None else key_lengths.contiguous()
    inputs = table, query_offsets.contiguous(), key_offsets.contiguous(), alone, lengths
    table_b, query_b, key_b, alone_b, lengths_b = (
        t.stride(0) if t.shape[0] > 1 else 0 for t in inputs
    )
    _intervals[((F + G + 2) * common_batch(*given),)](
        *inputs, *tables, F, G, table_b, *table.stride()[1:], query_b, key_b, alone_b, lengths_b,
        int(self_only is not None), int(key_lengths is not None), **BLOCKS, num_warps=4,
    )  # fmt: skip
    return tables


VARIANTS = [
    Variant(
        "intervals",
        _intervals,
        dict.fromkeys(("table_ptr", "alone_ptr"), "*u8:16")
        | dict.fromkeys(("query_ptr", "key_ptr", "lengths_ptr"), "*i32:16")
        | dict.fromkeys(("rows_ptr", "row_spans_ptr"), "*i32:16")
        | dict.fromkeys(("columns_ptr", "column_spans_ptr"), "*i32:16")
        | dict.fromkeys(INTEGERS, "i32"),
        BLOCKS,
        num_warps=4,
    )
]
