"""Randomness of a sample: timestep, task and noise, decided by the seed and the sample's number.

Nothing depends on the batch a sample lands in, on the rank that computes it or on the device, so a
run draws the same on any number of processes and after a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvid.diffusion.tasks import draw_task, task_known


@dataclass(frozen=True)
class Draws:
    """For B samples: `index` (B,) into the schedule, `noise` (B, C, T, H, W), `known`
    (B, T, H, W), and the name of each sample's task."""

    index: Tensor
    noise: Tensor
    known: Tensor
    tasks: tuple[str, ...]

    def to(self, device: torch.device) -> Draws:
        index, noise, known = self.index.to(device), self.noise.to(device), self.known.to(device)
        return Draws(index, noise, known, self.tasks)


def generator(seed: int, *name: str | int) -> torch.Generator:
    """A CPU generator of its own for every name under a seed."""
    digest = hashlib.blake2b(repr((seed, *name)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw(
    generators: Sequence[torch.Generator],
    shape: tuple[int, int, int, int],
    steps: int,
    *,
    tasks: dict[str, float],
    given: dict[str, int],
) -> Draws:
    """Training's draws, one sample per generator.

    Args:
        shape: (C, T, H, W) of the latents.
        steps: length of the schedule.
        tasks: weight of each task; each sample draws its own.
        given: number of given frames by task, where it is not the task's own.
    """
    _, T, H, W = shape
    samples = []
    for g in generators:
        index = torch.randint(steps, (1,), generator=g)
        name, known = draw_task(tasks, T, H, W, given=given, generator=g)
        samples.append((index, torch.randn(shape, generator=g), _cells(known, H, W), name))
    return _stack(samples)


def draw_validation(
    numbers: Sequence[int],
    count: int,
    shape: tuple[int, int, int, int],
    steps: int,
    *,
    seed: int,
    tasks: dict[str, float],
    given: dict[str, int],
) -> Draws:
    """Validation's draws for clips `numbers` of `count`: the same in every validation of a run.

    Timesteps are spread evenly over the schedule and tasks dealt out in turn, so that two
    validations differ by the model alone.
    """
    _, T, H, W = shape
    names = [name for name, weight in tasks.items() if weight > 0]
    samples = []
    for number in numbers:
        g = generator(seed, "validation", number)
        index = torch.tensor([(2 * number + 1) * steps // (2 * count)])
        name = names[number % len(names)]
        known = task_known(name, T, H, W, given=given.get(name), generator=g)
        samples.append((index, torch.randn(shape, generator=g), _cells(known, H, W), name))
    return _stack(samples)


def _cells(known: Tensor, H: int, W: int) -> Tensor:
    """(1, T) or (1, T, H, W) -> (T, H, W), so that samples of different tasks share a batch."""
    known = known[0]
    return known[:, None, None].expand(-1, H, W) if known.ndim == 1 else known


def _stack(samples: list[tuple[Tensor, Tensor, Tensor, str]]) -> Draws:
    index, noise, known, tasks = zip(*samples, strict=True)
    return Draws(torch.cat(index), torch.stack(noise), torch.stack(known), tuple(tasks))
