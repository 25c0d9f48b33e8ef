"""The objects that a config names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastvid.diffusion import schedule as schedules
from fastvid.training.config import DiffusionConfig, PyramidConfig


def build_schedule(config: DiffusionConfig | PyramidConfig) -> schedules.Schedule:
    """The chain that training draws its noise levels from.

    Of a pyramid only its length is looked at: the levels are those of `training.pyramid.stages_of`.
    """
    if isinstance(config, PyramidConfig):
        return schedules.squared_cosine(config.steps)
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


def model_folder(path: Path) -> Path:
    """The folder with weights that `path` means: itself, or the best or else last of a run.

    Raises:
        ValueError: there is none.
    """
    for folder in (path, path / "model" / "best", path / "model" / "last"):
        if (folder / "model.safetensors").is_file():
            return folder
    raise ValueError(f"{path} is neither a run with saved weights nor a model folder")
