"""Stages of MarDini small enough to repeat: 16 x 16 pixels, 4 frames."""

from dataclasses import replace

from fastvid.models.mardini_config import GeneratorConfig, MarDiniConfig, PlannerConfig
from fastvid.training.config import (
    DataConfig,
    DiffusionConfig,
    OptimConfig,
    RunConfig,
    StageConfig,
    TrainMarDini,
)

DIFFUSION = DiffusionConfig(
    schedule="scaled_linear",
    steps=20,
    zero_snr=True,
    prediction="v",
    tasks={"arbitrary-interpolation": 1.0},
    ref_ratio=(0.35, 1.0),
    drop=0.1,
)
MODEL = MarDiniConfig(
    channels=48,
    frames=4,
    planner=PlannerConfig(dim=32, depth=1, mlp=32, heads=2, side=2),
    generator=GeneratorConfig(dim=32, depth=2, mlp=32, heads=2, attention="clip"),
)


def tiny_stage(clips, folder, trains="both", *, planner="", model=MODEL, **changes):
    """A stage of three steps; each change is a value of the first part that has one so named."""
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
        "diffusion": DIFFUSION,
        "optim": OptimConfig(batch=4, lr=1e-2, ema=0.0),
    }
    for name, value in changes.items():
        part = next(key for key, part in parts.items() if hasattr(part, name))
        parts[part] = replace(parts[part], **{name: value})
    stage = StageConfig(trains=trains, planner=planner)
    return TrainMarDini(model=model, stage=stage, **parts)
