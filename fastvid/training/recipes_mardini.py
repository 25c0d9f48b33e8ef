"""The stages of MarDini's training, in order, at the published sizes and at those of a demo.

Stages, shares of given frames, frame rates, resolutions, clips seen, learning rate and batches at
9 frames are the paper's (arXiv:2410.20280, figure 4 and appendix). Not published, and taken from
its parent MAR: decay 0.02, betas (0.9, 0.95), average 0.9999, gradients clipped at 3. Not published
either, and guessed: 6000 steps of warm-up (its loss falls there), the noise schedule, one timestep
per clip, batches of 17 frames (about as many frames as at 9, fewer clips the more tokens each has).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

from fastvid.models.mardini_config import (
    MARDINI_L_ST,
    GeneratorConfig,
    MarDiniConfig,
    PlannerConfig,
)
from fastvid.training.config import (
    CodecConfig,
    DataConfig,
    DiffusionConfig,
    OptimConfig,
    RunConfig,
    StageConfig,
    TrainMarDini,
)


class Stage(NamedTuple):
    """What one stage has of its own."""

    trains: Literal["planner", "generator", "both"]
    ref_ratio: tuple[float, float]  # share of frames given
    frames: int
    fps: int
    side: int  # pixels
    attention: Literal["clip", "time"]  # between frames, in the generator
    clips: int  # seen, in millions
    batch: int


STAGES = {
    "planner": Stage("planner", (0.65, 1.0), 4, 8, 256, "clip", 200, 1024),
    "dm-a": Stage("generator", (0.45, 1.0), 4, 8, 256, "clip", 20, 1024),
    "dm-b": Stage("generator", (0.35, 1.0), 4, 4, 256, "clip", 80, 1024),
    "dm-c": Stage("generator", (0.35, 1.0), 9, 8, 256, "clip", 40, 1024),
    "joint": Stage("both", (0.35, 1.0), 9, 8, 256, "clip", 75, 1024),
    "512-st": Stage("both", (0.15, 0.6), 9, 8, 512, "clip", 40, 720),
    "17f-st": Stage("both", (0.06, 0.3), 17, 8, 512, "clip", 40, 384),
    "512-t": Stage("both", (0.06, 0.3), 17, 8, 512, "time", 40, 384),
    "768-t": Stage("both", (0.06, 0.3), 17, 8, 768, "time", 20, 192),
    "1024-t": Stage("both", (0.06, 0.3), 17, 8, 1024, "time", 5, 96),
}
_FILE_FPS = 24  # of the files, which are cut to `fps` by leaving frames out
_DIFFUSION = DiffusionConfig(
    schedule="scaled_linear",
    zero_snr=True,
    prediction="v",
    tasks={"arbitrary-interpolation": 1.0},
    drop=0.1,
)


def folder_of(name: str, root: str = "runs/mardini") -> str:
    """Where a stage's run lives: a name that sorts in the order of training."""
    return f"{root}/{list(STAGES).index(name):02d}-{name}"


def _before(name: str, root: str) -> str:
    """The run that a stage starts from; none before the first."""
    number = list(STAGES).index(name)
    return folder_of(list(STAGES)[number - 1], root) if number else ""


def stage_config(name: str) -> TrainMarDini:
    """MarDini-L in one of its stages, on a folder of videos of 24 frames per second."""
    stage = STAGES[name]
    attention = replace(MARDINI_L_ST.generator, attention=stage.attention)
    large = stage.side > 512
    return TrainMarDini(
        model=replace(MARDINI_L_ST, frames=max(stage.frames, 9), generator=attention),
        stage=StageConfig(trains=stage.trains),
        data=DataConfig(
            train="data/videos",
            frames=stage.frames,
            size=(stage.side, stage.side),
            stride=_FILE_FPS // stage.fps,
            workers=8,
        ),
        codec=CodecConfig(kind="diffusers", path="data/vae-f8-c16", scale=1.5305, shift=0.0609),
        diffusion=replace(_DIFFUSION, ref_ratio=stage.ref_ratio),
        optim=OptimConfig(
            batch=stage.batch,
            lr=1.4e-4,
            warmup=6000,
            betas=(0.9, 0.95),
            weight_decay=0.02,
            clip=3.0,
        ),
        run=RunConfig(
            folder=folder_of(name),
            init=_before(name, "runs/mardini"),
            steps=round(stage.clips * 1e6 / stage.batch),
            precision="bf16",
            checkpoint_blocks=24 if large or stage.frames > 9 else 0,
        ),
    )


