"""What goes into a Pyramid Flow network: columns, their checks, and where their tokens stand.

A column is a batch of clips at one stage of the pyramid: the history, older clips at lower
resolutions, and the unit that is being denoised.

Source: Jin et al., arXiv:2410.05954, sections 3.3 and 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvid.functional import FrameLayout, Rotary, Visibility, rotary_table
from fastvid.modules.joint import KV, Scene

Size = tuple[int, int, int]  # of a clip: frames, rows and columns of patches


class Column(NamedTuple):
    """The arguments of one call: see `PyramidFlux.forward`."""

    latents: Tensor  # (B, C, T, H, W)
    timestep: Tensor  # (B,)
    text: Tensor  # (B, L, text_width)
    text_lengths: Tensor  # (B,)
    pooled: Tensor  # (B, pooled_width)
    history: Sequence[Tensor] = ()  # (B, C, t, h, w) each, oldest first


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of the text and the oldest frames, by layer; made by `extend`.

    They depend on the weights, the text, the timestep, the resolution of the noisy unit and those
    frames, on nothing newer: they serve every call in which all of that is the same.
    """

    layers: tuple[KV, ...]
    text_lengths: Tensor  # (B,)
    tokens: tuple[int, ...]  # of the text and of each frame
    grid: tuple[int, int]  # of the noisy unit, in patches

    @property
    def frames(self) -> int:
        """How many of the oldest frames it holds."""
        return len(self.tokens) - 1

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        return sum(part.nbytes for layer in self.layers for part in layer)


def check(column: Column, config: Any, name: str = "") -> None:
    """Refuse what does not fit a network's config, before anything is computed.

    Raises:
        TypeError: not a tensor, or of another kind of numbers.
        ValueError: of another shape.
    """
    channels, patch = config.channels, config.patch
    latents = column.latents
    _expect(f"{name}latents", latents, ("B", channels, "T", "H", "W"))
    B = len(latents)
    if not B:
        raise ValueError(f"{name}latents must hold at least one sample, got none")
    for index, clip in enumerate(column.history):
        _expect(f"{name}history[{index}]", clip, (B, channels, "t", "h", "w"))
    for where, clip in _named_clips(column, name):
        T, H, W = clip.shape[2:]
        if T < 1 or H < 1 or W < 1 or H % patch or W % patch:
            raise ValueError(
                f"{where} must have frames, and H and W that are multiples of {patch}, got T={T}, "
                f"H={H}, W={W}"
            )
    _expect(f"{name}timestep", column.timestep, (B,))
    _expect(f"{name}text", column.text, (B, "L", config.text_width))
    _expect(f"{name}text_lengths", column.text_lengths, (B,), whole=True)
    _expect(f"{name}pooled", column.pooled, (B, config.pooled_width))
    if (lengths := _on_host(column.text_lengths)) is not None:
        L = column.text.shape[1]
        if any(not 1 <= length <= L for length in lengths):
            raise ValueError(f"{name}text_lengths must be 1 to {L}, as text has, got {lengths}")


