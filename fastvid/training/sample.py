"""Sampling a task from a trained model: given frames in, whole clips out, of any length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastvid.diffusion.mardini import Level, slow_motion
from fastvid.diffusion.process import Prediction
from fastvid.diffusion.sampling import sample_ddim
from fastvid.diffusion.schedule import Schedule, Spacing, respace
from fastvid.diffusion.tasks import task_known
from fastvid.models.vdt import VDT
from fastvid.training.codec import Codec
from fastvid.training.draws import generator
from fastvid.training.timeline import known_in_video, latent_frames, video_frames

_BACKWARD, _SLOW, _LOOP = "backward", "slow-motion", "loop"


class Sample(NamedTuple):
    """Clips and what was given of them."""

    video: Tensor  # (B, 3, T, H, W) in [-1, 1]
    known: Tensor  # bool (B, T) or (B, T, h, w): h and w in latent cells, True = given


class Sampler(Protocol):
    """Makes the window that begins with frame `start` of a clip, from noise (B, C, T, H, W)."""

    def __call__(
        self,
        noise: Tensor,
        schedule: Schedule,
        *,
        known: Tensor,
        clean: Tensor,
        start: int = 0,
        **settings: Any,
    ) -> Tensor: ...


SamplerOf = Callable[[Tensor | None, Tensor], Sampler]  # from a video and what is known of it


def ddim_sampler(model: Any, prediction: Prediction) -> Sampler:
    """`sample_ddim`, for which every window is alike."""

    def sample(noise: Tensor, schedule: Schedule, *, start: int = 0, **settings: Any) -> Tensor:
        return sample_ddim(model, noise, schedule, prediction=prediction, **settings)

    return sample


@torch.no_grad()
def sample_task(
    model: Any,
    codec: Codec,
    schedule: Schedule,
    video: Tensor | None,
    *,
    task: str,
    seeds: Sequence[int],
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    given: int | None = None,
    known: Tensor | None = None,
    overlap: int | None = None,
    steps: int = 50,
    spacing: Spacing = "linspace",
    eta: float = 0.0,
    prediction: Prediction = "eps",
    clip: float | None = None,
    sampler_of: SamplerOf | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sample:
    """Generate clips by DDIM, each from its own seed: a clip does not depend on its company.

    A clip longer than `model.config.frames` is made by sliding windows, see `window_starts`: each
    sees what the earlier ones made. `with_frames` gives a VDT that makes it in one pass instead.
    "slow-motion" makes it level by level instead, see `diffusion.mardini.slow_motion`.

    Where the codec joins frames (`codec.time_factor` above 1), `given`, `known` and `overlap` count
    latent frames, and the video holds the clip from its first frame on.

    Args:
        model: in eval mode.
        schedule: the one of the training; `steps` of it are walked, spaced by `spacing`.
        video: (B, 3, T0, H, W) in [-1, 1], see `laid_out`; of it only what is given is looked at.
            None where nothing is given.
        task: a name in `diffusion.tasks.TASKS`.
        seeds: one per clip; decides its noise and, where the task draws, what is given.
        frames: T, length of the clips; the model's own by default.
        size: height and width in latent cells where there is no video; the model's own by default.
        given: given frames, or None for the task's own number.
        known: bool (B or 1, T), what is given in place of the task's own choice.
        overlap: frames that a window shares with the one before. By default those the task gives
            at its open end, at least 1.
        steps, eta: of DDIM.
        prediction: what the model predicts, where `sampler_of` is None.
        clip: bound of |x0| in every step, in latents.
        sampler_of: what makes windows, from the video as it lies in the clip (None: it does not)
            and what is known of it; None is `ddim_sampler`.
        progress: called with (steps done, steps in all) as it goes.
    Raises:
        ValueError: the clips end before the last given frame, an argument is not as above, or
            "loop" or "slow-motion" with a codec that joins frames.
    """
    if codec.time_factor > 1 and task in (_SLOW, _LOOP):
        raise ValueError(f"task {task!r} needs a codec that codes each frame alone")
    T = latent_frames(frames, codec.time_factor) if frames else model.config.frames
    device = next(model.parameters()).device
    if video is None:
        H, W = size or (model.config.height, model.config.width)
    else:
        if len(seeds) != len(video):
            raise ValueError(f"seeds must be one per clip, B={len(video)}, got {len(seeds)}")
        H, W = (side // codec.factor for side in video.shape[3:])
        video = video.to(device)
    if known is None:
        known = draw_known(task, T, H, W, given=given, seeds=seeds)
    elif known.shape[1] != T:
        raise ValueError(f"known must be (B or 1, {T}), got {tuple(known.shape)}")
    known = known.expand(len(seeds), *known.shape[1:])
    chain = respace(schedule, steps, spacing=spacing)
    if sampler_of is None:

        def sampler_of(video: Tensor | None, known: Tensor) -> Sampler:
            return ddim_sampler(model, prediction)

    def encode(video: Tensor) -> Tensor:
        return codec.encode(video, generators=[generator(s, "codec") for s in seeds])

    def make(
        sampler: Sampler,
        clean: Tensor,
        done: Tensor,
        place: tuple[int, ...],
        progress: Callable[[int, int], None],
    ) -> Tensor:
        noise = [
            torch.randn(clean.shape[1:], generator=generator(s, "noise", *place)) for s in seeds
        ]
        return sampler(
            torch.stack(noise).to(device),
            chain,
            known=done,
            clean=clean,
            start=place[-1],
            eta=eta,
            clip=clip,
            generator=[generator(s, "steps", *place) for s in seeds],
            progress=progress,
        )

    if task == _SLOW:
        count = needed_frames(task, known, 0)
        video = _expect_frames(video, count, task)[:, :, :count]
        levels = slow_motion(count, T, min(T, model.config.frames))
        tick = ticker(progress, len(chain) * _windows(levels, count))
        sampler = sampler_of(None, known)
        latents, known = _stretch(
            encode(video),
            levels,
            lambda clean, done, place: make(sampler, clean, done, place, tick),
        )
        return Sample(codec.decode(latents).clamp(-1, 1).cpu(), known)

    latents = torch.zeros(len(seeds), codec.channels, T, H, W, device=device)
    if needed := last_given(known):
        if video is not None:
            video = laid_out(task, video, known, codec.time_factor)
        count = video_frames(needed, codec.time_factor)
        video = _expect_frames(video, count, task)[:, :, :count]
        latents[:, :, :needed] = encode(video)
    sampler = sampler_of(video, known)
    window = frames_at_once(model, T)
    starts = plan_windows(known, window, overlap=overlap, from_end=task == _BACKWARD)
    tick = ticker(progress, len(chain) * len(starts))
    latents = fill_windows(
        lambda clean, done, start: make(sampler, clean, done, (start,), tick),
        latents,
        known.to(device),
        starts,
        window,
    )
    made = codec.decode(latents).clamp(-1, 1).cpu()
    return Sample(made, known_in_video(known, codec.time_factor))


def frames_at_once(model: Any, frames: int) -> int:
    """Of a clip of `frames`: those of the longest window, or all where a model knows no longest."""
    return min(frames, getattr(model.config, "frames", frames))


def needed_frames(task: str, known: Tensor, have: int, factor: int = 1) -> int:
    """How many frames a video must have to give what is known; of one that has `have`.

    Args:
        factor: the codec's, in time; `known` is of its latents.
    """
    if task == _LOOP:
        return 1
    if factor > 1:
        return video_frames(last_given(known), factor)
    count = int(known.sum(1).max()) if known.ndim == 2 else 0
    return count if task == _SLOW or have == count else last_given(known)


def laid_out(task: str, video: Tensor, known: Tensor, factor: int = 1) -> Tensor:
    """The frames of a video where they stand in the clip.

    A video (B, 3, T0, H, W) of exactly as many frames as `known` (B, T) gives holds just those, one
    after another; any other holds the clip's frames from the first, as does every video for a codec
    that joins `factor` frames. Of "loop" the first frame stands at both ends.
    """
    if known.ndim > 2 or task == _SLOW or factor > 1:
        return video
    if task == _LOOP:
        return video[:, :, :1].expand(-1, -1, known.shape[1], -1, -1)
    if not (known.sum(1) == video.shape[2]).all():
        return video
    order = known.cumsum(1).sub(1).clamp_min(0)  # a place that is not given repeats the last
    return torch.stack([clip[:, at] for clip, at in zip(video, order, strict=True)])


def ticker(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int, int], None]:
    """Turn "steps of this sampling" into "model calls of everything"."""
    done = 0

    def tick(_step: int, _steps: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return tick


def _expect_frames(video: Tensor | None, count: int, task: str) -> Tensor:
    if video is None or video.shape[2] < count:
        have = 0 if video is None else video.shape[2]
        raise ValueError(f"video must hold the first {count} frames for {task}, got {have}")
    return video


def _windows(levels: Sequence[Level], count: int) -> int:
    """Windows that `levels` make of `count` frames."""
    windows = 0
    for level in levels:
        windows += count // level.given
        count = count // level.given * level.frames
    return windows


def _stretch(
    latents: Tensor,
    levels: Sequence[Level],
    make: Callable[[Tensor, Tensor, tuple[int, ...]], Tensor],
) -> tuple[Tensor, Tensor]:
    """Latents (B, C, T, H, W) made longer level by level, and (B, T) where the first ones stand."""
    B = len(latents)
    given = torch.ones(B, latents.shape[2], dtype=torch.bool)
    for depth, level in enumerate(levels):
        known = level.known().expand(B, -1)
        windows, places = [], []
        for start in range(0, latents.shape[2], level.given):
            part = slice(start, start + level.given)
            clean = latents.new_zeros(*latents.shape[:2], level.frames, *latents.shape[3:])
            clean[:, :, known[0]] = latents[:, :, part]
            windows.append(make(clean, known.to(latents.device), (depth, start)))
            place = torch.zeros_like(known)
            place[:, known[0]] = given[:, part]
            places.append(place)
        latents, given = torch.cat(windows, 2), torch.cat(places, 1)
    return latents, given


def draw_known(
    task: str,
    frames: int,
    height: int,
    width: int,
    *,
    given: int | None = None,
    seeds: Sequence[int],
) -> Tensor:
    """What a task gives of each clip: bool (B, T) or (B, T, H, W), decided by the clip's seed."""
    return torch.cat(
        [
            task_known(task, frames, height, width, given=given, generator=generator(s, "known"))
            for s in seeds
        ]
    )


