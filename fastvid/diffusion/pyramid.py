"""Pyramidal flow matching: the windows of its stages, its history, and what it trains on.

Stage 0 has the lowest resolution, each one after it twice that in height and width. A stage moves
latents from noise level `start_sigma` to `end_sigma` along x = r * start + (1 - r) * end, r its
`stage_time` from 1 to 0; the velocity is start - end. Between stages `pyramid_renoise` upsamples
and adds noise. A video is made in units: the first frame alone, then `frames_per_unit` frames each.

Source: Jin et al., arXiv:2410.05954.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from fastvid.functional import latent_pyramid, noising, stage_endpoints


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage.

    Args:
        start_sigma, end_sigma: noise levels at its ends.
        alpha, beta: of the jump into it, `alpha * upsample(x) + beta * block noise`; 1 and 0 in
            the lowest, which starts from noise.
        first_timestep, last_timestep: what the model is told at its ends; the last is exclusive.
    """

    start_sigma: float
    end_sigma: float
    alpha: float
    beta: float
    first_timestep: float
    last_timestep: float


@dataclass(frozen=True, kw_only=True)
class PyramidSchedule:
    """The stages, lowest resolution first; see `pyramid_schedule`.

    Args:
        gamma: correlation inside a block of noise is -gamma.
        grid: points of stage time that training draws from, r = 1, 1 - 1/grid, ... 1/grid.
    """

    stages: tuple[Stage, ...]
    gamma: float
    grid: int

    def __len__(self) -> int:
        return len(self.stages)


def pyramid_schedule(
    stages: int = 3,
    *,
    bounds: Sequence[float] | None = None,
    shift: float = 1.0,
    gamma: float = 1 / 3,
    grid: int = 1000,
) -> PyramidSchedule:
    """The windows of the stages, so that each starts with the noise that the jump into it leaves.

    Args:
        stages: how many there are.
        bounds: (stages + 1) shares of the grid, rising from 0 to 1, where stages meet before the
            jumps move their starts. None: evenly spaced.
        shift: of the noise levels, sigma = shift * u / (1 + (shift - 1) * u).
        gamma: in (0, 1/3]; 1/3 adds the least noise at a jump.
        grid: number of timesteps.
    Raises:
        ValueError: an argument is not as above.
    """
    if stages < 1:
        raise ValueError(f"stages must be at least 1, got {stages}")
    bounds = [i / stages for i in range(stages + 1)] if bounds is None else list(bounds)
    if len(bounds) != stages + 1 or bounds[0] != 0 or bounds[-1] != 1:
        raise ValueError(f"bounds must be {stages + 1} shares from 0 to 1, got {bounds}")
    indices = [int(share * grid) for share in bounds]
    if not all(low < high for low, high in pairwise(indices)):
        raise ValueError(f"bounds must rise by at least 1/grid = 1/{grid}, got {bounds}")
    if not 0 < gamma <= 1 / 3:
        raise ValueError(f"gamma must be in (0, 1/3], got {gamma}")
    if shift <= 0:
        raise ValueError(f"shift must be above 0, got {shift}")

    def sigma(u):
        return shift * u / (1 + (shift - 1) * u)

    ends = [sigma(1 - index / grid) for index in indices]  # the last is 0
    alphas, betas = [1.0], [0.0]
    for end in ends[1:-1]:  # of the stage before
        alphas.append(1 / (math.sqrt(1 + 1 / gamma) * end + 1 - end))
        betas.append(alphas[-1] * end / math.sqrt(gamma))
    starts = [1.0] + [1 - a * (1 - end) for a, end in zip(alphas[1:], ends[1:-1], strict=True)]
    lengths = [start - end for start, end in zip(starts, ends[1:], strict=True)]
    shares = [0.0, *(total / sum(lengths) for total in accumulate(lengths))]
    # In float32 to the last bit, as published models are told.
    timesteps = grid * sigma(torch.arange(grid, 0, -1) / grid)
    marks = [float(timesteps[min(int(share * grid), grid - 1)]) for share in shares]
    columns = zip(starts, ends[1:], alphas, betas, marks, marks[1:], strict=False)
    names = Stage.__dataclass_fields__
    made = tuple(Stage(**dict(zip(names, column, strict=True))) for column in columns)
    return PyramidSchedule(stages=made, gamma=gamma, grid=grid)


class StageSteps(NamedTuple):
    """`timesteps` (steps,) float32 for the model; `stage_times` (steps + 1,) float64, 1 to 0."""

    timesteps: Tensor
    stage_times: Tensor


