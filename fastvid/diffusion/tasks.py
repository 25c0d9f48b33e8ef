"""Tasks as given frames: every one is a function that says which latent cells are `known`.

True = given. A task of whole frames is bool (B, T), one inside frames is (B, T, H, W). Every draw
leaves something to generate in every sample, comes from `generator` alone, and is made anew for
each sample; a `batch` of 1 broadcasts.

Sources: Lu et al., VDT, arXiv:2305.13311 (the first seven and their numbers); Liu et al., MarDini,
arXiv:2410.20280 (the last four, 5 frames to expand, 4 to slow down); Bao et al., BEiT,
arXiv:2106.08254, algorithm 1 (blockwise cells).
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Generator, Tensor


class Clips(NamedTuple):
    """What a task decides for: `batch` clips in latent cells, and where their draws come from."""

    frames: int
    height: int
    width: int
    given: int | None  # frames, None for the task's own
    batch: int
    generator: Generator | None


Task = Callable[[Clips], Tensor]


def predict(clips: Clips) -> Tensor:
    """The first frames are given: 8, or half of a clip of 8 or fewer."""
    known = torch.zeros(clips.batch, clips.frames, dtype=torch.bool)
    known[:, : _given(clips, 8 if clips.frames > 8 else clips.frames // 2)] = True
    return known


def backward(clips: Clips) -> Tensor:
    """The last frames are given: as many as `predict` takes."""
    return predict(clips).flip(1)


def interpolate(clips: Clips) -> Tensor:
    """Every fourth frame is given from the first; `given` frames are spread from first to last."""
    known = torch.zeros(clips.batch, clips.frames, dtype=torch.bool)
    count = _given(clips, math.ceil(clips.frames / 4))
    if clips.given is None:
        known[:, ::4] = True
    else:
        spread = torch.linspace(0, clips.frames - 1, count, dtype=torch.float64)
        known[:, spread.round().long()] = True
    return known


def unconditional(clips: Clips) -> Tensor:
    """Nothing is given."""
    if clips.given:
        raise ValueError(f"given must be 0 or None for this task, got {clips.given}")
    return torch.zeros(clips.batch, clips.frames, dtype=torch.bool)


def image_to_video(clips: Clips) -> Tensor:
    """One frame is given, any of them; for the first one ask `predict` with `given=1`."""
    shape, count = (clips.batch, clips.frames), _given(clips, 1)
    order = torch.rand(shape, generator=clips.generator).argsort(1)
    return torch.zeros(shape, dtype=torch.bool).scatter_(1, order[:, :count], True)


def arbitrary_interpolation(clips: Clips) -> Tensor:
    """Each frame is given with probability 0.2; or `given` of them, any."""
    if clips.given is not None:
        return image_to_video(clips)
    known = torch.rand(clips.batch, clips.frames, generator=clips.generator) < 0.2
    while (full := known.all(1)).any():
        again = torch.rand(int(full.sum()), clips.frames, generator=clips.generator)
        known[full] = again < 0.2
    return known


def complete(clips: Clips) -> Tensor:
    """Half of every frame is given, in blocks; whole frames at the ends, up to 3 at each.

    `given` frames are whole: half of them first, half last, an odd one first.
    """
    frames, height, width, given, batch, generator = clips
    known = torch.ones(batch, frames, height, width, dtype=torch.bool)
    if given is None:
        ends = torch.randint(0, min(3, (frames - 1) // 2) + 1, (batch, 2), generator=generator)
    else:
        count = _given(clips, 0, least=0)
        ends = torch.tensor([count - count // 2, count // 2]).expand(batch, 2)
    for sample, (first, last) in zip(known, ends.tolist(), strict=True):
        sample[first : frames - last] = ~block_cells(height, width, generator=generator)
    return known


def middle_frame(clips: Clips) -> Tensor:
    """The frames in the middle are given: one of them, the later of two."""
    count = _given(clips, 1)
    known = torch.zeros(clips.batch, clips.frames, dtype=torch.bool)
    first = (clips.frames - count + 1) // 2
    known[:, first : first + count] = True
    return known


def expand(clips: Clips) -> Tensor:
    """The first frames are given: 5, or fewer of a clip as short."""
    return predict(clips._replace(given=clips.given or min(5, clips.frames - 1)))


def slow_motion(clips: Clips) -> Tensor:
    """Frames are given evenly from first to last: 4, or all but one of a clip as short."""
    return interpolate(clips._replace(given=clips.given or min(4, clips.frames - 1)))


def loop(clips: Clips) -> Tensor:
    """The first frame and the last are given, which are to be the same."""
    if clips.given not in (None, 2):
        raise ValueError(f"given must be 2 or None for this task, got {clips.given}")
    return interpolate(clips._replace(given=min(2, clips.frames - 1)))


TASKS: dict[str, Task] = {
    "predict": predict,
    "backward": backward,
    "interpolate": interpolate,
    "unconditional": unconditional,
    "image-to-video": image_to_video,
    "arbitrary-interpolation": arbitrary_interpolation,
    "complete": complete,
    "middle-frame": middle_frame,
    "expand": expand,
    "slow-motion": slow_motion,
    "loop": loop,
}

# Those that give nothing, or parts of frames: not for a model that plans from whole ones.
PARTIAL = frozenset({"unconditional", "complete"})

OFFICIAL_IDS = tuple(TASKS)[:7]  # the place of a name is its number in VDT's official code

# The official training draw: completion one time in five, else one of the six others alike.
OFFICIAL_MIX = {name: 0.2 if name == "complete" else 0.8 / 6 for name in OFFICIAL_IDS}


def task_known(
    name: str,
    frames: int,
    height: int,
    width: int,
    *,
    given: int | None = None,
    batch: int = 1,
    generator: Generator | None = None,
) -> Tensor:
    """The known cells of a task, by its name in `TASKS`.

    Args:
        frames, height, width: of the clip, in latent cells.
        given: number of given frames, or None for the task's own.
        batch: samples, drawn apart.
        generator: on the CPU; None takes PyTorch's global one.
    Returns:
        bool on the CPU, (batch, frames) or, for "complete", (batch, frames, height, width).
    Raises:
        ValueError: no such task; or nothing, or less than nothing, would be left to generate.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    sizes = {"frames": frames, "height": height, "width": width, "batch": batch}
    for label, size in sizes.items():
        if size < 1:
            raise ValueError(f"{label} must be at least 1, got {size}")
    return TASKS[name](Clips(frames, height, width, given, batch, generator))