def last_given(known: Tensor) -> int:
    """How many frames a clip must have to hold everything given: known (B, T) or (B, T, h, w)."""
    frames = known.flatten(2).any(2) if known.ndim > 2 else known
    return int(frames.any(0).nonzero().max()) + 1 if frames.any() else 0


def plan_windows(
    known: Tensor, window: int, *, overlap: int | None = None, from_end: bool = False
) -> list[int]:
    """`window_starts` of a clip of which `known` is given: bool (B, T) or (B, T, h, w).

    Args:
        overlap: shared frames; by default those given at the open end, at least 1.
    """
    if overlap is None:
        overlap = max(1, min(_run(known.flip(1) if from_end else known), window - 1))
    return window_starts(known.shape[1], window, overlap, from_end=from_end)


def fill_windows(
    make: Callable[[Tensor, Tensor, int], Tensor],
    latents: Tensor,
    known: Tensor,
    starts: Sequence[int],
    window: int,
) -> Tensor:
    """Make a clip window by window, each seeing what the earlier ones made.

    Args:
        make: from a window's latents, known cells and first frame to the window made whole.
        latents: (B, C, T, H, W), looked at where `known` (B, T) or (B, T, H, W) is True.
        starts: first frames of the windows in turn, `window` frames each.
    """
    latents, done = latents.clone(), known.clone()
    for start in starts:
        part = slice(start, start + window)
        if not done[:, part].all():
            latents[:, :, part] = make(latents[:, :, part], done[:, part], start)
        done[:, part] = True
    return latents


