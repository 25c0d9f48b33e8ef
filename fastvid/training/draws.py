"""Randomness of a sample: timestep, task and noise, decided by the seed and the sample's number.

Nothing depends on the batch a sample lands in, on the rank that computes it or on the device, so a
run draws the same on any number of processes and after a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastvid.diffusion.tasks import draw_task, task_known
from fastvid.training.config import DiffusionConfig, PyramidConfig


@dataclass(frozen=True)
class Draws:
    """For B samples: `index` (B,) into the schedule, `noise` (B, C, T, H, W), `known`
    (B, T, H, W), `dropped` (B,) where the condition is left out, the name of each sample's task,
    its number in the run's order or the validation's, and how many samples a step has; 0 where
    there are no steps."""

    index: Tensor
    noise: Tensor
    known: Tensor
    dropped: Tensor
    tasks: tuple[str, ...]
    numbers: tuple[int, ...] = ()
    batch: int = 0

    def to(self, device: torch.device) -> Draws:
        index, noise, known = self.index.to(device), self.noise.to(device), self.known.to(device)
        dropped = self.dropped.to(device)
        return replace(self, index=index, noise=noise, known=known, dropped=dropped)


def generator(seed: int, *name: str | int) -> torch.Generator:
    """A CPU generator of its own for every name under a seed."""
    digest = hashlib.blake2b(repr((seed, *name)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw(
    generators: Sequence[torch.Generator],
    shape: tuple[int, int, int, int],
    steps: int,
    diffusion: DiffusionConfig | PyramidConfig,
    *,
    numbers: Sequence[int] = (),
    batch: int = 0,
) -> Draws:
    """Training's draws, one sample per generator.

    Args:
        shape: (C, T, H, W) of the latents.
        steps: length of the schedule.
        diffusion: its `tasks`, `given`, `ref_ratio` and `drop`.
        numbers, batch: see `Draws`.
    """
    _, T, H, W = shape
    samples = []
    for g in generators:
        index = torch.randint(steps, (1,), generator=g)
        given = diffusion.given | _any_frames(diffusion.ref_ratio, T, g)
        name, known = draw_task(diffusion.tasks, T, H, W, given=given, generator=g)
        noise = torch.randn(shape, generator=g)
        dropped = torch.rand(1, generator=g) < diffusion.drop
        samples.append((index, noise, _cells(known, H, W), dropped, name))
    return replace(_stack(samples), numbers=tuple(numbers), batch=batch)


def draw_validation(
    numbers: Sequence[int],
    count: int,
    shape: tuple[int, int, int, int],
    steps: int,
    diffusion: DiffusionConfig | PyramidConfig,
    *,
    seed: int,
) -> Draws:
    """Validation's draws for clips `numbers` of `count`: the same in every validation of a run.

    Timesteps are spread evenly over the schedule and tasks dealt out in turn, so that two
    validations differ by the model alone.
    """
    _, T, H, W = shape
    names = [name for name, weight in diffusion.tasks.items() if weight > 0]
    samples = []
    for number in numbers:
        g = generator(seed, "validation", number)
        index = torch.tensor([(2 * number + 1) * steps // (2 * count)])
        name = names[number % len(names)]
        given = diffusion.given | _any_frames(diffusion.ref_ratio, T, g)
        known = task_known(name, T, H, W, given=given.get(name), generator=g)
        noise = torch.randn(shape, generator=g)
        samples.append((index, noise, _cells(known, H, W), torch.tensor([False]), name))
    return replace(_stack(samples), numbers=tuple(numbers))


def _any_frames(ratio: tuple[float, float], frames: int, g: torch.Generator) -> dict[str, int]:
    """How many frames, any of them, are given where their share is drawn; empty where it is not."""
    low, high = ratio
    if not high:
        return {}
    share = low + (high - low) * torch.rand((), generator=g, dtype=torch.float64).item()
    return {"arbitrary-interpolation": min(max(round(share * frames), 1), frames - 1)}


def _cells(known: Tensor, H: int, W: int) -> Tensor:
    """(1, T) or (1, T, H, W) -> (T, H, W), so that samples of different tasks share a batch."""
    known = known[0]
    return known[:, None, None].expand(-1, H, W) if known.ndim == 1 else known


def _stack(samples: list[tuple[Tensor, Tensor, Tensor, Tensor, str]]) -> Draws:
    index, noise, known, dropped, tasks = zip(*samples, strict=True)
    return Draws(
        torch.cat(index), torch.stack(noise), torch.stack(known), torch.cat(dropped), tuple(tasks)
    )