def draw_task(
    weights: Mapping[str, float],
    frames: int,
    height: int,
    width: int,
    *,
    given: Mapping[str, int] | None = None,
    batch: int = 1,
    generator: Generator | None = None,
) -> tuple[str, Tensor]:
    """One task for a batch, drawn by weight, and its known cells.

    Args:
        weights: task name -> weight, not negative, of any sum above 0.
        given: task name -> number of given frames, where it is not the task's own.
        frames, height, width, batch, generator: as in `task_known`.
    Returns:
        name, known.
    """
    unknown = set(weights) - set(TASKS) or set(given or {}) - set(TASKS)
    if unknown:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {sorted(unknown)}")
    odds = torch.tensor(list(weights.values()), dtype=torch.float64)
    if not odds.isfinite().all() or (odds < 0).any() or odds.sum() <= 0:
        raise ValueError(f"weights must not be negative and not all 0, got {dict(weights)}")
    name = list(weights)[int(torch.multinomial(odds, 1, generator=generator))]
    count = (given or {}).get(name)
    known = task_known(name, frames, height, width, given=count, batch=batch, generator=generator)
    return name, known


def block_cells(
    height: int, width: int, *, share: float = 0.5, generator: Generator | None = None
) -> Tensor:
    """Random rectangles over a `share` of a grid, at least one cell: bool (height, width).

    A rectangle has at least 4 cells (fewer on a tiny grid) and an aspect between 0.3 and 1 / 0.3.
    When fewer than 4 cells are wanting, or some are too many, single ones make the share exact.
    """
    cells = torch.zeros(height, width, dtype=torch.bool)
    target = max(1, int(share * height * width))
    while (wanting := target - int(cells.sum())) >= 4:
        cells[_rectangle(height, width, wanting, generator)] = True
    flat = cells.flatten()
    pool = (flat if wanting < 0 else ~flat).nonzero().flatten()
    flat[pool[torch.randperm(len(pool), generator=generator)[: abs(wanting)]]] = wanting > 0
    return flat.reshape(height, width)


def _rectangle(
    height: int, width: int, most: int, generator: Generator | None
) -> tuple[slice, slice]:
    """Rows and columns of one rectangle of about 4 to `most` cells, anywhere in the grid."""
    area, aspect, top, left = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    size = 4 + area * (most - 4)
    ratio = 0.3 ** (1 - 2 * aspect)  # height to width
    tall = min(height, max(1, round(math.sqrt(size * ratio))))
    wide = min(width, max(1, round(math.sqrt(size / ratio))))
    first, start = int(top * (height - tall + 1)), int(left * (width - wide + 1))
    return slice(first, first + tall), slice(start, start + wide)


def _given(clips: Clips, default: int, *, least: int = 1) -> int:
    count = default if clips.given is None else clips.given
    if not least <= count < clips.frames:
        raise ValueError(
            f"given must be at least {least} and leave one of {clips.frames} frames to generate, "
            f"got {count}"
        )
    return count
