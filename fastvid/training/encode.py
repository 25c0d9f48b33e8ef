"""Encode the clips of a config once, resumably."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from torch.utils.data import DataLoader, Dataset

from fastvid.data.latents import LatentDataset, LatentWriter
from fastvid.data.windows import Report
from fastvid.training.batches import open_sets, to_latents
from fastvid.training.codec import Codec, build_codec
from fastvid.training.config import TrainConfig
from fastvid.training.distributed import World, join

_PART = 256  # clips that an interruption can cost at most


def encode_sets(config: TrainConfig, out: str | Path) -> dict[str, tuple[int, Report]]:
    """Write `out/train` and, where clips are held out, `out/validation` as latent folders.

    Returns:
        by set: number of clips, and what became of its files, those skipped named with the reason.
    Raises:
        FileExistsError: a set is there already.
        ValueError: the config's clips are latents, or too few frames.
    """
    if config.data.kind == "latents":
        raise ValueError("data.kind must be clips or frames, got latents: they are encoded already")
    done = {}
    with join(config.run.device) as world:
        if world.size > 1:
            raise ValueError("encode runs in one process: start it without torchrun")
        codec = build_codec(config.codec).to(world.device)
        train, held_out = open_sets(config.data, codec, config.run.seed, fixed=True)
        for name, dataset in {"train": train, "validation": held_out}.items():
            if dataset is None:
                continue
            folder = Path(out) / name
            if folder.exists():
                raise FileExistsError(f"{folder} exists: choose another --out")
            count = _encode(dataset, folder, name, codec, config, world)
            done[name] = count, dataset.report  # type: ignore[attr-defined]
    return done


def _encode(
    dataset: Dataset, folder: Path, name: str, codec: Codec, config: TrainConfig, world: World
) -> int:
    from tqdm import tqdm

    size = len(dataset)  # type: ignore[arg-type]
    key = json.dumps([asdict(config.data), config.run.seed, codec.identity, size], sort_keys=True)
    parts = folder.with_name(f".{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    for first in tqdm(range(0, size, _PART), desc=name, unit="part", disable=size <= _PART):
        part = parts / f"{first:08d}"
        if part.exists():
            continue
        numbers = range(first, min(first + _PART, size))
        batch = config.optim.batch // config.optim.accumulate
        loader = DataLoader(dataset, batch, sampler=numbers, num_workers=config.data.workers)
        with LatentWriter(part, codec.identity) as writer:
            for i, items in enumerate(loader):
                mine = numbers[i * batch : (i + 1) * batch]
                latents = to_latents(items, mine, codec, world, config.run.seed, f"encode {name}")
                for clip, path, start in zip(latents, items["path"], items["start"], strict=True):
                    writer.add(clip, path=path, start=int(start))
    written = set()
    with LatentWriter(folder, codec.identity) as writer:
        for part in sorted(parts.glob("[!.]*")):  # hidden: what a killed process left
            for item in LatentDataset(part, codec=codec.identity):  # type: ignore[attr-defined]
                # A file that broke while it was read had its turn given to another clip.
                if (clip := (item["path"], item["start"])) not in written:
                    written.add(clip)
                    writer.add(item["latents"], path=item["path"], start=item["start"])
    shutil.rmtree(parts)
    return len(written)
