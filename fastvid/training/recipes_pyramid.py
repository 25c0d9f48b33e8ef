"""Runs of Pyramid Flow to start from: what one trains on a laptop."""

from __future__ import annotations

from fastvid.models.pyramid_flow import PyramidFluxConfig
from fastvid.training.config import (
    CodecConfig,
    DataConfig,
    OptimConfig,
    PyramidConfig,
    RunConfig,
    TrainConfig,
    TrainPyramid,
)


def pyramid_demo() -> TrainConfig:
    """A tiny Pyramid Flow that learns to continue moving shapes on two CPU cores.

    Setting: 8 frames of 32 x 32 pixels in three stages, 8, 16 and 32 pixels wide; each frame from
        those before it, the coarser the older. Latents are the pixels, tokens 4 x 4 of them.
        Shares of the stages, noise on the history and the limit of the loss are the published.
    Data: motion clips made by `fastvid.data.synthetic`; any folder of videos works.
    Cost: 1.3 M parameters; about ten minutes on one core (derived from 900 steps).
    Expect: a validation loss that falls to a sixth within 900 steps. Continuations are below
        repeating the last frame by then; a whole run has not been measured.
    """
    return TrainPyramid(
        model=PyramidFluxConfig(
            channels=3,
            patch=4,
            heads=3,
            head_width=32,
            joint_blocks=2,
            single_blocks=4,
            text_width=16,
            pooled_width=16,
            time_width=8,
            row_width=12,
            column_width=12,
        ),
        data=DataConfig(train="data/motion", frames=8, size=(32, 32), hflip=True, cache=True),
        codec=CodecConfig(kind="pixel", factor=1),
        diffusion=PyramidConfig(context=3),
        optim=OptimConfig(
            batch=8, lr=2e-3, warmup=100, betas=(0.9, 0.95), eps=1e-6, ema=0.998, skip_loss=2.0
        ),
        run=RunConfig(
            folder="runs/pyramid-demo",
            steps=3000,
            log_every=20,
            validate_every=500,
            validation_clips=48,
            sample_every=1000,
            save_every=1000,
        ),
    )


PYRAMID = {"pyramid-demo": pyramid_demo}