def clip_sizes(column: Column, patch: int) -> tuple[Size, ...]:
    """Frames, rows and columns of patches of the history's clips and of the noisy unit."""
    clips = [*column.history, column.latents]
    return tuple((c.shape[2], c.shape[3] // patch, c.shape[4] // patch) for c in clips)


def trimmed(column: Column) -> Column:
    """Without the text that is padding in every sample, where the host knows."""
    if (lengths := _on_host(column.text_lengths)) is None:
        return column
    return column._replace(text=column.text[:, : max(lengths)])


def by_sample(column: Column) -> list[Column]:
    """On a CPU one column per sample if their texts differ in length, so that none is padded."""
    lengths = _on_host(column.text_lengths)
    if lengths is None or len(set(lengths)) == 1 or column.latents.device.type != "cpu":
        return [column]
    *tensors, history = column
    samples = zip(*(tensor.split(1) for tensor in tensors), strict=True)
    return [
        Column._make([*sample, [clip[b : b + 1] for clip in history]])
        for b, sample in enumerate(samples)
    ]


def check_prefix(column: Column, sizes: Sequence[Size], prefix: Prefix | None, keep: int) -> None:
    """Refuse a prefix that is of another history, and frames to keep that are not there."""
    tokens = _frame_tokens(sizes)
    history = len(tokens) - sizes[-1][0]
    if prefix is not None:
        if prefix.tokens[1:] != tokens[: min(prefix.frames, history)]:
            raise ValueError(
                f"prefix holds frames of {prefix.tokens[1:]} tokens, which history must start "
                f"with, got {tokens[:history]}"
            )
        if prefix.grid != sizes[-1][1:]:
            raise ValueError(
                f"prefix is of noisy units of {prefix.grid} patches, got {sizes[-1][1:]}"
            )
        if len(prefix.text_lengths) != len(column.latents):
            raise ValueError(
                f"prefix must have the batch of latents, {len(column.latents)}, got "
                f"{len(prefix.text_lengths)}"
            )
    held = 1 if prefix is None else prefix.frames
    if keep and not held <= keep <= history:
        raise ValueError(f"keep must be {held} to {history}, the frames of history, got {keep}")


def arrange(
    column: Column, sizes: tuple[Size, ...], dims: tuple[int, ...], prefix: Prefix | None, keep: int
) -> tuple[Scene, Scene]:
    """Who sees whom and stands where, for all blocks but the last and for the last.

    Args:
        column: checked and trimmed.
        dims: channels of a head that turn by the time, or by time, row and column.
    """
    text = column.text.shape[1] if prefix is None else prefix.tokens[0]
    places = _places if torch.compiler.is_compiling() else _places_once
    layout, rotary = places(dims, text, sizes, column.latents.device)
    lengths = column.text_lengths if prefix is None else prefix.text_lengths
    host = _on_host(lengths)
    alike = host is not None and len(set(host)) == 1
    every = Visibility.text_and_frames(layout, lengths[:1] if alike else lengths)
    tokens = [text, *_frame_tokens(sizes)]
    past = 0 if prefix is None else len(prefix.tokens)
    rotary = rotary._replace(rows=rotary.rows[:, sum(tokens[:past]) :])
    kept = sum(tokens[: keep + 1]) if keep else 0
    noisy = len(tokens) - sizes[-1][0]
    scene, last = (
        Scene(_asked_by(every, first), rotary, sum(tokens[first:]), keep=kept)
        for first in (past, noisy)
    )
    return scene, last


def new_prefix(
    layers: Sequence[KV], column: Column, sizes: Sequence[Size], before: Prefix | None, keep: int
) -> Prefix:
    """What the layers kept, and what it is of."""
    lengths, text = column.text_lengths, column.text.shape[1]
    if before is not None:
        lengths, text = before.text_lengths, before.tokens[0]
    return Prefix(tuple(layers), lengths, (text, *_frame_tokens(sizes)[:keep]), sizes[-1][1:])


def _line(full: int, size: int) -> Tensor:
    """(size,) positions of a coarser line's cells, in cells of one of `full`: their centres."""
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) * full / size - 0.5
    return centres.clamp(0, max(full - 1, 0))


def _places(
    dims: tuple[int, ...], text: int, sizes: tuple[Size, ...], device: torch.device
) -> tuple[FrameLayout, Rotary]:
    """The layout of text and frames, and positions: those of coarser clips lie between cells.

    Text stands at 0 on all axes. Frames count on through the clips.
    """
    with torch.inference_mode(False):  # what stays here may meet a backward
        total = sum(size[0] for size in sizes)
        lines = [torch.arange(total, dtype=torch.float64), torch.zeros(1), torch.zeros(1)]
        rows, time = [torch.zeros(text, 3, dtype=torch.int32)], 0
        for size in sizes:
            starts = time, len(lines[1]), len(lines[2])
            for axis in (1, 2):
                lines[axis] = torch.cat([lines[axis], _line(sizes[-1][axis], size[axis])])
            steps = [torch.arange(n) + start for n, start in zip(size, starts, strict=True)]
            rows.append(torch.cartesian_prod(*steps).to(torch.int32))
            time += size[0]
        tables = []
        for positions, dim in zip(lines, dims, strict=False):
            cos, sin = rotary_table(positions, dim)
            tables.append((cos.to(device), sin.to(device)))
        where = torch.cat(rows)[None, :, : len(dims)].contiguous().to(device)
        return FrameLayout([text, *_frame_tokens(sizes)], device), Rotary.of(tables, where)


_places_once = lru_cache(maxsize=64)(_places)  # the steps of a sampler share them


def _asked_by(every: Visibility, first: int) -> Visibility:
    """The same visibility, of the queries from frame `first` on."""
    if first == 0:
        return every
    queries = FrameLayout(every.queries.lengths[0, first:])
    return Visibility(every.table[:, first:], queries, every.queries, key_lengths=every.key_lengths)


def _frame_tokens(sizes: Sequence[Size]) -> tuple[int, ...]:
    return tuple(rows * columns for frames, rows, columns in sizes for _ in range(frames))


def _named_clips(column: Column, name: str) -> list[tuple[str, Tensor]]:
    clips = [(f"{name}history[{index}]", clip) for index, clip in enumerate(column.history)]
    return [*clips, (f"{name}latents", column.latents)]


def _on_host(lengths: Tensor) -> list[int] | None:
    """Numbers that can be read without waiting for a GPU, and outside a compiled graph."""
    known = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
    return lengths.tolist() if known else None


def _expect(name: str, value: Any, shape: tuple[int | str, ...], *, whole: bool = False) -> None:
    kind = "integers" if whole else "floating-point numbers"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of {kind}, got {type(value).__name__}")
    right = value.dtype in (torch.int32, torch.int64) if whole else value.is_floating_point()
    if not right:
        raise TypeError(f"{name} must be {kind}, got {value.dtype}")
    fits = len(shape) == value.ndim and all(
        isinstance(wanted, str) or wanted == size
        for wanted, size in zip(shape, value.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape)) + "," * (len(shape) == 1)
        raise ValueError(f"{name} must be ({wanted}), got {tuple(value.shape)}")
