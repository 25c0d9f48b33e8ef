"""Complete configs to start from: `fastvid train NAME`, with any value overridden.

Costs marked (derived) are computed from FLOPs and an assumed rate, not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fastvid.diffusion.tasks import OFFICIAL_MIX
from fastvid.models.vdt import VDT_L, VDTConfig
from fastvid.training.config import (
    CodecConfig,
    DataConfig,
    DiffusionConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    TrainVDT,
)
from fastvid.training.recipes_mardini import MARDINI, MARDINI_DEMO
from fastvid.training.recipes_pyramid import PYRAMID


def vdt_demo() -> TrainConfig:
    """A tiny VDT that learns to predict and interpolate moving shapes on two CPU cores.

    Setting: 9 frames, 3 of them given to predict from, 0, 4 and 8 to interpolate between; all six
        tasks in one model. Tokens are 8 x 8 pixels: few enough that the steps are many.
    Data: 32 x 32 motion clips made by `fastvid.data.synthetic`; any folder of videos works.
    Cost: 1.6 M parameters; 6 to 9 minutes on two cores, under 1 GB of memory.
    Expect: shapes that keep their path; interpolation above linear blending, prediction above
        copying the last frame, by the one-step mean.
    """
    return TrainVDT(
        model=VDTConfig(
            channels=48,
            height=8,
            width=8,
            frames=9,
            patch=2,
            dim=96,
            depth=7,
            heads=3,
            class_dropout=0.0,
            learned_variance=False,
        ),
        data=DataConfig(train="data/motion", frames=9, size=(32, 32), hflip=True, cache=True),
        codec=CodecConfig(kind="pixel", factor=4),
        diffusion=DiffusionConfig(
            schedule="linear",
            zero_snr=True,  # the last step is pure noise, and half of all steps are close to it
            prediction="x0",
            tasks={
                "predict": 0.3,
                "interpolate": 0.4,
                "backward": 0.08,
                "image-to-video": 0.08,
                "complete": 0.08,
                "unconditional": 0.06,
            },
            given={"predict": 3, "backward": 3},
        ),
        optim=OptimConfig(batch=8, lr=2e-3, warmup=100, betas=(0.9, 0.99), ema=0.998),
        run=RunConfig(
            folder="runs/vdt-demo",
            steps=3000,
            log_every=20,
            validate_every=500,
            validation_clips=48,
            sample_every=1000,
            save_every=1000,
        ),
    )


def vdt_cityscapes() -> TrainConfig:
    """VDT-L/2 on Cityscapes sequences at 128 x 128, as in the reproduction Wektor607/VDT.

    Setting: 16 frames of which 8 are given, prediction and unconditional drawn alike, a chain of
        500 steps, AdamW at 1e-4 without decay, batch 16, latents of sd-vae-ft-mse from a local
        folder. Different on purpose: each clip draws its own task, the learning rate follows a
        cosine down to 0 (there it stays all but constant), gradients are clipped at norm 1, steps
        run in bfloat16 under autocast, and the weights are averaged (none of these there).
    Data: `leftImg8bit_sequence/train` and `/val` of Cityscapes, images of any size: 2975 training
        sequences of 30 frames.
    Cost: 860 M parameters; 13.8 GB for weights, gradients and Adam in fp32, 3.4 GB more for the
        average, and about 4 GB of activations per clip without `run.checkpoint_blocks` (derived
        from the published fit of 16 clips in 80 GB). A step is about 63 TFLOP (derived: 3 x 1.3
        TFLOP x 16 clips), so 36 k steps, the length of the original, are about 2.3 EFLOP: 3 days on
        one GPU that sustains 10 TFLOP/s, half a day at 50.
    Expect: the original reported FVD around 1600 with per-batch statistics and a length mismatch;
        no better figure has been measured with this recipe.
    """
    return TrainVDT(
        model=VDT_L,
        data=DataConfig(
            kind="cityscapes",
            train="data/cityscapes/leftImg8bit_sequence/train",
            validation="data/cityscapes/leftImg8bit_sequence/val",
            frames=16,
            size=(128, 128),
            workers=8,
        ),
        codec=CodecConfig(kind="diffusers", path="data/sd-vae-ft-mse"),
        diffusion=DiffusionConfig(
            schedule="linear",
            respacing="500",
            average="all",
            tasks={"predict": 1.0, "unconditional": 1.0},
            given={"predict": 8},
        ),
        optim=OptimConfig(batch=16, lr=1e-4),
        run=RunConfig(folder="runs/vdt-cityscapes", steps=36_000, precision="bf16"),
    )


def vdt_sky() -> TrainConfig:
    """VDT-L/2 on time-lapses of the sky at 256 x 256, one model for all tasks.

    Setting: 16 frames, the published mix of tasks, 1000 steps, AdamW at 1e-4, latents of
        sd-vae-ft-ema from a local folder. Encode once with `fastvid encode` and train with
        `data.kind: latents`: the autoencoder otherwise costs more than it needs to at every step.
    Cost: about 16 TFLOP per clip and step (derived: 3 x 5.3 TFLOP), four times `vdt-cityscapes`;
        set `run.checkpoint_blocks: 28` where memory is short, for a third more compute.
    Expect: the length of the published training is not stated; 200 k steps are a guess.
    """
    return TrainVDT(
        model=replace(VDT_L, height=32, width=32),
        data=DataConfig(train="data/sky/train", frames=16, size=(256, 256), workers=8),
        codec=CodecConfig(kind="diffusers", path="data/sd-vae-ft-ema"),
        diffusion=DiffusionConfig(schedule="linear", average="all", tasks=dict(OFFICIAL_MIX)),
        optim=OptimConfig(batch=16, lr=1e-4, warmup=1000),
        run=RunConfig(folder="runs/vdt-sky", steps=200_000, precision="bf16"),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "vdt-demo": vdt_demo,
    "vdt-cityscapes": vdt_cityscapes,
    "vdt-sky": vdt_sky,
    **MARDINI,
    **MARDINI_DEMO,
    **PYRAMID,
}

# Runs that follow each other, each from the weights of the one before: `fastvid train NAME`.
CHAINS = {"mardini": tuple(MARDINI), "mardini-demo": tuple(MARDINI_DEMO)}
