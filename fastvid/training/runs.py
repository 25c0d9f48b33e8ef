"""Run folders: what they hold, and how to load what they made.

config.yaml                every value of the run
log.jsonl, tb/             losses, validation and speed, as lines and for TensorBoard
checkpoints/step-00001000  training state, see checkpoint.py
model/last, model/best     averaged weights to share: config.json, model.safetensors, config.yaml
samples/step-00005000.png  contact sheets
lock                       held while a process trains here
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastvid.training.build import model_folder
from fastvid.training.checkpoint import CheckpointError, checkpoints
from fastvid.training.codec import Codec, build_codec
from fastvid.training.config import TrainConfig, read_config, write_config
from fastvid.training.families import family_of
from fastvid.training.interrupt import is_locked
from fastvid.training.log import read_log


def export(folder: Path, config: TrainConfig, weights: dict[str, Tensor]) -> None:
    """Write a model folder that `from_pretrained` and `load_run` read. Files appear whole.

    Raises:
        CheckpointError: it could not be written; the weights that were there still are.
    """
    with torch.device("meta"):
        model = family_of(config).MODEL(config.model)
    model.load_state_dict(weights, assign=True)
    try:
        model.save_pretrained(folder)
        write_config(config, folder / "config.yaml")
    except (OSError, SafetensorError) as error:
        nbytes = sum(value.nbytes for value in weights.values())
        raise CheckpointError(
            f"could not write {nbytes:,} bytes of weights to {folder}: {error}"
        ) from error


def load_run(folder: str | Path) -> tuple[Any, TrainConfig, Codec]:
    """The model of a run, in eval mode, with the run's config and codec.

    Args:
        folder: a run folder (its best weights, else its last) or one of its model folders.
    Raises:
        ValueError: it holds no weights, or no config.yaml tells how they were trained.
    """
    weights = model_folder(Path(folder))
    if not (weights / "config.yaml").is_file():
        raise ValueError(f"{weights} has no config.yaml: it was not made by `fastvid train`")
    config = read_config(weights / "config.yaml")
    model = family_of(config).MODEL.from_pretrained(weights)
    return model, config, build_codec(config.codec)


@dataclass(frozen=True)
class RunSummary:
    """One run at a glance; None where it has not got that far."""

    folder: Path
    state: str  # "training", "finished" or "stopped"
    step: int
    steps: int
    loss: float | None
    validation: float | None
    best_step: int | None
    nbytes: int  # on disk


def summarize(folder: Path) -> RunSummary:
    """Read a run folder without loading anything large.

    Raises:
        ValueError: it holds no run, or its config is damaged.
    """
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} holds no run: there is no config.yaml")
    config = read_config(folder / "config.yaml")
    lines = read_log(folder)
    losses = _of("train", lines)
    validations = _of("validation", lines)
    best = min(validations, key=lambda line: line["loss"], default=None)
    step = max([line["step"] for line in lines] + [*checkpoints(folder / "checkpoints")], default=0)
    done = "finished" if step >= config.run.steps else "stopped"
    return RunSummary(
        folder=folder,
        state="training" if is_locked(folder) else done,
        step=step,
        steps=config.run.steps,
        loss=losses[-1].get("loss") if losses else None,
        validation=validations[-1]["loss"] if validations else None,
        best_step=best["step"] if best else None,
        nbytes=sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
    )


def find_runs(folder: Path) -> list[Path]:
    """Run folders at or below `folder`, sorted; model folders inside a run are no runs.

    Raises:
        FileNotFoundError: no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    found = sorted(path.parent for path in folder.rglob("config.yaml"))
    return [path for path in found if path.parent.name != "model"]


def _of(kind: str, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["kind"] == kind]
