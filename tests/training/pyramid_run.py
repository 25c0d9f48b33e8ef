"""A run of Pyramid Flow small enough to repeat: 16 x 16 pixels, 4 frames, three stages."""

from dataclasses import replace

from fastvid.models.pyramid_flow import PyramidFluxConfig
from fastvid.training.config import (
    CodecConfig,
    DataConfig,
    OptimConfig,
    PyramidConfig,
    RunConfig,
    TrainPyramid,
)

MODEL = PyramidFluxConfig(
    channels=12,
    patch=2,
    heads=2,
    head_width=16,
    joint_blocks=1,
    single_blocks=1,
    text_width=8,
    pooled_width=8,
    time_width=4,
    row_width=6,
    column_width=6,
)


def tiny_pyramid(clips, folder, *, model=MODEL, **changes):
    """A run of three steps; each change is a value of the first part that has one so named."""
    parts = {
        "run": RunConfig(
            folder=str(folder),
            steps=3,
            device="cpu",
            log_every=1,
            validate_every=0,
            validation_clips=3,
            sample_every=0,
            save_every=0,
        ),
        "data": DataConfig(train=str(clips), frames=4, size=(16, 16), validation_share=0.3),
        "codec": CodecConfig(kind="pixel", factor=2),
        "diffusion": PyramidConfig(steps=20),
        "optim": OptimConfig(batch=4, lr=1e-2, ema=0.0),
    }
    for name, value in changes.items():
        part = next(key for key, part in parts.items() if hasattr(part, name))
        parts[part] = replace(parts[part], **{name: value})
    return TrainPyramid(model=model, **parts)