def stage_steps(
    schedule: PyramidSchedule, stage: int, steps: int, *, skip_last: bool = False
) -> StageSteps:
    """Where Euler's steps of a stage stand.

    Times are evenly spaced from 1 to 1/grid, then 0: the last step has length 1/grid only.
    `skip_last` leaves that one out and lets the step before it go to the end, which changes the
    stage's result by 1/grid of the difference of the last two velocities, and saves a call of the
    model. A stage of one step goes from 1 to 0 at once and keeps it.

    Raises:
        ValueError: `steps` is not at least 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    table = stage_timesteps(schedule, stage)
    timesteps = torch.linspace(float(table[0]), float(table[-1]), steps, dtype=torch.float64)
    times = torch.linspace(1, 1 / schedule.grid, steps, dtype=torch.float64)
    kept = steps - 1 if skip_last and steps > 1 else steps
    return StageSteps(timesteps[:kept].float(), torch.cat([times[:kept], times.new_zeros(1)]))


def stage_timesteps(schedule: PyramidSchedule, stage: int) -> Tensor:
    """What the model is told at r = 1, 1 - 1/grid, ... 1/grid of a stage: (grid,) float32."""
    at = schedule.stages[stage]
    marks = torch.linspace(
        at.first_timestep, at.last_timestep, schedule.grid + 1, dtype=torch.float64
    )
    return marks[:-1].float()


# ---- units and history


def unit_frames(unit: int, frames_per_unit: int = 1) -> range:
    """The frames of a unit; unit 0 is frame 0."""
    if unit == 0:
        return range(1)
    start = 1 + (unit - 1) * frames_per_unit
    return range(start, start + frames_per_unit)


def count_units(frames: int, frames_per_unit: int = 1) -> int:
    """How many units make up `frames` frames.

    Raises:
        ValueError: the frames after the first are no whole units.
    """
    if frames < 1 or (frames - 1) % frames_per_unit:
        raise ValueError(
            f"frames must be 1 and a multiple of frames_per_unit = {frames_per_unit}, got {frames}"
        )
    return 1 + (frames - 1) // frames_per_unit


class HistoryClip(NamedTuple):
    """Frames [start, stop) at the resolution of a stage."""

    stage: int
    start: int
    stop: int


def history_plan(unit: int, stage: int, frames_per_unit: int = 1) -> tuple[HistoryClip, ...]:
    """Which earlier frames a unit sees at a stage, the oldest clip first.

    The unit before it at the stage's own resolution, each one before that a stage lower, and all
    that remains, once the lowest is reached, as one clip of the lowest.
    """
    clips: list[HistoryClip] = []
    stop = unit_frames(unit, frames_per_unit).start
    for before in range(unit - 1, -1, -1):
        if clips and stage == 0:
            clips.append(HistoryClip(0, 0, stop))
            break
        start = unit_frames(before, frames_per_unit).start
        clips.append(HistoryClip(stage, start, stop))
        stop, stage = start, max(stage - 1, 0)
    return tuple(reversed(clips))


# ---- training


def column_stages(sample_ratios: Sequence[int] = (1, 2, 1)) -> tuple[int, ...]:
    """The stage of every column: with the default (0, 1, 1, 2).

    Column c trains samples c, c + columns, c + 2 columns, ... of a batch, each at one stage.
    """
    if not sample_ratios or min(sample_ratios) < 0 or not sum(sample_ratios):
        raise ValueError(f"sample_ratios must be counts of columns, got {tuple(sample_ratios)}")
    return tuple(stage for stage, count in enumerate(sample_ratios) for _ in range(count))


def unit_counts(
    step: int, rank: int, *, units: int, sync_group: int, stages: int = 3
) -> tuple[int, ...]:
    """How many units of a clip each stage trains on in a step; the last of them is predicted.

    The `sync_group` ranks of a group see the same clips and together, over `units / sync_group`
    steps, every position. Long sequences at the highest resolution go with short ones below.

    Raises:
        ValueError: `units` is no multiple of `sync_group`.
    """
    if sync_group < 1 or units < 1 or units % sync_group:
        raise ValueError(f"units must be a multiple of sync_group = {sync_group}, got {units}")
    highest = 1 + rank % sync_group + step % (units // sync_group) * sync_group
    return (*(1 + units - highest,) * (stages - 1), highest)


class ColumnDraws(NamedTuple):
    """What is random in a column of b samples.

    `noise` (b, C, t, H, W), of the frames that are trained, at the stage's resolution; `place` (b,)
    in [0, 1) in the stage; `corruption` (b,), the noise level of the history; `history`, the noise
    of its clips, the oldest first.
    """

    noise: Tensor
    place: Tensor
    corruption: Tensor
    history: tuple[Tensor, ...]


class TrainingColumn(NamedTuple):
    """The model's input, `history` the oldest first, `latents`, `timestep` (b,); its `target`."""

    history: tuple[Tensor, ...]
    latents: Tensor
    timestep: Tensor
    target: Tensor


