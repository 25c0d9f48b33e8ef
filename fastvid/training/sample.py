"""Sampling a task from a trained model: given frames in, whole clips out, of any length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvid.diffusion.process import Prediction
from fastvid.diffusion.sampling import sample_ddim
from fastvid.diffusion.schedule import Schedule, respace
from fastvid.diffusion.tasks import task_known
from fastvid.models.vdt import VDT
from fastvid.training.codec import Codec
from fastvid.training.draws import generator

_BACKWARD = "backward"


class Sample(NamedTuple):
    """Clips and what was given of them."""

    video: Tensor  # (B, 3, T, H, W) in [-1, 1]
    known: Tensor  # bool (B, T) or (B, T, h, w) in latent cells, True = given


@torch.no_grad()
def sample_task(
    model: VDT,
    codec: Codec,
    schedule: Schedule,
    video: Tensor | None,
    *,
    task: str,
    seeds: Sequence[int],
    frames: int | None = None,
    given: int | None = None,
    overlap: int | None = None,
    steps: int = 50,
    eta: float = 0.0,
    prediction: Prediction = "eps",
    clip: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sample:
    """Generate clips by DDIM, each from its own seed: a clip does not depend on its company.

    A clip longer than `model.config.frames` is made by sliding windows, see `window_starts`: each
    sees what the earlier ones made. `with_frames` gives a model that makes it in one pass instead.

    Args:
        model: in eval mode.
        schedule: the one of the training; `steps` of it are walked.
        video: (B, 3, T0, H, W) in [-1, 1], the clips' first frames; of these only the given ones
            are looked at. None where nothing is given.
        task: a name in `diffusion.tasks.TASKS`.
        seeds: one per clip; decides its noise and, where the task draws, what is given.
        frames: T, length of the clips; the model's own by default.
        given: given frames, or None for the task's own number.
        overlap: frames that a window shares with the one before. By default those the task gives
            at its open end, at least 1.
        steps, eta: of DDIM.
        clip: bound of |x0| in every step, in latents.
        progress: called with (steps done, steps in all) as it goes.
    Raises:
        ValueError: the clips end before the last given frame, or an argument is not as above.
    """
    T = frames or model.config.frames
    C, H, W = codec.channels, model.config.height, model.config.width
    if video is not None:
        if len(seeds) != len(video):
            raise ValueError(f"seeds must be one per clip, B={len(video)}, got {len(seeds)}")
        H, W = (side // codec.factor for side in video.shape[3:])
    known = draw_known(task, T, H, W, given=given, seeds=seeds)
    like = next(model.parameters())
    latents = torch.zeros(len(seeds), C, T, H, W, device=like.device)
    if needed := last_given(known):
        if video is None or video.shape[2] < needed:
            have = 0 if video is None else video.shape[2]
            raise ValueError(f"video must hold the first {needed} frames for {task}, got {have}")
        latents[:, :, :needed] = codec.encode(
            video[:, :, :needed].to(like.device), generators=[generator(s, "codec") for s in seeds]
        )

    window = min(T, model.config.frames)
    starts = plan_windows(known, window, overlap=overlap, from_end=task == _BACKWARD)
    chain = respace(schedule, steps)

    def make(clean: Tensor, done: Tensor, start: int) -> Tensor:
        def report(step: int, total: int) -> None:
            if progress:
                progress(starts.index(start) * total + step, len(starts) * total)

        noise = [
            torch.randn(clean.shape[1:], generator=generator(s, "noise", start)) for s in seeds
        ]
        return sample_ddim(
            model,
            torch.stack(noise).to(like.device),
            chain,
            known=done,
            clean=clean,
            prediction=prediction,
            eta=eta,
            clip=clip,
            generator=[generator(s, "steps", start) for s in seeds],
            progress=report,
        )

    latents = fill_windows(make, latents, known.to(like.device), starts, window)
    return Sample(codec.decode(latents).clamp(-1, 1).cpu(), known)


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
