"""A look at the model while it trains: held-out clips, sampled, as one contact sheet."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from torch.utils.data import Dataset

from fastvid.diffusion.schedule import Schedule, respace
from fastvid.training.codec import Codec
from fastvid.training.config import TrainConfig
from fastvid.training.distributed import World
from fastvid.training.families import family_of
from fastvid.training.log import writing
from fastvid.training.sheets import Row, save_contact_sheet
from fastvid.training.timeline import known_in_video
from fastvid.training.validate import fixed_clips

_CLIPS, _STEPS = 4, 25  # clips on a sheet, steps of the sampler


def save_preview(
    path: Path,
    model: nn.Module,
    dataset: Dataset,
    codec: Codec,
    schedule: Schedule,
    config: TrainConfig,
    world: World,
) -> None:
    """Write a sheet with two lines per clip: what was filmed, and what the model makes of the given
    frames, one task after another. Every rank computes it (FSDP waits for all), rank 0 writes."""
    count = min(max(_CLIPS, sum(w > 0 for w in config.diffusion.tasks.values())), len(dataset))  # type: ignore[arg-type]
    short = respace(schedule, min(_STEPS, len(schedule)), spacing="trailing")
    fixed = fixed_clips(
        model, dataset, list(range(count)), count, codec, len(schedule), config, world
    )
    draws = fixed.draws
    with world.autocast(config.run.precision):
        made, truth = family_of(config).sample(model, *fixed, short, config)
    if not world.first:
        return
    rows = []
    given = known_in_video(draws.known.cpu(), codec.time_factor)
    for task, known, filmed, drawn in zip(
        draws.tasks, given, codec.decode(truth), codec.decode(made), strict=True
    ):
        rows += [Row("clip", filmed.cpu()), Row(task, drawn.cpu(), known)]
    title = f"{path.stem}, {len(short)} steps"
    with writing(path):
        save_contact_sheet(path, rows, title=title)
