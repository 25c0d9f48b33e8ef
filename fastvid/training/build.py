"""The objects that a config names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastvid.diffusion import schedule as schedules
from fastvid.models.vdt import VDT
from fastvid.training.config import DiffusionConfig, TrainConfig


def build_schedule(config: DiffusionConfig) -> schedules.Schedule:
    """The chain that training draws its noise levels from."""
    makers: dict[str, Callable[[int], schedules.Schedule]] = {
        "linear": schedules.linear,
        "scaled_linear": schedules.scaled_linear,
        "squared_cosine": schedules.squared_cosine,
    }
    schedule = makers[config.schedule](config.steps)
    if config.respacing:
        schedule = schedules.respace(schedule, config.respacing)
    # Last: "ddim50" and its like leave the last step out, and with it the zero.
    return schedules.rescale_zero_terminal_snr(schedule) if config.zero_snr else schedule


def build_model(config: TrainConfig) -> VDT:
    """A model with fresh weights, or with those of `run.init`.

    `run.init` is a run folder, a folder of `save_pretrained`, or an official checkpoint file. An
    image model, of a folder or a file, starts the spatial half of a video model (the paper's
    two-stage training).

    Raises:
        ValueError: there are no such weights, or they belong to another architecture.
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


def model_folder(path: Path) -> Path:
    """The folder with weights that `path` means: itself, or the best or else last of a run.

    Raises:
        ValueError: there is none.
    """
    for folder in (path, path / "model" / "best", path / "model" / "last"):
        if (folder / "model.safetensors").is_file():
            return folder
    raise ValueError(f"{path} is neither a run with saved weights nor a model folder")
