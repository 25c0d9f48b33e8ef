"""Which frames may attend to which: the one vocabulary of every attention room.

A `FrameLayout` says how many tokens each frame holds, a `Visibility` which key frames every query
frame sees. Building a `Visibility` turns its boolean table into int32 interval tables, on the
table's device and without a host sync. They hold O(frames²) numbers, never O(tokens²), and they
are data: no kernel is compiled anew because of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils import _pytree as pytree

from . import intervals

_PICTURE = 32  # frames that `repr` shows at most on each side


class FrameLayout:
    """How many tokens each frame of a sequence holds; frames may differ in size.

    Args:
        lengths: tokens per frame: `[256] * 16`, or one such list a sample (the tokens behind a
            shorter sample's last frame belong to no frame: they see nothing and nothing sees
            them), or an integer tensor `(F,)` or `(B, F)`.
        device: where the tables live; a tensor stays where it is unless this is given.
    Raises:
        TypeError, ValueError: lengths that are not whole numbers >= 0, or lists of several sizes.

    Lists and CPU tensors leave a copy on the host, against which sizes are checked. A tensor that
    is already on a GPU is never read back.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Sequence[Sequence[int]] | Tensor,
        device: torch.device | str | None = None,
    ):
        table = lengths if isinstance(lengths, Tensor) else _tensor_of(lengths)
        _check_whole("lengths", table)
        if table.ndim not in (1, 2):
            raise ValueError(f"lengths must be (F,) or (B, F), got {tuple(table.shape)}")
        table = table[None] if table.ndim == 1 else table
        self.host: tuple[tuple[int, ...], ...] | None = None
        if table.device.type == "cpu" and not torch.compiler.is_compiling():
            self.host = tuple(tuple(row) for row in table.tolist())
            if any(length < 0 for row in self.host for length in row):
                raise ValueError(f"lengths must be >= 0, got {self.host}")
        # Copied, as every table below: what the caller writes later must not change it.
        self.lengths = table.to(device=device, dtype=torch.int32, copy=True)  # (B or 1, F)
        self.offsets = pad(self.lengths.cumsum(-1, dtype=torch.int32), (1, 0))  # (B or 1, F + 1)

    @property
    def frames(self) -> int:
        return self.lengths.shape[1]

    @property
    def device(self) -> torch.device:
        return self.lengths.device

    @property
    def tokens(self) -> int | None:
        """Tokens of the longest sample, or None where only the GPU knows, or inside a graph."""
        if self.host is None or torch.compiler.is_compiling():
            return None
        return max((sum(row) for row in self.host), default=0)

    def frame_of_token(self, tokens: int) -> Tensor:
        """(B or 1, tokens) int64: the frame of each token; `frames` for a token of no frame."""
        at = torch.arange(tokens, device=self.device, dtype=torch.int32)
        ends = self.offsets[:, 1:].contiguous()
        return torch.searchsorted(ends, at.expand(len(ends), -1).contiguous(), right=True)

    def __repr__(self) -> str:
        rows = self.lengths.tolist()
        return f"FrameLayout({rows[0] if len(rows) == 1 else rows})"