def window_starts(frames: int, window: int, overlap: int, *, from_end: bool = False) -> list[int]:
    """First frames of the windows that cover a clip, in the order in which they are made.

    Neighbours share `overlap` frames; the last window is as long as the others and shares more.
    `from_end` starts with the end of the clip.

    Raises:
        ValueError: windows that share as many frames as they have never get on.
    """
    if frames <= window:
        return [0]
    if not 0 < overlap < window:
        raise ValueError(f"overlap must be at least 1 and below {window} frames, got {overlap}")
    starts = [*range(0, frames - window, window - overlap), frames - window]
    return [frames - window - start for start in starts] if from_end else starts


def with_frames(model: VDT, frames: int, *, interpolate: bool = False) -> VDT:
    """The model for clips of up to `frames` frames, in eval mode.

    Its time table is computed anew for the longer clip, so that the first frames stand where they
    stood; `interpolate` stretches the trained table over the whole clip instead.
    """
    longer = VDT.from_official(
        model.to_official_state_dict(),
        config=model.config,
        frames=frames,
        time_interpolation=interpolate,
    )
    return longer.to(next(model.parameters()).device).eval()


def _run(known: Tensor) -> int:
    """Frames that are wholly given before the first that is not, over all clips."""
    frames = known.flatten(2).all(2) if known.ndim > 2 else known
    return int(frames.all(0).long().cumprod(0).sum())