def draw_column(
    generators: Sequence[Generator],
    shape: tuple[int, int, int, int],
    stage: int,
    schedule: PyramidSchedule,
    *,
    units: int | None = None,
    frames_per_unit: int = 1,
    corrupt_ratio: float = 1 / 3,
) -> ColumnDraws:
    """The draws of a column, one generator per sample, so that a sample's are its own.

    Noise is drawn at the resolution where it is used: reduced from full resolution by
    `noise_pyramid` it would be standard normal too, but each sample trains at one stage only.

    Args:
        shape: (C, T, H, W) of the latents at full resolution.
        units: see `training_column`.
        corrupt_ratio: the most noise on the history.
    """
    C, T, H, W = shape

    def size(level: int, frames: int) -> tuple[int, ...]:
        shrink = 2 ** (len(schedule) - 1 - level)
        return C, frames, H // shrink, W // shrink

    trained = T if units is None else len(unit_frames(units - 1, frames_per_unit))
    plan = () if units is None else history_plan(units - 1, stage, frames_per_unit)
    sizes = [size(stage, trained), *(size(clip.stage, clip.stop - clip.start) for clip in plan)]
    noises = [[torch.randn(s, generator=g) for s in sizes] for g in generators]
    places = [torch.rand((), generator=g) for g in generators]
    corruptions = [corrupt_ratio * torch.rand((), generator=g) for g in generators]
    noise, *history = (torch.stack(each) for each in zip(*noises, strict=True))
    return ColumnDraws(noise, torch.stack(places), torch.stack(corruptions), tuple(history))


def training_column(
    latents: Tensor,
    stage: int,
    schedule: PyramidSchedule,
    draws: ColumnDraws,
    *,
    units: int | None = None,
    frames_per_unit: int = 1,
) -> TrainingColumn:
    """Noisy latents of one stage, their corrupted history and target. Only what is used is reduced.

    Args:
        latents: (b, C, T, H, W) clean, normalised, at full resolution; H and W divisible by
            2^(stages - 1).
        draws: see `draw_column`.
        units: the clip is cut to so many, the last of which is noisy and the others its history.
            None: the whole clip is noisy, without history.
    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    if not 0 <= stage < len(schedule):
        raise ValueError(f"stage must be in [0, {len(schedule)}), got {stage}")
    H, W = latents.shape[-2:]
    divisor = 2 ** (len(schedule) - 1)
    if H % divisor or W % divisor:
        raise ValueError(f"latents must have H and W divisible by {divisor}, got H={H} W={W}")
    frames = range(latents.shape[2])
    plan: tuple[HistoryClip, ...] = ()
    if units is not None:
        if not 1 <= units <= (most := count_units(len(frames), frames_per_unit)):
            raise ValueError(f"units must be in [1, {most}] for {len(frames)} frames, got {units}")
        frames = unit_frames(units - 1, frames_per_unit)
        plan = history_plan(units - 1, stage, frames_per_unit)
    if len(draws.history) != len(plan):
        raise ValueError(
            f"draws.history must hold the noise of {len(plan)} clips, got {len(draws.history)}"
        )
    at = schedule.stages[stage]
    trained = _at_stage(latents[:, :, frames.start : frames.stop], stage, schedule)
    lower = None if stage == 0 else latent_pyramid(trained, 2)[0]
    index = (draws.place * schedule.grid).long().clamp(max=schedule.grid - 1)
    made = stage_endpoints(
        trained,
        lower,
        draws.noise,
        start_sigma=at.start_sigma,
        end_sigma=at.end_sigma,
        ratio=(1 - index.double() / schedule.grid).float(),
        endpoints=False,
    )
    history = []
    for (level, start, stop), noise in zip(plan, draws.history, strict=True):
        clean = _at_stage(latents[:, :, start:stop], level, schedule)
        level_of_noise = draws.corruption.float()
        corrupted, _ = noising(clean, 1 - level_of_noise, level_of_noise, noise=noise, target="x0")
        history.append(corrupted)
    timestep = stage_timesteps(schedule, stage).to(index.device)[index]
    return TrainingColumn(tuple(history), made.sample, timestep, made.target)


def _at_stage(latents: Tensor, stage: int, schedule: PyramidSchedule) -> Tensor:
    """Full-resolution latents at the resolution of a stage."""
    return latent_pyramid(latents, len(schedule) - stage)[0]


# ---- latents


class LatentScale(NamedTuple):
    """Normalised latents are (z - shift) * scale; a clip's first frame is an image."""

    image_shift: float
    image_scale: float
    video_shift: float = -0.2343
    video_scale: float = 1 / 3.0986


MINIFLUX_SCALE = LatentScale(-0.04, 1 / 1.8726)
SD3_SCALE = LatentScale(0.1490, 1 / 1.8415)


def normalize_latents(latents: Tensor, scale: LatentScale) -> Tensor:
    """Latents (B, C, T, H, W) of the codec as the model sees them; a new tensor."""
    image, video = latents[:, :, :1], latents[:, :, 1:]
    return torch.cat(
        [
            (image - scale.image_shift) * scale.image_scale,
            (video - scale.video_shift) * scale.video_scale,
        ],
        dim=2,
    )


def denormalize_latents(latents: Tensor, scale: LatentScale) -> Tensor:
    """What the codec decodes, from what the model makes (B, C, T, H, W); a new tensor."""
    image, video = latents[:, :, :1], latents[:, :, 1:]
    return torch.cat(
        [
            image / scale.image_scale + scale.image_shift,
            video / scale.video_scale + scale.video_shift,
        ],
        dim=2,
    )
