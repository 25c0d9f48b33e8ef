"""From a boolean table of frames to the intervals that attention kernels walk.

Both directions have one format. `rows[b, j]` describes a frame of query tokens, the frame with the
most keys first: (first token, end, number of spans, self-only, end of its valid tokens), and
`row_spans[b, j, i]` its i-th run of visible key tokens: (first token, end). `columns` and
`column_spans` say the same of key frames and the query tokens that see them. A last entry holds
the tokens behind the last frame: they see nothing, and kernels clip its end to the true length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

FIELDS = 5  # first token, end, number of spans, self-only, end of the valid tokens
FAR = 2**31 - 1

torch.library.define(
    "fastvid::visibility_intervals",
    "(Tensor table, Tensor query_offsets, Tensor key_offsets, Tensor? self_only,"
    " Tensor? key_lengths) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("fastvid::visibility_intervals", "CPU")
def _(table, query_offsets, key_offsets, self_only, key_lengths):
    return reference(table, query_offsets, key_offsets, self_only, key_lengths)


@torch.library.impl("fastvid::visibility_intervals", "CUDA")
def _(table, query_offsets, key_offsets, self_only, key_lengths):
    from .intervals_kernel import launch  # Triton loads at the first launch

    with torch.cuda.device_of(table):
        return launch(table, query_offsets, key_offsets, self_only, key_lengths)


@torch.library.register_fake("fastvid::visibility_intervals")
def _(table, query_offsets, key_offsets, self_only, key_lengths):
    return empty_tables(table, query_offsets, key_offsets, self_only, key_lengths)


build = torch.ops.fastvid.visibility_intervals.default


def empty_tables(table: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four uninitialised int32 tables, in the order in which `build` returns them."""
    B = common_batch(table, *others)
    F, G = table.shape[1:]
    shapes = (B, F + 1, FIELDS), (B, F + 1, G, 2), (B, G + 1, FIELDS), (B, G + 1, F, 2)
    rows, row_spans, columns, column_spans = (
        torch.empty(shape, dtype=torch.int32, device=table.device) for shape in shapes
    )
    return rows, row_spans, columns, column_spans


def common_batch(*tables: Tensor | None) -> int:
    """The batch size that tables of batch 1 broadcast to."""
    B = 1
    for table in tables:
        if table is not None and table.shape[0] != 1:
            B = table.shape[0]
    return B


def reference(
    table: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    self_only: Tensor | None,
    key_lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition, in plain PyTorch on any device.

    Args:
        table: bool (B or 1, F, G). query_offsets, key_offsets: int32 (B or 1, F + 1 or G + 1).
        self_only: bool (B or 1, F), or None. key_lengths: int32 (B or 1, G), or None.
    Returns:
        rows (B, F + 1, 5), row_spans (B, F + 1, G, 2), columns (B, G + 1, 5) and column_spans
        (B, G + 1, F, 2), int32.
    """
    B = common_batch(table, query_offsets, key_offsets, self_only, key_lengths)
    query_start, query_end = query_offsets[:, :-1].expand(B, -1), query_offsets[:, 1:].expand(B, -1)
    key_start, key_end = key_offsets[:, :-1].expand(B, -1), key_offsets[:, 1:].expand(B, -1)
    key_valid = key_end
    if key_lengths is not None:
        key_valid = torch.minimum(key_end, key_start + key_lengths.clamp(min=0))
    seen = table.expand(B, -1, -1)
    lonely_query, lonely_key = torch.zeros_like(query_start), torch.zeros_like(key_start)
    if self_only is not None:  # queries and keys are then the same frames
        lonely_query = lonely_key = self_only.expand(B, -1)
        seen = seen & ~self_only[:, :, None]
    queries = query_start, query_end, query_end
    keys = key_start, key_end, key_valid
    rows = _runs(seen, queries, keys, lonely_query)
    columns = _runs(seen.transpose(1, 2), keys, queries, lonely_key)
    return *rows, *columns


def _runs(seen, own, other, alone):
    """Frame table and spans of one direction; `seen` is (B, own frames F, other frames G)."""
    own_start, own_end, own_valid = own
    start, end, valid = other
    B, F, G = seen.shape
    seen = seen & (valid > start)[:, None, :] & (own_valid > own_start)[:, :, None]
    joined = seen & (valid == end)[:, None, :]  # nothing lies between this frame and the next
    opens = seen & ~pad(joined, (1, 0))[..., :-1]
    closes = seen & ~(joined & pad(seen, (0, 1))[..., 1:])
    run = opens.cumsum(-1) - 1
    spans = torch.zeros(B, F, G + 1, 2, dtype=torch.int32, device=seen.device)
    for side, (mark, token) in enumerate(((opens, start), (closes, valid))):
        place = torch.where(mark, run, G)  # what is no edge goes to a spare last entry
        spans[..., side].scatter_(2, place, token[:, None, :].expand(B, F, G))
    spans = spans[:, :, :G]
    fields = own_start, own_end, opens.sum(-1), alone, own_valid
    frames = torch.stack([field.to(torch.int32) for field in fields], -1)  # [B, F, 5]
    work = (spans[..., 1] - spans[..., 0]).sum(-1)
    order = work.argsort(dim=-1, descending=True, stable=True)[:, :, None]
    frames = pad(frames.gather(1, order.expand(-1, -1, FIELDS)), (0, 0, 0, 1))
    frames[:, -1, 0] = own_end[:, -1] if F else 0
    frames[:, -1, 1] = frames[:, -1, 4] = FAR
    spans = spans.gather(1, order[..., None].expand(-1, -1, G, 2))
    return frames, pad(spans, (0, 0, 0, 0, 0, 1))
