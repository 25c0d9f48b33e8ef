"""Before the first step: build what a config names, and refuse what does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from fastvid.diffusion.schedule import Schedule
from fastvid.training import checkpoint
from fastvid.training.batches import open_sets
from fastvid.training.build import build_schedule
from fastvid.training.codec import Codec, build_codec
from fastvid.training.config import TrainConfig, read_config, write_config
from fastvid.training.distributed import World, on_first, total
from fastvid.training.families import Family, family_of
from fastvid.training.interrupt import locked
from fastvid.training.log import Log, writing
from fastvid.training.state import TrainState, load, new_state, seed_everything


@dataclass(frozen=True)
class Run:
    """What stays the same while a run goes on."""

    config: TrainConfig
    family: Family
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
    on_first(world, lambda: _check_folder(folder, config, resume))  # refuses before long work
    family = family_of(config)
    schedule = build_schedule(config.diffusion)
    codec = build_codec(config.codec).to(world.device)
    config.check_latents(codec.channels, codec.factor)
    train, held_out = open_sets(config.data, codec, config.run.seed)

    torch.manual_seed(config.run.seed)  # first weights are the same on every rank
    state = new_state(config, family.build_model(config), world)
    seed_everything(config.run.seed, world)
    with ExitStack() as stack:

        def enter() -> Path | None:
            stack.enter_context(locked(folder))
            _check_folder(folder, config, resume)  # again: another process may have come first
            return _newest(folder) if resume else None

        start = on_first(world, enter)
        # Only rank 0 looked; step 0 is never saved, so 0 says there is none.
        step = int(total([_step(start)], world).item())
        if step > config.run.steps:
            raise ValueError(
                f"run.steps must be at least {step}, where {folder} stands, got {config.run.steps}"
            )
        if step:
            load(state, folder / "checkpoints" / f"step-{step:08d}", config.run.seed)

        def open_log(enabled: bool = True) -> Log:
            size, steps = config.optim.batch, config.run.steps
            return Log(folder, step=state.step, steps=steps, samples=size, enabled=enabled)

        def begin() -> Log:
            with writing(folder / "config.yaml"):
                write_config(config, folder / "config.yaml")
            return open_log()

        log = on_first(world, begin) or open_log(enabled=False)
        stack.callback(log.close)
        if step:
            log.say(f"continuing {folder} at step {step}")
        _say_skipped(log, train, held_out)
        stack.callback(_say_skipped, log, train, held_out)  # damage is also met on the way
        yield Run(config, family, folder, codec, schedule, train, held_out, log), state


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
    """Refuse to train over another run, or to resume as another run than it was."""
    saved = folder / "config.yaml"
    if not saved.exists():
        return
    if not resume:
        raise ValueError(
            f"{folder} holds a run: continue it with --resume, or choose another run.folder"
        )
    before, now = _lasting(read_config(saved)), _lasting(config)
    for name, value in now.items():
        if before[name] != value:
            raise ValueError(
                f"{name} was {before[name]!r} in {folder}, got {value!r}: a run goes on with what "
                "it began with; undo the change, or choose another run.folder"
            )


def _lasting(config: TrainConfig) -> dict[str, Any]:
    """What no resume may change: the model, and which clips and draws every step takes."""
    values = {
        f"{part}.{name}": value
        for part in ("model", "data", "codec", "diffusion", "stage")
        if hasattr(config, part)
        for name, value in vars(getattr(config, part)).items()
        if (part, name) not in {("data", "workers"), ("data", "cache")}  # speed alone
    }
    return values | {
        "family": config.family,
        "run.seed": config.run.seed,
        "optim.batch": config.optim.batch,
        "optim.ema": "on" if config.optim.ema else "off",
    }


def _newest(folder: Path) -> Path | None:
    found = checkpoint.checkpoints(folder / "checkpoints")
    newest = checkpoint.latest(folder / "checkpoints")
    if found and newest is None:
        checkpoint.verify(list(found.values())[-1])  # raises, and says what is wrong
    return newest


def _step(path: Path | None) -> int:
    return int(path.name.removeprefix("step-")) if path else 0
