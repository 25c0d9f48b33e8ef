"""Pictures of a run: contact sheets of clips, and the curves of a log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvid.data.atomic import whole

GIVEN = (230, 112, 0)  # outline of what the model was shown: orange, told apart by the colour-blind
_INK, _PAPER = (32, 32, 32), (255, 255, 255)
_GAP, _LINE, _FONT = 6, 4, 15  # pixels: between frames, of the outline, of the letters
_APART = 18  # pixels more between groups of rows


class Row(NamedTuple):
    """One line of a contact sheet."""

    label: str
    video: Tensor  # (3, T, H, W) in [-1, 1]
    known: Tensor | None = None  # bool (T,) or (T, h, w) in latent cells; True = given, outlined


def save_contact_sheet(
    path: str | Path,
    rows: Sequence[Row],
    *,
    title: str = "",
    cell: int = 112,
    columns: int = 16,
    group: int = 1,
) -> Path:
    """Write clips as one PNG: a line per clip, frames from left to right, given parts outlined.

    Small frames are enlarged by repeating pixels, large ones reduced, so that a frame is about
    `cell` pixels high. Of clips longer than `columns` evenly spaced frames are shown, the first
    and the last among them; the numbers on top say which.

    Args:
        rows: clips of one length and frame size.
        title: a line above the sheet.
        group: rows that belong together: wider gaps set every `group` of them apart.
    Raises:
        ValueError: no rows, or rows that differ in length or frame size.
    """
    _check(rows)
    T = rows[0].video.shape[1]
    shown = np.unique(np.linspace(0, T - 1, min(T, columns)).round().astype(int))
    cells = [[_frame(row, t, cell) for t in shown] for row in rows]
    sheet = _grid(cells, [row.label for row in rows], [str(t) for t in shown], title, group)
    path = Path(path)
    with whole(path) as part:
        sheet.save(part, format="PNG")
    return path


def moving_sheet(lines: Sequence[Sequence[Row]], *, cell: int = 128) -> Tensor:
    """Clips side by side as one video, given parts outlined: uint8 (T, 3, H, W), sides even.

    Args:
        lines: one sequence of clips for every line of the picture, all of one length and frame
            size; the labels of the first line stand above the columns.
    Raises:
        ValueError: no clips, lines of different length, or clips that differ in size.
    """
    _check([row for line in lines for row in line])
    labels = [row.label for row in lines[0]]
    pictures = []
    for t in range(lines[0][0].video.shape[1]):
        cells = [[_frame(row, t, cell) for row in line] for line in lines]
        picture = np.asarray(_grid(cells, [""] * len(cells), labels, ""))
        odd = [(0, side % 2) for side in picture.shape[:2]]  # video files take even sides only
        pictures.append(np.pad(picture, [*odd, (0, 0)], constant_values=255))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def save_curves(
    path: str | Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str = "",
    x_label: str = "optimiser steps",
    y_label: str = "loss",
    marks: Mapping[str, float] | None = None,
) -> Path:
    """Draw named curves, each (x values, y values), on a logarithmic y axis into one PNG.

    `marks` are named vertical lines, for example where a run was resumed.
    """
    from matplotlib.figure import Figure  # the class, not pyplot: no global state, no display

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name, (x, y) in curves.items():
        axes.plot(x, y, label=name, linewidth=1.5, marker="o" if len(x) < 20 else "", markersize=4)
    for name, place in (marks or {}).items():
        axes.axvline(place, color="0.5", linestyle="--", linewidth=1, label=name)
    axes.set(title=title, xlabel=x_label, ylabel=y_label, yscale="log")
    axes.grid(which="both", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    path = Path(path)
    with whole(path) as part:
        figure.savefig(part, format="png")
    return path


def to_uint8(video: Tensor) -> Tensor:
    """(3, T, H, W) in [-1, 1] -> uint8 (T, 3, H, W), as the writers of `data.video` take it."""
    levels = video.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return levels.to("cpu", torch.uint8).transpose(0, 1).contiguous()


def _check(rows: Sequence[Row]) -> None:
    if not rows:
        raise ValueError("rows must hold at least one clip, got none")
    for row in rows:
        if row.video.ndim != 4 or row.video.shape[0] != 3:
            raise ValueError(f"video must be (3, T, H, W), got {tuple(row.video.shape)}")
        if row.video.shape != rows[0].video.shape:
            raise ValueError(
                "rows must be clips of one length and frame size, got "
                f"{tuple(rows[0].video.shape)} and {tuple(row.video.shape)}"
            )
        if row.known is not None and row.known.shape[0] != row.video.shape[1]:
            raise ValueError(
                f"known must be (T,) or (T, h, w) with T={row.video.shape[1]}, "
                f"got {tuple(row.known.shape)}"
            )


def _frame(row: Row, t: int, height: int) -> np.ndarray:
    """Frame `t` as uint8 (H, W, 3), about `height` high, what is given outlined."""
    from PIL import Image

    frame = to_uint8(row.video[:, t : t + 1])[0].permute(1, 2, 0).numpy()
    H, W = frame.shape[:2]
    if height >= 2 * H:
        times = height // H
        frame = frame.repeat(times, axis=0).repeat(times, axis=1)
    elif height < H:
        size = (max(1, round(W * height / H)), height)
        frame = np.array(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))
    if row.known is not None:
        frame = frame.copy()
        frame[_outline(row.known[t].cpu().numpy(), *frame.shape[:2])] = GIVEN
    return frame


def _outline(known: np.ndarray, H: int, W: int) -> np.ndarray:
    """Pixels (H, W) within `_LINE` of the inner border of the given area: one flag, or (h, w)."""
    cells = np.atleast_2d(known)
    rows = np.arange(H) * cells.shape[0] // H
    columns = np.arange(W) * cells.shape[1] // W
    given = cells[rows][:, columns]
    padded = np.pad(given, _LINE)  # beyond the frame nothing is given
    inner = given.copy()
    for shift in range(2 * _LINE + 1):
        inner &= padded[shift : shift + H, _LINE : _LINE + W]
        inner &= padded[_LINE : _LINE + H, shift : shift + W]
    return given & ~inner


def _grid(
    cells: Sequence[Sequence[np.ndarray]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    group: int = 1,
) -> Any:
    """Pictures (H, W, 3) of one size in lines, on white, with labels to the left and above."""
    from PIL import Image, ImageDraw, ImageFont

    H, W = cells[0][0].shape[:2]
    font = ImageFont.load_default(_FONT)
    widest = max(round(font.getlength(label)) for label in rows)
    left = _GAP + (widest + _GAP if widest else 0)
    top = _GAP + (_FONT + _GAP if title else 0) + _FONT + _GAP
    width = max(left + len(cells[0]) * (W + _GAP), 2 * _GAP + round(font.getlength(title)))
    apart = _APART if group > 1 else 0
    height = top + len(cells) * (H + _GAP) + (len(cells) - 1) // group * apart
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), title, _INK, font)
    for x, label in enumerate(columns):
        draw.text((left + x * (W + _GAP) + W / 2, top - _GAP), label, _INK, font, anchor="mb")
    for y, (label, line) in enumerate(zip(rows, cells, strict=True)):
        at = top + y * (H + _GAP) + y // group * apart
        draw.text((left - _GAP, at + H / 2), label, _INK, font, anchor="rm")
        for x, cell in enumerate(line):
            sheet.paste(Image.fromarray(cell), (left + x * (W + _GAP), at))
    return sheet
