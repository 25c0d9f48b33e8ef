"""VDT in training; see `families.Family`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from fastvid.diffusion.losses import diffusion_loss
from fastvid.diffusion.sampling import one_step_x0, sample_ddim
from fastvid.diffusion.schedule import Schedule, Spacing
from fastvid.models.vdt import VDT
from fastvid.training.build import model_folder
from fastvid.training.codec import Codec
from fastvid.training.config import TrainVDT
from fastvid.training.draws import Draws
from fastvid.training.sample import with_frames

MODEL = VDT
SAMPLER = "ddim"


def build_model(config: TrainVDT) -> VDT:
    """A model with fresh weights, or with those of `run.init`.

    `run.init` is a run folder, a folder of `save_pretrained`, or an official checkpoint file. An
    image model, of a folder or a file, starts the spatial half of a video model (the paper's
    two-stage training).
    """
    if not config.run.init:
        return VDT(config.model)
    path, target = Path(config.run.init), config.model
    if path.is_file():
        model = VDT.from_official(
            path, heads=target.heads, height=target.height, width=target.width
        )
        if model.config.mode == target.mode:
            own = model.to_official_state_dict()
            model = VDT.from_official(own, config=model.config, frames=target.frames)
    else:
        model = VDT.from_pretrained(model_folder(path))
    if model.config.mode == "image" and target.mode == "video":
        model = VDT.from_image(model, frames=target.frames)
    # Training alone reads these two; weights fit whatever they are.
    dropout = model.config.class_dropout and (config.model.class_dropout or 0.1)
    found = replace(model.config, drop_labels=config.model.drop_labels, class_dropout=dropout)
    if found != config.model:
        raise ValueError(f"weights in {path} are of {model.config}, the run wants {config.model}")
    model.config = config.model
    return model


def low_size(model: VDT, size: tuple[int, int], factor: int) -> None:
    return None


def losses(
    model: nn.Module,
    clean: Tensor,
    low: Tensor | None,
    draws: Draws,
    schedule: Schedule,
    config: TrainVDT,
) -> Tensor:
    return diffusion_loss(
        model,
        clean,
        draws.index,
        draws.noise,
        schedule,
        known=draws.known,
        prediction=config.diffusion.prediction,
        average=config.diffusion.average,
        variational=config.diffusion.variational,
    )["loss"]


def posterior_mean(
    model: nn.Module,
    clean: Tensor,
    low: Tensor | None,
    draws: Draws,
    schedule: Schedule,
    config: TrainVDT,
) -> tuple[Tensor, Tensor]:
    mean = one_step_x0(
        model,
        draws.noise,
        schedule,
        known=draws.known,
        clean=clean,
        prediction=config.diffusion.prediction,
    )
    return mean, clean


def sample(
    model: nn.Module,
    clean: Tensor,
    low: Tensor | None,
    draws: Draws,
    schedule: Schedule,
    config: TrainVDT,
) -> tuple[Tensor, Tensor]:
    made = sample_ddim(
        model,
        draws.noise,
        schedule,
        known=draws.known,
        clean=clean,
        prediction=config.diffusion.prediction,
    )
    return made, clean


def sampling(model: VDT, task: str, frames: int, *, one_pass: bool) -> VDT:
    longer = one_pass and frames > model.config.frames
    return (with_frames(model, frames) if longer else model).fold()


def sampler_of(
    model: VDT, codec: Codec, config: TrainVDT, *, guidance: float | None = None
) -> tuple[None, Spacing]:
    if guidance is not None:
        raise ValueError(f"guidance must be left out for vdt, which has none, got {guidance}")
    return None, "linspace"
