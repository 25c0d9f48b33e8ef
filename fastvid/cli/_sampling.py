"""What the verbs that sample have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastvid.training.config import TrainConfig


def pick_device(name: str | None) -> str:
    """The device that was asked for, else CUDA where there is one."""
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def pick_task(config: TrainConfig, task: str, given: int | None) -> tuple[str, int | None]:
    """A task and its number of given frames, as asked for, else as trained, else the task's own.

    "image-to-video" starts from the first frame, not from any: an image has no other.
    """
    if given is not None:
        return task, given
    if task == "image-to-video":
        return "predict", 1
    return task, config.diffusion.given.get(task)


def latent_bound(config: TrainConfig) -> float | None:
    """Bound of |x0| while sampling: that of pixels; latents of an autoencoder have none."""
    return 1.0 if config.codec.kind == "pixel" else None


@contextmanager
def progress_bar(**settings: Any) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal, as the function of (done, all) that moves it."""
    from tqdm import tqdm

    with tqdm(disable=None, **settings) as bar:  # None: only on a terminal

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
