"""Validation: loss and a quick PSNR on held-out clips, with noise and tasks that never change."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from fastvid.diffusion.schedule import Schedule
from fastvid.metrics import psnr
from fastvid.training.batches import to_latents, to_low
from fastvid.training.codec import Codec
from fastvid.training.config import TrainConfig
from fastvid.training.distributed import World, total
from fastvid.training.draws import Draws, draw_validation
from fastvid.training.evaluate import to_unit
from fastvid.training.families import family_of
from fastvid.training.timeline import known_in_video


@torch.no_grad()
def validate(
    model: nn.Module,
    dataset: Dataset,
    codec: Codec,
    schedule: Schedule,
    config: TrainConfig,
    world: World,
) -> dict[str, float]:
    """`loss`, and `psnr/<task>` of the one-step mean against the decoded clip, generated frames
    only, in dB. The clips are shared out over the ranks; every rank gets the same answer."""
    family = family_of(config)
    count = min(config.run.validation_clips, len(dataset))  # type: ignore[arg-type]
    share = max(1, config.optim.batch // world.size // config.optim.accumulate)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for first in range(0, count, share * world.size):
        # Every rank runs the model equally often (FSDP waits for all): the last clip fills up.
        mine = range(first + world.rank, first + share * world.size, world.size)
        numbers = [min(number, count - 1) for number in mine]
        fixed = fixed_clips(model, dataset, numbers, count, codec, len(schedule), config, world)
        with world.autocast(config.run.precision):
            losses = family.losses(model, *fixed, schedule, config)
            mean, truth = family.posterior_mean(model, *fixed, schedule, config)
        scores = psnr(to_unit(codec.decode(mean)), to_unit(codec.decode(truth)))  # (B, T)
        draws = fixed.draws
        generated = ~known_in_video(draws.known, codec.time_factor).flatten(2).all(2)
        for i, number in enumerate(mine):
            if number < count:
                for name, value in (
                    ("loss", losses[i]),
                    (f"psnr/{draws.tasks[i]}", scores[i][generated[i]].mean()),
                ):
                    sums[name][0] += value.item()
                    sums[name][1] += 1
    names = ["loss", *(f"psnr/{n}" for n, weight in config.diffusion.tasks.items() if weight > 0)]
    shared = total([n for name in names for n in sums[name]], world).reshape(-1, 2)
    return {name: (s / n).item() for name, (s, n) in zip(names, shared, strict=True) if n}


class FixedClips(NamedTuple):
    """Held-out clips as latents, at the planning resolution too where there is one, with draws."""

    clean: Tensor
    low: Tensor | None
    draws: Draws


def fixed_clips(
    model: nn.Module,
    dataset: Dataset,
    numbers: list[int],
    count: int,
    codec: Codec,
    steps: int,
    config: TrainConfig,
    world: World,
) -> FixedClips:
    """Held-out clips `numbers` of `count`, spread over the set."""
    size = len(dataset)  # type: ignore[arg-type]
    items = default_collate([dataset[number * size // count] for number in numbers])
    given = (items, numbers, codec, world, config.run.seed, "validation")
    low_size = family_of(config).low_size(model, config.data.size, codec.factor)
    clean, low = to_latents(*given), to_low(*given, low_size)
    draws = draw_validation(
        numbers,
        count,
        tuple(clean.shape[1:]),  # type: ignore[arg-type]
        steps,
        config.diffusion,
        seed=config.run.seed,
    )
    return FixedClips(clean, low, draws.to(world.device))
