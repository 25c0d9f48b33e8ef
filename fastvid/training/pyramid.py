"""Pyramid Flow in training and sampling, without text; see `families.Family`.

Each clip of a step trains one stage, and predicts one of its frames from those before it: which
ones, its number in the run decides. Every step has the shares of `diffusion.sample_ratios`, and
steps go through all frames; clips whose high-resolution frame stands late are as many as those
whose low-resolution frame stands early.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvid.diffusion.pyramid import (
    ColumnDraws,
    PyramidSchedule,
    column_stages,
    history_plan,
    pyramid_schedule,
    training_column,
    unit_counts,
    unit_frames,
)
from fastvid.diffusion.pyramid_sampling import Text, sample_pyramid
from fastvid.diffusion.schedule import Schedule, Spacing, respace
from fastvid.functional import noise_pyramid
from fastvid.models.pyramid_columns import Column
from fastvid.models.pyramid_flow import PyramidFlux
from fastvid.training.build import model_folder
from fastvid.training.codec import Codec
from fastvid.training.config import PyramidConfig, TrainPyramid
from fastvid.training.draws import Draws, generator
from fastvid.training.sample import Sampler, SamplerOf

MODEL = PyramidFlux
SAMPLER = "euler"
# Those that give the first frames, or nothing; of `image-to-video` it is the first.
_TASKS = ("predict", "expand", "image-to-video", "unconditional")


def build_model(config: TrainPyramid) -> PyramidFlux:
    """A model with fresh weights, or with those of `run.init`: a run or model folder, or official
    weights."""
    if not config.run.init:
        return PyramidFlux(config.model)
    path = Path(config.run.init)
    model: Any
    try:
        folder = model_folder(path)
    except ValueError:
        model = PyramidFlux.from_official(path)
    else:
        model = PyramidFlux.from_pretrained(folder)
    if model.config != config.model:
        raise ValueError(f"weights in {path} are of {model.config}, the run wants {config.model}")
    return model


def low_size(model: PyramidFlux, size: tuple[int, int], factor: int) -> None:
    return None


def stages_of(config: PyramidConfig) -> PyramidSchedule:
    """The stages that a run trains."""
    return pyramid_schedule(
        len(config.sample_ratios), shift=config.shift, gamma=config.gamma, grid=config.steps
    )


def lesson(number: int, batch: int, frames: int, config: PyramidConfig) -> tuple[int, int]:
    """The stage a clip trains, and how many of its frames: the last is predicted from the others.

    A column is a run of clips in the batch, which ranks take in turn: each has as much of it as any
    other. The official groups of ranks are clips of a column here, each another clip.

    Args:
        number: of the clip in the run.
        batch: clips of a step; 0 takes one clip of each column after the other.
        frames: of a clip.
    """
    stages = column_stages(config.sample_ratios)
    batch, group = (batch, config.sync_group) if batch else (len(stages), 1)
    column, place = divmod(number % batch, batch // len(stages))
    turn = number // batch * group + place % group
    counts = unit_counts(0, turn, units=frames, sync_group=frames, stages=len(stages))
    highest = len(config.sample_ratios) - 1
    return stages[column], counts[-1 if stages[column] == highest else 0]


def losses(
    model: Any,
    clean: Tensor,
    low: Tensor | None,
    draws: Draws,
    schedule: Schedule,
    config: TrainPyramid,
) -> Tensor:
    """Mean square of the velocity of the predicted frame, all stages through one pass."""
    stages, frames = stages_of(config.diffusion), clean.shape[2]
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, number in enumerate(draws.numbers):
        groups[lesson(number, draws.batch, frames, config.diffusion)].append(i)
    strengths = torch.tensor(
        [
            torch.rand((), generator=generator(config.run.seed, "corruption", number)).item()
            for number in draws.numbers
        ]
    )
    columns, targets = [], []
    for (stage, units), at in groups.items():
        plan = history_plan(units - 1, stage)
        drawn = ColumnDraws(
            noise=_noise(draws.noise[at], unit_frames(units - 1), stage, stages),
            place=(draws.index[at] + 0.5) / stages.grid,
            corruption=config.diffusion.corrupt * strengths[at].to(clean.device),
            # Of other frames than the predicted one's, and so apart from it.
            history=tuple(
                _noise(draws.noise[at], range(clip.start, clip.stop), clip.stage, stages)
                for clip in plan
            ),
        )
        made = training_column(clean[at], stage, stages, drawn, units=units)
        text = _no_text(model, len(at), clean)
        columns.append(Column(made.latents, made.timestep, *text, made.history))
        targets.append(made.target)
    errors = [
        (velocity.float() - target.float()).square().flatten(1).mean(1)
        for velocity, target in zip(model.packed(columns), targets, strict=True)
    ]
    order = torch.tensor([i for at in groups.values() for i in at], device=clean.device)
    return torch.cat(errors)[order.argsort()]


def posterior_mean(
    model: Any,
    clean: Tensor,
    low: Tensor | None,
    draws: Draws,
    schedule: Schedule,
    config: TrainPyramid,
) -> tuple[Tensor, Tensor]:
    """By one step per stage and frame: the mean of the first frame made, given which the next."""
    return sample(model, clean, low, draws, respace(schedule, 1), config)


def sample(
    model: Any,
    clean: Tensor,
    low: Tensor | None,
    draws: Draws,
    schedule: Schedule,
    config: TrainPyramid,
) -> tuple[Tensor, Tensor]:
    """One sample; the stages share the steps of `schedule`."""
    seeds = [generator(config.run.seed, "jumps", number) for number in draws.numbers]
    make = _sampler(model, stages_of(config.diffusion))
    known = draws.known.flatten(2).all(2)
    return make(draws.noise, schedule, known=known, clean=clean, generator=seeds), clean


def sampling(model: PyramidFlux, task: str, frames: int, *, one_pass: bool) -> PyramidFlux:
    """Clips of any length: each frame sees all before it."""
    if task not in _TASKS:
        raise ValueError(
            f"task must be one of {', '.join(_TASKS)} for pyramid, which makes what follows the "
            f"first frames, got {task!r}"
        )
    return model


def sampler_of(
    model: PyramidFlux, codec: Codec, config: TrainPyramid, *, guidance: float | None = None
) -> tuple[SamplerOf, Spacing]:
    if guidance is not None:
        raise ValueError(
            f"guidance must be left out for pyramid, which is trained without text, got {guidance}"
        )
    make = _sampler(model, stages_of(config.diffusion))
    return lambda video, known: make, "linspace"


def _sampler(model: Any, stages: PyramidSchedule) -> Sampler:
    """Frames one after another, from the known first ones. Of the chain only its length counts,
    which the stages share: Euler's steps of each are alike."""

    def make(
        noise: Tensor,
        schedule: Schedule,
        *,
        known: Tensor,
        clean: Tensor,
        start: int = 0,
        eta: float = 0.0,
        generator: Any = None,
        progress: Any = None,
        **settings: Any,
    ) -> Tensor:
        if eta:
            raise ValueError(f"eta must be 0 for pyramid, whose steps add no noise, got {eta}")
        known = known if known.ndim == 2 else known.flatten(2).all(2)
        count = int(known[0].sum())
        if known[:, count:].any() or not known[:, :count].all():
            raise ValueError(
                "known must be the first frames for pyramid, as many in every clip, got "
                f"{known.int().tolist()}"
            )
        steps, seeds = len(schedule), [g.initial_seed() for g in generator]
        per_stage = -(-steps // len(stages))

        def tick(done: int, calls: int) -> None:
            """The chain's steps, of which each is several calls of the model."""
            for step in range((done - 1) * steps // calls, done * steps // calls):
                progress(step + 1, steps)

        return sample_pyramid(
            model,
            Text(*_no_text(model, len(noise), clean)),
            tuple(noise.shape[1:]),  # type: ignore[arg-type]
            stages,
            first_steps=per_stage,
            steps=per_stage,
            given=clean[:, :, :count] if count else None,
            seed=torch.tensor(seeds, device=noise.device),
            noise=noise,
            patch=model.config.patch,
            progress=tick if progress else None,
        )

    return make


def _noise(noise: Tensor, frames: range, stage: int, stages: PyramidSchedule) -> Tensor:
    """Of some frames (B, C, T, H, W), at the resolution of a stage."""
    return noise_pyramid(noise[:, :, frames.start : frames.stop], len(stages) - stage)[0]


def _no_text(model: Any, batch: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place of embeddings, their lengths (on the CPU, so that nothing waits) and pooled ones."""
    config = model.config
    return (
        like.new_zeros(batch, 1, config.text_width),
        torch.ones(batch, dtype=torch.int64),
        like.new_zeros(batch, config.pooled_width),
    )
