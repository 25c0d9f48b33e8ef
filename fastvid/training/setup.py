"""Before the first step: build what a config names, and refuse what does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from fastvid.diffusion.schedule import Schedule
from fastvid.training import checkpoint
from fastvid.training.batches import open_sets
from fastvid.training.build import build_model, build_schedule
from fastvid.training.codec import Codec, build_codec
from fastvid.training.config import TrainConfig, check_latents, read_config, write_config
from fastvid.training.distributed import World, on_first, total
from fastvid.training.interrupt import locked
from fastvid.training.log import Log
from fastvid.training.state import TrainState, load, new_state, seed_everything


@dataclass(frozen=True)
class Run:
    """What stays the same while a run goes on."""

    config: TrainConfig
    folder: Path
    codec: Codec
    schedule: Schedule
    train: Dataset
    held_out: Dataset | None
    log: Log


@contextmanager
def prepared(config: TrainConfig, world: World, resume: bool) -> Iterator[tuple[Run, TrainState]]:
    """A run ready for its next step, with its folder locked and its log open."""
    _check_world(config, world)
    folder = Path(config.run.folder)
    on_first(world, lambda: _check_folder(folder, config, resume))
    schedule = build_schedule(config.diffusion)
    codec = build_codec(config.codec).to(world.device)
    check_latents(config, codec.channels, codec.factor)
    train, held_out = open_sets(config.data, codec, config.run.seed)

    torch.manual_seed(config.run.seed)  # first weights are the same on every rank
    state = new_state(config, build_model(config), world)
    seed_everything(config.run.seed, world)
    with locked(folder, enabled=world.first):
        start = on_first(world, lambda: _newest(folder) if resume else None)
        # Only rank 0 looked; step 0 is never saved, so 0 says there is none.
        step = int(total([_step(start)], world).item())
        if step:
            load(state, folder / "checkpoints" / f"step-{step:08d}", config.run.seed)
        if world.first:
            write_config(config, folder / "config.yaml")
        log = Log(
            folder,
            step=state.step,
            steps=config.run.steps,
            samples=config.optim.batch,
            enabled=world.first,
        )
        try:
            if step:
                log.say(f"continuing {folder} at step {step}")
            _say_skipped(log, train, held_out)
            yield Run(config, folder, codec, schedule, train, held_out, log), state
        finally:
            _say_skipped(log, train, held_out)  # once more: damage is also met on the way
            log.close()


def _say_skipped(log: Log, train: Dataset, held_out: Dataset | None) -> None:
    """Count the sources of clips, and name those left out; latents have none."""
    for name, dataset in {"training": train, "held out": held_out}.items():
        if report := getattr(dataset, "report", None):
            log.say(f"{name}: {report}")


def _check_world(config: TrainConfig, world: World) -> None:
    parts = world.size * config.optim.accumulate
    if config.optim.batch % parts:
        raise ValueError(
            f"optim.batch must be a multiple of processes x accumulate = {world.size} x "
            f"{config.optim.accumulate}, got {config.optim.batch}"
        )


def _check_folder(folder: Path, config: TrainConfig, resume: bool) -> None:
    """Refuse to train over another run, or to resume as another model."""
    saved = folder / "config.yaml"
    if not saved.exists():
        return
    if not resume:
        raise ValueError(
            f"{folder} holds a run: continue it with --resume, or choose another run.folder"
        )
    before = read_config(saved)
    for part in ("model", "codec", "diffusion"):
        old, new = getattr(before, part), getattr(config, part)
        changed = [name for name in vars(old) if getattr(old, name) != getattr(new, name)]
        if changed:
            raise ValueError(
                f"{part}.{changed[0]} was {getattr(old, changed[0])!r} in {folder}, got "
                f"{getattr(new, changed[0])!r}: a run goes on with what it began with"
            )


def _newest(folder: Path) -> Path | None:
    found = checkpoint.checkpoints(folder / "checkpoints")
    newest = checkpoint.latest(folder / "checkpoints")
    if found and newest is None:
        checkpoint.verify(list(found.values())[-1])  # raises, and says what is wrong
    return newest


def _step(path: Path | None) -> int:
    return int(path.name.removeprefix("step-")) if path else 0
