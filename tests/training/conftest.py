"""A training run small enough to repeat: 16 x 16 pixels, 4 frames, a two-block VDT."""

from dataclasses import replace

import pytest
import torch

from fastvid.models.vdt import VDT, VDTConfig
from fastvid.training.config import (
    CodecConfig,
    DataConfig,
    DiffusionConfig,
    OptimConfig,
    RunConfig,
    TrainVDT,
)

MODEL = VDTConfig(
    channels=48,
    height=4,
    width=4,
    frames=4,
    patch=2,
    dim=16,
    depth=2,
    heads=2,
    class_dropout=0.5,  # draws from torch's own generator: a resume must restore it
    learned_variance=False,
)


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder of motion clips."""
    pytest.importorskip("av")
    from fastvid.data.synthetic import make_motion_clips

    folder = tmp_path_factory.mktemp("clips") / "motion"
    make_motion_clips(folder, clips=10, frames=8, size=16)
    return folder


@pytest.fixture
def awake(tmp_path):
    """A model folder without zero weights, so that every parameter has a gradient at once."""
    model = VDT(replace(MODEL, drop_labels=False))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(tmp_path / "awake")
    return str(tmp_path / "awake")


@pytest.fixture
def config(clips, tmp_path):
    """`config(steps=4, lr=1e-3)`: a tiny run; a value of the first part that has one so named."""

    def make(**changes):
        parts = {
            "run": RunConfig(
                folder=str(tmp_path / "run"),
                steps=4,
                device="cpu",
                log_every=3,
                validate_every=0,
                validation_clips=5,
                sample_every=0,
                save_every=0,
            ),
            "model": MODEL,
            "data": DataConfig(train=str(clips), frames=4, size=(16, 16), validation_share=0.3),
            "codec": CodecConfig(kind="pixel", factor=4),
            "diffusion": DiffusionConfig(
                schedule="squared_cosine",
                prediction="x0",
                tasks={"predict": 1, "complete": 1, "unconditional": 1},
            ),
            "optim": OptimConfig(batch=4, lr=1e-3, warmup=2, ema=0.9),
        }
        for name, value in changes.items():
            part = next(key for key, part in parts.items() if hasattr(part, name))
            parts[part] = replace(parts[part], **{name: value})
        return TrainVDT(**parts)

    return make


@pytest.fixture
def awakened():
    """`awakened(model)`: in eval mode, without its zero weights."""

    def redraw(model):
        torch.manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape))
        return model.eval()

    return redraw
