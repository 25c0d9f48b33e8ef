"""Which calls of a ready-made attention cover the visible pairs, told by tables on the host.

The pairs of a sample are covered, once each, by rectangles of query ranges and key ranges. Frames
that see the same keys make one rectangle. Small frames whose keys differ may share one on the keys
that they have in common, and the rest is joined by log-sum-exp, which is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from .._shared.intervals import FIELDS

Range = tuple[int, int]
Ranges = tuple[Range, ...]


class Rectangle(NamedTuple):
    queries: Ranges
    keys: Ranges


class Plan(NamedTuple):
    """How one sample's pairs are covered; all ranges in tokens."""

    rectangles: tuple[Rectangle, ...]
    alone: Ranges  # query tokens that see themselves only
    blind: Ranges  # query tokens that see nothing


def plans_of(
    rows: Tensor, row_spans: Tensor, tokens: int, keys: int, together: int
) -> tuple[Plan, ...]:
    """One plan for the whole batch, or one a sample, of interval tables (`_shared/intervals.py`).

    Samples that see the same have one plan.

    Made once for tables of one content, which is looked up in a microsecond: the tables of a
    Visibility never change, and a model may build an equal one in every step.

    Args:
        rows, row_spans: on the CPU.
        tokens, keys: how many there are.
        together: groups of fewer query rows share calls.
    """
    content = rows.numpy().tobytes(), row_spans.numpy().tobytes()
    return _plans(*content, tuple(row_spans.shape), tokens, keys, together)


@functools.lru_cache(maxsize=32)
def _plans(
    rows: bytes, row_spans: bytes, shape: tuple[int, ...], tokens: int, keys: int, together: int
) -> tuple[Plan, ...]:
    entries = numpy.frombuffer(rows, numpy.int32).reshape(*shape[:2], FIELDS)
    spans = numpy.frombuffer(row_spans, numpy.int32).reshape(shape)
    plans = tuple(
        _plan(its_entries.tolist(), its_spans.tolist(), tokens, keys, together)
        for its_entries, its_spans in zip(entries, spans, strict=True)
    )
    return plans[:1] if len(set(plans)) == 1 else plans


def _plan(
    rows: list[list[int]], spans: list[list[list[int]]], tokens: int, keys: int, together: int
) -> Plan:
    alone, blind, sighted = [], [], []
    for (start, end, count, self_only, _), row_spans in zip(rows, spans, strict=True):
        here = (start, min(end, tokens))
        if here[0] >= here[1]:
            continue
        seen = tuple((a, min(b, keys)) for a, b in row_spans[:count] if a < keys)
        if self_only:
            alone.append(here)
        elif seen:
            sighted.append((here, seen))
        else:
            blind.append(here)
    groups: dict[Ranges, list[Range]] = {}
    for here, seen in sorted(sighted):
        groups.setdefault(seen, []).append(here)
    rectangles: list[Rectangle] = []
    small: list[Rectangle] = []
    for seen, ranges in groups.items():
        queries = merge(ranges)
        large = size(queries) >= together
        (rectangles if large else small).append(Rectangle(queries, seen))
    for chunk in _chunks(small, together):
        rectangles.extend(_share(chunk))
    return Plan(tuple(rectangles), merge(alone), merge(blind))


def _chunks(small: list[Rectangle], together: int) -> Iterator[list[Rectangle]]:
    """Neighbours, `together` rows or a little more."""
    chunk: list[Rectangle] = []
    for rectangle in small:
        chunk.append(rectangle)
        if sum(size(r.queries) for r in chunk) >= together:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _share(chunk: list[Rectangle]) -> list[Rectangle]:
    """One call on the keys that all of `chunk` see, then what each sees besides."""
    common = chunk[0].keys
    for rectangle in chunk[1:]:
        common = intersect(common, rectangle.keys)
    # A shared call saves time only if it takes the larger part of the work out of small calls.
    if len(chunk) == 1 or 2 * size(common) < max(size(r.keys) for r in chunk):
        return chunk
    rest = [Rectangle(r.queries, _subtract(r.keys, common)) for r in chunk]
    every = merge(r for rectangle in chunk for r in rectangle.queries)
    return [Rectangle(every, common), *(r for r in rest if r.keys)]


def take(tensor: Tensor, ranges: Ranges, dim: int = 1) -> Tensor:
    """The ranges of one axis: a view of one range, a copy of several."""
    parts = [tensor.narrow(dim, start, end - start) for start, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def places(ranges: Ranges) -> Iterator[Range]:
    """Where each range lies once they are laid end to end."""
    at = 0
    for start, end in ranges:
        yield at, at + end - start
        at += end - start


def samples_of(plans: tuple[Plan, ...]) -> list[slice]:
    """The samples of a batch that each plan is of."""
    return [slice(None)] if len(plans) == 1 else [slice(b, b + 1) for b in range(len(plans))]


def size(ranges: Ranges) -> int:
    """How many tokens the ranges hold."""
    return sum(end - start for start, end in ranges)


def merge(ranges: Iterable[Range]) -> Ranges:
    """The union, in order."""
    merged: list[Range] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def intersect(left: Ranges, right: Ranges) -> Ranges:
    """What both hold, in order."""
    pairs = ((max(a, c), min(b, d)) for a, b in left for c, d in right)
    return merge(pair for pair in pairs if pair[0] < pair[1])


def _subtract(left: Ranges, right: Ranges) -> Ranges:
    for cut_start, cut_end in right:
        pieces = ((a, min(b, cut_start)) for a, b in left)
        others = ((max(a, cut_end), b) for a, b in left)
        left = tuple(sorted(p for p in (*pieces, *others) if p[0] < p[1]))
    return left
