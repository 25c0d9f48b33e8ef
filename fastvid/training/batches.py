"""The sets of clips that a config names, and batches that go on where a run stopped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastvid.training.codec import Codec, shrink
from fastvid.training.config import DataConfig, TrainConfig
from fastvid.training.distributed import World
from fastvid.training.draws import generator
from fastvid.training.timeline import latent_frames

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """This rank's clips of one step: latents (B, C, T, H, W) on the device, those of the clips made
    smaller where the family plans, the number of each in the run's order, where each came from, and
    the sampler's state once they are trained on."""

    latents: Tensor
    low: Tensor | None
    numbers: list[int]
    paths: list[str]
    sampler: dict[str, int]


def open_sets(
    data: DataConfig, codec: Codec, seed: int, *, fixed: bool = False
) -> tuple[Dataset, Dataset | None]:
    """Training and validation sets; the second is None where nothing is held out.

    Args:
        fixed: clips of the training set too lie side by side instead of being drawn.

    Raises:
        ValueError: no folder is named, or a set does not fit.
        FileNotFoundError, RuntimeError: a folder is missing, or nothing in it can be read.
    """
    if not data.train:
        raise ValueError("data.train must name a folder of clips")
    if data.kind == "latents":
        return _latents(data, codec)
    return (_clips if data.kind == "clips" else _frames)(data, seed, fixed)


def batches(
    dataset: Dataset,
    config: TrainConfig,
    codec: Codec,
    world: World,
    sampler_state: dict[str, int],
    low_size: tuple[int, int] | None = None,
) -> Iterator[Batch]:
    """Batches without end, from where `sampler_state` says ({} is the start).

    `low_size` is the height and width in pixels of the clips that `Batch.low` is made of.

    The clips of a step, taken over all ranks, are the same for every world size.
    """
    from fastvid.data.sampler import ResumableSampler

    size = len(dataset)  # type: ignore[arg-type]
    sampler = ResumableSampler(size, seed=config.run.seed, rank=world.rank, world=world.size)
    if sampler_state:
        sampler.load_state_dict(sampler_state)
    share = config.optim.batch // world.size
    loader = DataLoader(
        dataset,
        batch_size=share,
        sampler=sampler,
        num_workers=config.data.workers,
        persistent_workers=config.data.workers > 0,
        pin_memory=world.device.type == "cuda",
        # Its own generator: the loader must not move the one that dropout draws from.
        generator=torch.Generator(),
    )
    for items in loader:
        first = sampler.epoch * size + sampler.seen + world.rank
        numbers = [first + i * world.size for i in range(share)]
        sampler.advance(config.optim.batch)
        given = (items, numbers, codec, world, config.run.seed, "train")
        latents, low = to_latents(*given), to_low(*given, low_size)
        yield Batch(latents, low, numbers, items["path"], sampler.state_dict())


def to_latents(
    items: dict[str, Any], numbers: Sequence[int], codec: Codec, world: World, seed: int, kind: str
) -> Tensor:
    """Collated items as latents on the device; the codec's own draws belong to each number."""
    if "latents" in items:
        return items["latents"].to(world.device, torch.float32, non_blocking=True)
    video = items["video"].to(world.device, non_blocking=True)
    generators = [generator(seed, kind, "codec", number) for number in numbers]
    return codec.encode(video, generators=generators)


def to_low(
    items: dict[str, Any],
    numbers: Sequence[int],
    codec: Codec,
    world: World,
    seed: int,
    kind: str,
    size: tuple[int, int] | None,
) -> Tensor | None:
    """As `to_latents`, of clips made as small as `size` says, in pixels; None for no such size."""
    if size is None:
        return None
    video = shrink(items["video"].to(world.device, non_blocking=True), size)
    return codec.encode(video, generators=[generator(seed, kind, "low", n) for n in numbers])


def _clips(data: DataConfig, seed: int, fixed: bool) -> tuple[Dataset, Dataset | None]:
    from fastvid.data.clips import ClipDataset
    from fastvid.data.video import find_videos

    train, held = _split(data, find_videos, lambda path: path)
    same = {**_cut(data), "cache": data.cache}
    return (
        ClipDataset(train, windows="grid", **same)
        if fixed
        else ClipDataset(train, seed=seed, hflip=data.hflip, **same),
        ClipDataset(held, windows="grid", **same) if held else None,
    )


def _frames(data: DataConfig, seed: int, fixed: bool) -> tuple[Dataset, Dataset | None]:
    from fastvid.data.frames import FrameFolderDataset, cityscapes_sequences, frame_folders

    find: Callable[[str], list[Any]]
    if data.kind == "cityscapes":  # a drive, of which several clips may be: city_sequence
        find, name = cityscapes_sequences, lambda s: s[0].with_name(s[0].name.rsplit("_", 2)[0])
    else:  # a name in the folder, for the folder may be data.train itself
        find, name = frame_folders, lambda s: s[0].with_name("frames")
    train, held = _split(data, find, name)
    same = _cut(data)
    return (
        FrameFolderDataset(train, windows="grid", **same)
        if fixed
        else FrameFolderDataset(train, seed=seed, hflip=data.hflip, **same),
        FrameFolderDataset(held, windows="grid", **same) if held else None,
    )


def _cut(data: DataConfig) -> dict[str, Any]:
    """How any kind of dataset cuts its clips."""
    return {"frames": data.frames, "size": data.size, "stride": data.stride, "fit": data.fit}


def _split(
    data: DataConfig, find: Callable[[str], list[Any]], name: Callable[[Any], Path]
) -> tuple[list[Any], list[Any]]:
    """Sources to train on and to hold out; those of one name, a path, stay together."""
    from fastvid.data.split import split_files

    train = find(data.train)
    if data.validation:
        return train, find(data.validation)
    names = [name(source) for source in train]
    _, taken = split_files(
        list(dict.fromkeys(names)), data.validation_share, data.split_seed, root=data.train
    )
    if data.validation_share and not taken:
        log.warning("data.validation_share holds nothing out: %s is all there is", names[0])
    held = set(taken)
    return (
        [source for source, at in zip(train, names, strict=True) if at not in held],
        [source for source, at in zip(train, names, strict=True) if at in held],
    )


def _latents(data: DataConfig, codec: Codec) -> tuple[Dataset, Dataset | None]:
    from fastvid.data.latents import LatentDataset

    train = LatentDataset(data.train, codec=codec.identity)
    held = LatentDataset(data.validation, codec=codec.identity) if data.validation else None
    C, T, H, W = train[0]["latents"].shape
    frames = latent_frames(data.frames, codec.time_factor, "data.frames")
    wanted = (codec.channels, frames, *(side // codec.factor for side in data.size))
    if wanted != (C, T, H, W):
        raise ValueError(f"data.train holds latents (C, T, H, W) = {(C, T, H, W)}, needs {wanted}")
    return train, held
