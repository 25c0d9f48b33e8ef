"""Sampling MarDini: one plan per window, read in every step of DDIM.

Sources: Liu et al., arXiv:2410.20280 (the task, guidance 2.5 from an image, none between frames);
Song et al., arXiv:2010.02502 (DDIM); Lin et al., arXiv:2305.08891 (zero terminal SNR, trailing
steps).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from fastvid.functional import guided_step

from .process import mix_known
from .sampling import draw_noise
from .schedule import Schedule
from .tables import ddim_table


class Model(Protocol):
    """What `sample` calls; see `fastvid.models.mardini.MarDini`."""

    def plan(self, low: Tensor, known: Tensor) -> Tensor: ...
    def project(self, signal: Tensor | None) -> Any: ...
    def references(self, clean: Tensor, known: Tensor, planning: Any) -> Any: ...
    def __call__(
        self, latents: Tensor, timestep: Tensor, *, known: Tensor, planning: Any, references: Any
    ) -> Tensor: ...


@torch.no_grad()
def sample(
    model: Model,
    noise: Tensor,
    schedule: Schedule,
    *,
    known: Tensor,
    clean: Tensor,
    low: Tensor,
    guidance: float = 1.0,
    references: bool = False,
    eta: float = 0.0,
    clip: float | None = None,
    generator: Generator | Sequence[Generator] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """One window: the planner runs once, the generator once per step, or twice under guidance.

    Args:
        noise: (B, C, T, H, W) standard normal.
        schedule: one step each; shorten it with `respace(..., spacing="trailing")`.
        known: bool (B or 1, T), True = given; best on the CPU, where looking at it is free.
        clean: (B, C, T, H, W) the given latents, dtype of `noise`; only known frames are read.
        low: (B, C, T, h, w) the given frames at the planning resolution.
        guidance: u + guidance * (c - u), where u does without the plan. One call is enough at 1,
            which is c alone, and at 0, u alone, which needs no plan either.
        references: compute known frames once instead of in every step; the model must be made
            with `ref_t="zero"`, and all samples have as many of them.
        eta: 0 is deterministic, 1 as noisy as ancestral sampling.
        clip: bound of |x0| in every step, or None.
        generator: of the noise of the steps, for `eta` above 0; see `draw_noise`.
        progress: called with (steps done, steps in all) after each step.
    Returns:
        (B, C, T, H, W), dtype and device of `noise`, known frames equal to `clean` bit for bit.
    Raises:
        ValueError, TypeError: an argument is not as above, or the model refuses it.
    """
    if clean.shape != noise.shape or clean.dtype != noise.dtype:
        raise ValueError(
            f"clean must be {noise.dtype} of shape {tuple(noise.shape)} like noise, got "
            f"{clean.dtype} of shape {tuple(clean.shape)}"
        )
    plans = [] if guidance == 1 else [model.project(None)]
    if guidance:
        plans.append(model.project(model.plan(low, known)))
    fixed = [model.references(clean, known, plan) if references else None for plan in plans]

    device, total = noise.device, len(schedule)
    table = ddim_table(schedule, eta=eta, prediction="v").to(device)
    step = torch.zeros(1, dtype=torch.int64, device=device)
    there = known.to(device)
    wide = torch.promote_types(noise.dtype, torch.float32)
    given = clean.to(wide)
    x = mix_known(noise.to(wide), given, there).contiguous()
    for done, index in enumerate(reversed(range(total)), start=1):
        timestep = torch.full((1,), int(schedule.timestep_map[index]), device=device)
        latents = x.to(noise.dtype)
        branches = [
            model(latents, timestep, known=known, planning=plan, references=each)
            for plan, each in zip(plans, fixed, strict=True)
        ]
        guided_step(
            x,
            torch.cat(branches) if len(branches) > 1 else branches[0],
            table,
            step,
            guidance=(guidance,) if len(branches) > 1 else None,
            clip=clip,
            known=there,
            clean=given,
            noise=draw_noise(x.shape, generator, device=device, dtype=wide) if eta else None,
            out=x,
        )
        step += 1
        if progress:
            progress(done, total)
    return x.to(noise.dtype)


class Level(NamedTuple):
    """A pass of `slow_motion`: the clip is cut in pieces of `given` frames, each of which becomes a
    window of `frames`."""

    given: int
    frames: int

    def known(self) -> Tensor:
        """Where the given frames stand in the window, evenly from first to last: (1, frames)."""
        places = torch.linspace(0, self.frames - 1, self.given, dtype=torch.float64)
        known = torch.zeros(1, self.frames, dtype=torch.bool)
        known[0, places.round().long()] = True
        return known


def slow_motion(given: int, frames: int, window: int) -> list[Level]:
    """How `given` frames become `frames`, window by window, each level interpolating the last.

    A level whose clip is shorter than the window fills it; the next cuts what it made into pieces.
    The paper's example, 4 frames to 128 by windows of 32, is 4 -> 32, then four times 8 -> 32.

    Raises:
        ValueError: given is below 2; or `frames`, where it is over a window, is no whole multiple
            of it, or no such windows lead there.
    """
    if 2 <= given < frames <= window:
        return [Level(given, frames)]
    if given < 2 or frames % given or frames // given < 2:
        raise ValueError(
            f"frames must be a multiple of given, which is at least 2, got {frames} of {given}"
        )
    levels, rest, now = [], frames // given, given
    while rest > 1:
        # One window for the whole clip while it fits, then pieces of at least two frames.
        most = window // (now if 2 * now <= window else 2)
        cuts = [
            (factor, piece)
            for factor in range(2, most + 1)
            for piece in range(2, window // factor + 1)
            if rest % factor == 0 and now % piece == 0
        ]
        if not cuts:
            raise ValueError(
                f"frames must be reached by windows of {window}, and {now} frames can not become "
                f"{now * rest}; choose {given} times a number with small factors"
            )
        factor, piece = max(cuts)
        levels.append(Level(piece, piece * factor))
        rest, now = rest // factor, now * factor
    return levels
