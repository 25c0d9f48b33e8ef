"""What a run carries from step to step: model, optimiser, averaged weights, randomness."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvid.modules.hub import HubModel
from fastvid.training.checkpoint import load_state, save_state
from fastvid.training.config import OptimConfig, TrainConfig, config_hash
from fastvid.training.distributed import World, shard, whole
from fastvid.training.draws import generator

_PLAIN = ("step", "sampler", "left_out", "left_out_in_row", "window", "best")  # kept as JSON


@dataclass
class TrainState:
    """The living objects of a run. `ema` follows the order of the trainable parameters."""

    model: nn.Module
    optimizer: torch.optim.AdamW
    ema: list[Tensor]
    world: World
    step: int = 0  # optimiser steps done, those left out included
    sampler: dict[str, int] = field(default_factory=dict)
    left_out: int = 0  # updates left out because of NaN or infinity
    left_out_in_row: int = 0
    window: dict[str, float] = field(default_factory=dict)  # sums since the last line of the log
    best: dict[str, Any] = field(default_factory=dict)  # step and loss of the best validation

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def note(self, **numbers: float) -> None:
        """Add the numbers of an updated step to what the next line of the log averages."""
        self.left_out_in_row = 0
        for name, value in (*numbers.items(), ("steps", 1)):
            self.window[name] = self.window.get(name, 0) + value

    def means(self) -> dict[str, float]:
        """Means over the window, which starts anew; empty if no step was updated."""
        window, self.window = self.window, {}
        steps = window.pop("steps", 1)
        return {name: value / steps for name, value in window.items()}


def new_state(config: TrainConfig, model: HubModel, world: World) -> TrainState:
    """Move `model` to its device, split it over the world and give it an optimiser."""
    model.checkpoint_blocks = config.run.checkpoint_blocks
    shard(model.to(world.device).train(), world)
    if config.run.compile:
        model.compile()
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.optim.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, config.optim.lr, betas=config.optim.betas, eps=config.optim.eps, fused=True
    )
    for p in trainable:  # now, not at the first step: a checkpoint needs somewhere to load to
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=world.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    ema = [p.detach().clone() for p in trainable] if config.optim.ema else []
    return TrainState(model, optimizer, ema, world)


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """Linear warm-up to `lr`, then a cosine that reaches `lr_end` after `steps`."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    progress = min(1.0, (step - optim.warmup) / max(1, steps - optim.warmup))
    return optim.lr_end + (optim.lr - optim.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))


def update(state: TrainState, lr: float, ema: float) -> None:
    """One optimiser step, then the average follows."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    if state.ema:
        # A fixed decay would keep the random first weights for thousands of steps.
        decay = min(ema, (1 + state.step) / (10 + state.step))
        with torch.no_grad():
            torch._foreach_lerp_(state.ema, list(state.trainable.values()), 1 - decay)


@contextmanager
def averaged(state: TrainState) -> Iterator[nn.Module]:
    """The model in eval mode with its averaged weights; both come back as they were."""
    _swap(state)
    state.model.eval()
    try:
        yield state.model
    finally:
        if state.world.mesh is not None:  # without a backward FSDP leaves the root put together
            state.model.reshard()  # type: ignore[operator]
        _swap(state)
        state.model.train()


@torch.no_grad()
def _swap(state: TrainState) -> None:
    # Contents are exchanged, not tensors: FSDP keeps hold of its own storage.
    for p, average in zip(state.trainable.values(), state.ema, strict=bool(state.ema)):
        kept = p.clone()
        p.copy_(average)
        average.copy_(kept)


def save(state: TrainState, folder: Path, config: TrainConfig) -> Path:
    """Write a checkpoint of everything under `folder`; see `save_state`."""
    values = {name: getattr(state, name) for name in _PLAIN}
    return save_state(
        folder,
        state.step,
        _tensors(state) | _random_states(state.world),
        values,
        world=state.world,
        config_hash=config_hash(config),
    )


def load(state: TrainState, path: Path, seed: int) -> None:
    """Continue from a checkpoint that `latest` has found sound, in place; see `load_state`."""
    # Ranks that did not exist when it was saved keep these fresh random states.
    step = int(path.name.removeprefix("step-"))
    seed_everything(seed, state.world, step)
    random = _random_states(state.world)
    values = load_state(
        path, _tensors(state) | random, optional=random, world=state.world, verified=True
    )
    torch.set_rng_state(random[f"random.cpu.{state.world.rank}"])
    if state.world.device.type == "cuda":
        torch.cuda.set_rng_state(random[f"random.cuda.{state.world.rank}"])
    for name in _PLAIN:
        setattr(state, name, values[name])


def seed_everything(seed: int, world: World, step: int = 0) -> None:
    """Seed torch's own generators, which only dropout draws from, differently on every rank."""
    torch.manual_seed(generator(seed, "global", step, world.rank).initial_seed())


def full_weights(state: TrainState) -> dict[str, Tensor]:
    """Averaged weights (plain ones without EMA), whole, on the CPU; empty beyond rank 0."""
    weights: dict[str, Any] = dict(state.model.state_dict())
    if state.ema:
        weights |= dict(zip(state.trainable, state.ema, strict=True))
    gathered = {}
    for name, value in weights.items():
        value = whole(value.detach())  # a collective: every rank takes part
        if state.world.first:
            gathered[name] = value.cpu()
    return gathered


def _tensors(state: TrainState) -> dict[str, Tensor]:
    tensors = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    for name, p in state.trainable.items():
        tensors |= {f"optim.{name}.{key}": v for key, v in state.optimizer.state[p].items()}
    if state.ema:
        tensors |= {f"ema.{n}": v for n, v in zip(state.trainable, state.ema, strict=True)}
    return tensors


def _random_states(world: World) -> dict[str, Tensor]:
    states = {f"random.cpu.{world.rank}": torch.get_rng_state()}
    if world.device.type == "cuda":
        states[f"random.cuda.{world.rank}"] = torch.cuda.get_rng_state()
    return states