class Visibility:
    """A boolean table of frames, compiled into key intervals.

    Args:
        table: bool `(B or 1, query frames, key frames)`, the first axis may be absent; True means
            visible.
        queries, keys: the layouts; `keys` is `queries` unless given.
        self_only: bool `(B or 1, frames)`: every token of such a frame sees itself and nothing
            else, whatever the table says, so that its output is its own value.
        key_lengths: int `(B or 1, key frames)`: only so many leading tokens of a key frame are
            valid (padded text).
    Raises:
        TypeError, ValueError: a table that is not boolean, lengths that are not whole numbers,
            sizes that do not fit the layouts, or layouts on two devices.

    `a & b` sees what both see, and a frame is self-only where either says so. `a | b` sees what
    the table of either shows, and a frame is self-only where both say so: one that is self-only
    on one side alone follows the other side's row, and loses itself where that row hides it.
    """

    def __init__(
        self,
        table: Tensor | Sequence,
        queries: FrameLayout,
        keys: FrameLayout | None = None,
        self_only: Tensor | Sequence | None = None,
        key_lengths: Tensor | Sequence | None = None,
    ):
        self.queries, self.keys = queries, queries if keys is None else keys
        if queries.device != self.keys.device:
            devices = f"{queries.device} and {self.keys.device}"
            raise ValueError(f"queries and keys must be on one device, got {devices}")
        shape = (queries.frames, self.keys.frames)
        self.table = _boolean("table", table, shape, queries.device)
        self.self_only = self.key_lengths = None
        if self_only is not None:
            if self.keys is not queries:
                raise ValueError("self_only needs queries and keys of one layout, got two layouts")
            self.self_only = _boolean("self_only", self_only, shape[:1], queries.device)
        if key_lengths is not None:
            valid = torch.as_tensor(key_lengths, device=queries.device)
            _check_whole("key_lengths", valid)
            self.key_lengths = _sized("key_lengths", valid, shape[1:]).to(torch.int32, copy=True)
        tables = (
            self.table, queries.offsets, self.keys.offsets, self.self_only, self.key_lengths
        )  # fmt: skip
        batch = intervals.common_batch(*tables)
        if any(t is not None and len(t) not in (1, batch) for t in tables):
            sizes = [len(t) for t in tables if t is not None]
            raise ValueError(f"table and layouts must have one batch size, or 1, got {sizes}")
        self.rows, self.row_spans, self.columns, self.column_spans = intervals.build(*tables)
        self.sees_all = False  # True is a fact that the host knows; False may be ignorance
        self._told: Callable[[], Visibility] | None = None
        self._twin: Visibility | None = None
        if _host_has((queries, self.keys), table, self_only, key_lengths):
            self._tell(table, self_only, key_lengths)

    @property
    def batch(self) -> int:
        return self.rows.shape[0]

    @classmethod
    def full(cls, layout: FrameLayout, keys: FrameLayout | None = None) -> Visibility:
        """Every frame sees every frame."""
        every = cls._by_frame(layout, lambda query, key: (query >= 0) & (key >= 0), keys)
        hosts = (every.queries.host, every.keys.host)
        every.sees_all = all(h is not None and len({sum(row) for row in h}) == 1 for h in hosts)
        return every

    @classmethod
    def causal(cls, layout: FrameLayout) -> Visibility:
        """A frame sees the whole of itself and every earlier frame."""
        return cls._by_frame(layout, lambda query, key: key <= query)

    @classmethod
    def window(cls, layout: FrameLayout, back: int, forward: int) -> Visibility:
        """A frame sees itself, `back` frames before it and `forward` frames after it."""
        if back < 0 or forward < 0:
            raise ValueError(f"back and forward must be >= 0, got {back} and {forward}")
        return cls._by_frame(
            layout, lambda query, key: (key >= query - back) & (key <= query + forward)
        )

    @classmethod
    def identity(
        cls,
        layout: FrameLayout,
        known: Tensor | Sequence,
        rows: Literal["self_token", "self_frame"] = "self_token",
    ) -> Visibility:
        """Known frames see only themselves, the others see all: MarDini's identity attention.

        Args:
            known: bool `(F,)` or `(B, F)`, True = given and clean.
            rows: a token of a known frame sees itself alone ("self_token") or the tokens of its
                frame ("self_frame").
        Source: Liu et al., arXiv:2410.20280, section 3.
        """
        if rows not in ("self_token", "self_frame"):
            raise ValueError(f'rows must be "self_token" or "self_frame", got {rows!r}')

        def tables(device: torch.device) -> tuple[Tensor, Tensor | None]:
            given = _boolean("known", known, (layout.frames,), device)
            every = torch.ones(layout.frames, layout.frames, dtype=torch.bool, device=device)
            if rows == "self_token":
                return every, given
            own = torch.eye(layout.frames, dtype=torch.bool, device=device)
            return torch.where(given[:, :, None], own, every), None

        table, alone = tables(layout.device)
        made = cls(table, layout, self_only=alone)
        if _host_has((layout,), known):
            made._tell(*tables(torch.device("cpu")))
        return made

    @classmethod
    def segments(cls, layout: FrameLayout, ids: Tensor | Sequence) -> Visibility:
        """Frames see the frames that carry the same id: `ids` is int `(F,)` or `(B, F)`."""
        label = _sized("ids", torch.as_tensor(ids, device=layout.device), (layout.frames,))
        return cls(label[:, :, None] == label[:, None, :], layout)

    @classmethod
    def text_and_frames(cls, layout: FrameLayout, text_lengths: Tensor | Sequence) -> Visibility:
        """Pyramid Flow's rule: the layout's first frame is the text, the others follow in time.

        Text sees the text and frame 0. An image token sees the text and every frame that is not
        later than its own. `text_lengths` `(B,)` counts the valid tokens of the text; rows of
        padded text are unspecified.

        Source: Jin et al., arXiv:2410.05954, section 3.4.
        """
        valid = torch.as_tensor(text_lengths, device=layout.device)
        _check_whole("text_lengths", valid)
        if valid.ndim != 1:
            raise ValueError(f"text_lengths must be (B,), got {tuple(valid.shape)}")
        batch = intervals.common_batch(layout.lengths, valid)
        if any(len(t) not in (1, batch) for t in (layout.lengths, valid)):
            raise ValueError(
                f"text_lengths must be (B,), the layout has B={len(layout.lengths)},"
                f" got {tuple(valid.shape)}"
            )
        stamp = (torch.arange(layout.frames, device=layout.device) - 1).clamp(min=0)
        lengths = layout.lengths.expand(batch, -1)
        text = torch.minimum(lengths[:, :1], valid[:, None].to(torch.int32))
        lengths = torch.cat([text, lengths[:, 1:]], 1)
        return cls(stamp[:, None] >= stamp[None, :], layout, key_lengths=lengths)

    @classmethod
    def _by_frame(
        cls,
        layout: FrameLayout,
        rule: Callable[[Tensor, Tensor], Tensor],
        keys: FrameLayout | None = None,
    ) -> Visibility:
        def table(device: torch.device) -> Tensor:
            query = torch.arange(layout.frames, device=device)[:, None]
            key = torch.arange((keys or layout).frames, device=device)[None, :]
            return rule(query, key)

        made = cls(table(layout.device), layout, keys)
        if _host_has((layout, keys or layout)):
            made._tell(table(torch.device("cpu")))
        return made

    def _tell(
        self,
        table: Tensor | Sequence,
        self_only: Tensor | Sequence | None = None,
        key_lengths: Tensor | Sequence | None = None,
    ) -> None:
        """Let `on_host` know what the tables are made of."""
        keys = None if self.keys is self.queries else self.keys.host
        table = torch.as_tensor(table).clone()
        more = (t if t is None else torch.as_tensor(t).clone() for t in (self_only, key_lengths))
        self._told = functools.partial(_from_host, self.queries.host or (), keys, table, *more)

    def __and__(self, other: Visibility) -> Visibility:
        self._expect_same_layouts(other)
        lengths = [v for v in (self.key_lengths, other.key_lengths) if v is not None]
        alone = [s for s in (self.self_only, other.self_only) if s is not None]
        return Visibility(
            self.table & other.table,
            self.queries,
            self._other_keys(),
            alone[0] | alone[-1] if alone else None,
            torch.minimum(lengths[0], lengths[-1]) if lengths else None,
        )

    def __or__(self, other: Visibility) -> Visibility:
        self._expect_same_layouts(other)
        if self.key_lengths is not other.key_lengths:
            raise ValueError("`|` needs one key_lengths on both sides, got two different ones")
        both = None
        if self.self_only is not None and other.self_only is not None:
            both = self.self_only & other.self_only
        # A self-only frame adds nothing to a side that sees more: its own frame's table decides.
        table = self._open_table() | other._open_table()
        return Visibility(table, self.queries, self._other_keys(), both, self.key_lengths)

    def _open_table(self) -> Tensor:
        return self.table if self.self_only is None else self.table & ~self.self_only[:, :, None]

    def _other_keys(self) -> FrameLayout | None:
        return None if self.keys is self.queries else self.keys

    def _expect_same_layouts(self, other: Visibility) -> None:
        for name in ("queries", "keys"):
            mine, theirs = getattr(self, name), getattr(other, name)
            known = mine.host is not None and theirs.host is not None
            if mine.frames != theirs.frames or (known and mine.host != theirs.host):
                raise ValueError(f"both sides must have the same {name}, got {mine} and {theirs}")
        if self.batch != other.batch and 1 not in (self.batch, other.batch):
            sizes = f"{self.batch} and {other.batch}"
            raise ValueError(f"both sides must have one batch size, or 1, got {sizes}")

    def dense(self, query_tokens: int, key_tokens: int) -> Tensor:
        """(B or 1, query_tokens, key_tokens) bool. O(tokens²): the oracle's, not a kernel's."""
        query = self.queries.frame_of_token(query_tokens).expand(self.batch, -1)
        key = self.keys.frame_of_token(key_tokens).expand(self.batch, -1)
        sample = torch.arange(self.batch, device=key.device)[:, None, None]
        table = pad(self.table, (0, 1, 0, 1)).expand(self.batch, -1, -1)  # + tokens of no frame
        seen = table[sample, query[:, :, None], key[:, None, :]]
        place = torch.arange(key_tokens, device=key.device)
        if self.key_lengths is not None:
            ends = pad(self.keys.offsets[:, :-1] + self.key_lengths, (0, 1)).expand(self.batch, -1)
            seen = seen & (place < ends.gather(1, key))[:, None, :]
        if self.self_only is not None:
            alone = pad(self.self_only, (0, 1)).expand(self.batch, -1).gather(1, query)
            own = torch.arange(query_tokens, device=key.device)[:, None] == place
            seen = torch.where(alone[:, :, None], own, seen)
        return seen

    def visible_share(self) -> float:
        """What part of the dense query-key pairs remains, 0 to 1. Reads the device back."""
        query, key = self.queries.lengths.double(), self.keys.lengths.double()
        pairs = (query.sum(-1) * key.sum(-1)).expand(self.batch).sum()
        if self.key_lengths is not None:
            key = torch.minimum(key, self.key_lengths.clamp(min=0).double())
        seen = (self._open_table().double() @ key[:, :, None])[..., 0]
        if self.self_only is not None:
            seen = seen + self.self_only.double()
        return float((seen * query).expand(self.batch, -1).sum() / pairs.clamp(min=1))

    def on_host(self) -> Visibility | None:
        """The same visibility on the CPU, made once; None where only the device knows it.

        The host knows what was built there, and `full`, `causal`, `window` and `identity` of
        layouts and known frames that were lists or CPU tensors. Nothing is read back.
        """
        if self.rows.device.type == "cpu":
            return self
        if self._twin is None and self._told is not None:
            self._twin = self._told()
        return self._twin

    def to(self, device: torch.device | str) -> Visibility:
        """The same visibility with its tables on `device`."""
        moved = pytree.tree_map_only(Tensor, lambda table: table.to(device), self)
        moved.queries.host, moved.keys.host = self.queries.host, self.keys.host
        moved.sees_all, moved._twin = self.sees_all, self.on_host()
        return moved

    def __repr__(self) -> str:
        table = self._open_table()[0].tolist()
        alone = [False] * len(table) if self.self_only is None else self.self_only[0].tolist()
        lines = []
        for frame, row in enumerate(table[:_PICTURE]):
            cells = ["█" if seen else "·" for seen in row[:_PICTURE]]
            if alone[frame]:
                cells[frame] = "╲"
            lines.append("  " + "".join(cells) + ("…" if len(row) > _PICTURE else ""))
        if len(table) > _PICTURE:
            lines.append("  …")
        size = f"{self.queries.frames} frames on {self.keys.frames}"
        more = f", first of {self.batch} samples" if self.batch > 1 else ""
        return "\n".join([f"Visibility: {size}, {self.visible_share():.1%} visible{more}", *lines])