class _Tiny(NamedTuple):
    """What a stage of the demo has in place of the published."""

    side: int
    steps: int
    batch: int


_TINY = {
    "planner": _Tiny(32, 300, 8),
    "dm-a": _Tiny(32, 100, 8),
    "dm-b": _Tiny(32, 100, 8),
    "dm-c": _Tiny(32, 200, 8),
    "joint": _Tiny(32, 700, 8),
    "512-st": _Tiny(64, 60, 4),
    "17f-st": _Tiny(64, 20, 2),
    "512-t": _Tiny(64, 100, 2),
    "768-t": _Tiny(96, 20, 2),
    "1024-t": _Tiny(128, 10, 2),
}


def demo_config(name: str) -> TrainMarDini:
    """A tiny MarDini in one of its stages, on the motion clips of `fastvid.data.synthetic`."""
    stage, tiny = STAGES[name], _TINY[name]
    return TrainMarDini(
        model=MarDiniConfig(
            channels=48,
            frames=max(stage.frames, 9),
            planner=PlannerConfig(dim=96, depth=4, mlp=192, heads=3, side=8, patch=2),
            # Wider than the 192 numbers of a token: at little noise a velocity is the noise itself,
            # which has to pass through.
            generator=GeneratorConfig(
                dim=256, depth=4, mlp=512, heads=8, patch=2, attention=stage.attention
            ),
        ),
        stage=StageConfig(trains=stage.trains),
        data=DataConfig(
            train="data/motion",
            frames=stage.frames,
            size=(tiny.side, tiny.side),
            stride=8 // stage.fps,
            hflip=True,
            cache=True,
        ),
        codec=CodecConfig(kind="pixel", factor=4),
        diffusion=replace(_DIFFUSION, ref_ratio=stage.ref_ratio),
        optim=OptimConfig(batch=tiny.batch, lr=2e-3, warmup=20, betas=(0.9, 0.99), ema=0.99),
        run=RunConfig(
            folder=folder_of(name, "runs/mardini-demo"),
            init=_before(name, "runs/mardini-demo"),
            steps=tiny.steps,
            log_every=20,
            validate_every=tiny.steps // 2,
            validation_clips=16,
            sample_every=tiny.steps,
            save_every=0,
        ),
    )


_WHAT = {
    "planner": "the planner alone",
    "generator": "the generator alone",
    "both": "both networks",
}


def _recipe(
    name: str, make: Callable[[str], TrainMarDini], of: str, expect: str
) -> Callable[[], TrainMarDini]:
    """A function like those of `recipes`: no arguments, and a docstring that tells what to know."""
    stage, config, number = STAGES[name], make(name), list(STAGES).index(name) + 1
    side, steps, batch = config.data.size[0], config.run.steps, config.optim.batch

    def recipe() -> TrainMarDini:
        return make(name)

    recipe.__doc__ = f"""{of}, stage {number} of {len(STAGES)}: {_WHAT[stage.trains]}, {side} px.

    Setting: {stage.frames} frames, {stage.ref_ratio[0]:.0%} to {stage.ref_ratio[1]:.0%} of them
        given, any; attention between frames over {
        "the clip" if stage.attention == "clip" else "time"
    }. Starts from the weights of the stage before, see run.init.
    Cost: {steps:,} steps of {batch} clips. {expect}
    """
    return recipe


_LARGE = """The paper trained on 256 H100s.
    Expect: no figure has been measured with this recipe; the paper's are of its own data."""
_SMALL = """Not timed as a whole; the joint stage is most of it.
    Expect: every part of the training at work; the model is too small for more than moving blurs.
    """

MARDINI = {f"mardini-{n}": _recipe(n, stage_config, "MarDini-L", _LARGE) for n in STAGES}
MARDINI_DEMO = {
    f"mardini-demo-{n}": _recipe(n, demo_config, "A tiny MarDini", _SMALL) for n in STAGES
}