def _from_host(
    queries: Sequence[Sequence[int]],
    keys: Sequence[Sequence[int]] | None,
    table: Tensor,
    self_only: Tensor | None,
    key_lengths: Tensor | None,
) -> Visibility:
    layouts = FrameLayout(queries), None if keys is None else FrameLayout(keys)
    return Visibility(table, *layouts, self_only, key_lengths)


def _tensor_of(lengths: Sequence) -> Tensor:
    try:
        return torch.tensor(lengths) if len(lengths) else torch.empty(0, dtype=torch.int64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lengths must be whole numbers in lists of one size: {error}") from None


def _check_whole(name: str, table: Tensor) -> None:
    if table.dtype not in (torch.int32, torch.int64) and table.numel():  # [] is float32
        raise TypeError(f"{name} must be whole numbers, int32 or int64, got {table.dtype}")


def _host_has(layouts: Sequence[FrameLayout], *values: Tensor | Sequence | None) -> bool:
    """Whether the host has what a Visibility on another device is made of; never in a graph."""
    if torch.compiler.is_compiling() or layouts[0].device.type == "cpu":
        return False
    known = all(layout.host is not None for layout in layouts)
    return known and not any(isinstance(v, Tensor) and v.device.type != "cpu" for v in values)


def _sized(name: str, table: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`table` with a batch axis in front of `shape`."""
    if table.ndim - len(shape) not in (0, 1) or table.shape[-len(shape) :] != shape:
        wanted = ", ".join(map(str, ("B or 1", *shape)))
        raise ValueError(f"{name} must be ({wanted}), got {tuple(table.shape)}")
    return table.reshape(-1, *shape) if table.numel() else table.new_zeros(1, *shape)


def _boolean(
    name: str, value: Tensor | Sequence, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    table = torch.as_tensor(value, device=device)
    if table.dtype != torch.bool:
        raise TypeError(f"{name} must be boolean, got {table.dtype}")
    return _sized(name, table, shape).clone()


_TABLES = ("table", "self_only", "key_lengths", "rows", "row_spans", "columns", "column_spans")


_OFFSETS = ("lengths", "offsets")


# What the host knows is no part of a tree: a graph made for one layout serves every other.
def _flatten_layout(layout: FrameLayout) -> tuple[list[Any], None]:
    return [getattr(layout, name) for name in _OFFSETS], None


def _unflatten_layout(tensors: Any, _: None) -> FrameLayout:
    layout = object.__new__(FrameLayout)
    layout.lengths, layout.offsets = tensors
    layout.host = None
    return layout


def _flatten_visibility(visibility: Visibility) -> tuple[list[Any], None]:
    tables = [getattr(visibility, name) for name in _TABLES]
    return [visibility.queries, visibility._other_keys(), *tables], None


def _unflatten_visibility(parts: Any, _: None) -> Visibility:
    visibility = object.__new__(Visibility)
    visibility.queries, keys, *tables = parts
    visibility.keys = visibility.queries if keys is None else keys
    visibility.sees_all = False
    visibility._told = visibility._twin = None
    for name, table in zip(_TABLES, tables, strict=True):
        setattr(visibility, name, table)
    return visibility


def _with_names(flatten: Callable, names: Sequence[str]) -> Callable:
    def flatten_with_keys(value: Any) -> tuple[list[Any], None]:
        keys = [pytree.GetAttrKey(name) for name in names]
        return list(zip(keys, flatten(value)[0], strict=True)), None

    return flatten_with_keys


# The functions' own names are private, their home is not: the public torch.utils.pytree has none.
for _kind, _flatten, _unflatten, _names in (
    (FrameLayout, _flatten_layout, _unflatten_layout, _OFFSETS),
    (Visibility, _flatten_visibility, _unflatten_visibility, ("queries", "keys", *_TABLES)),
):
    pytree.register_pytree_node(
        _kind, _flatten, _unflatten, flatten_with_keys_fn=_with_names(_flatten, _names)
    )
