"""Windows of clips out of sources, files or folders of images, of which some may be broken.

What an item holds is decided by (seed, epoch, index) alone, not by a worker's history: a run
resumes with nothing but the place of its sampler, and any number of workers reads the same clips.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .video import Fit, VideoError

log = logging.getLogger(__name__)

How = Literal["random", "grid"]


@dataclass(frozen=True)
class Report:
    """What became of the sources: `bad` could not be read, `short` hold too few frames."""

    total: int
    bad: dict[str, str]  # path: why
    short: dict[str, int]  # path: its frames
    noun: str = "files"

    def __str__(self) -> str:
        lines = [f"{self.total} {self.noun}, {len(self.bad)} bad, {len(self.short)} too short"]
        lines += [f"bad: {path}: {reason}" for path, reason in self.bad.items()]
        lines += [f"too short: {path}: {frames} frames" for path, frames in self.short.items()]
        return "\n".join(lines)


class WindowDataset(torch.utils.data.Dataset):
    """What `ClipDataset` and `FrameFolderDataset` share; they say how a source is read.

    A subclass has `_name`, `_length` and `_read`. The last two raise `VideoError` for a source that
    is broken. It is then skipped, counted and named in `report`, and its turn goes to another.

    Args:
        sources: all there are, good or bad.
        place: where they come from, for messages.
        noun: what they are, for messages.
        frames, size, stride, windows, repeat, seed, hflip, max_bad: as in `ClipDataset`.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        place: str,
        noun: str,
        *,
        frames: int,
        size: tuple[int, int],
        stride: int,
        windows: How,
        seed: int,
        hflip: bool,
        fit: Fit,
        max_bad: float,
        repeat: int = 1,
    ):
        if min(frames, stride, repeat, *size) < 1 or seed < 0:
            raise ValueError(
                "frames, stride, repeat and size must be >= 1, seed >= 0, got "
                f"frames={frames}, stride={stride}, repeat={repeat}, size={size}, seed={seed}"
            )
        if windows not in ("random", "grid"):
            raise ValueError(f'windows must be "random" or "grid", got {windows!r}')
        if not sources:
            raise ValueError(f"source is an empty list of {noun}")
        self.frames, self.size, self.stride = frames, (size[0], size[1]), stride
        self.windows, self.repeat, self.seed, self.hflip = windows, repeat, seed, hflip
        self.fit, self.max_bad = fit, max_bad
        self._place, self._noun, self._total = place, noun, len(sources)
        self._span = (frames - 1) * stride + 1  # frames of the source that a clip covers
        self._bad: dict[str, str] = {}
        self._short: dict[str, int] = {}
        self._lengths: list[int] = []
        self.sources = [source for source in sources if self._admit(source)]
        # Told to all workers through shared memory: which sources broke while being read.
        self._broken = torch.zeros(len(self.sources), dtype=torch.bool).share_memory_()
        self._expect_enough()
        self._grid = [
            (number, start)
            for number, length in enumerate(self._lengths)
            for start in range(0, length - self._span + 1, self._span)
        ]

    @property
    def report(self) -> Report:
        """What was skipped so far, by this process and by its workers."""
        broken = (self.sources[int(i)] for i in self._broken.nonzero().flatten())
        met = {self._name(source): "broke while it was read" for source in broken}
        return Report(self._total, met | self._bad, dict(self._short), self._noun)

    def __len__(self) -> int:
        return len(self._grid) if self.windows == "grid" else len(self.sources) * self.repeat

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = index if isinstance(index, tuple) else (0, index)
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        for number, start, flip in self._turns(epoch, index):
            source = self.sources[number]
            try:
                clip = self._read(source, start)
            except VideoError as error:
                self._blame(number, error)
                continue
            video = (clip.flip(-1) if flip else clip).transpose(0, 1).float().div_(127.5).sub_(1)
            return {"video": video.contiguous(), "path": self._name(source), "start": start}
        raise RuntimeError(f"none of the {self._noun} gave clip {index}\n{self.report}")

    def _name(self, source: Any) -> str:
        """The path that items and reports know it by."""
        raise NotImplementedError

    def _length(self, source: Any) -> int:
        """Frames of a source."""
        raise NotImplementedError

    def _read(self, source: Any, start: int) -> Tensor:
        """The clip that begins at a frame: (T, 3, H, W) uint8."""
        raise NotImplementedError

    def _turns(self, epoch: int, index: int) -> Iterator[tuple[int, int, bool]]:
        """The window of an index as (source, start, flip); if it breaks, one of each other source.

        They are drawn without a look at what is known to be bad: the same in every worker.
        """
        rng = np.random.default_rng([self.seed, epoch, index])
        if self.windows == "grid":
            own, start = self._grid[index]
        else:
            own = index % len(self.sources)
            start = self._start(own, rng)
        yield own, start, self.hflip and rng.random() < 0.5
        for other in map(int, rng.permutation(len(self.sources))):
            if other != own:
                yield other, self._start(other, rng), self.hflip and rng.random() < 0.5

    def _start(self, number: int, rng: np.random.Generator) -> int:
        length = self._lengths[number]
        if self.windows == "grid":
            return self._span * int(rng.integers(length // self._span))
        return int(rng.integers(length - self._span + 1))

    def _admit(self, source: Any) -> bool:
        """Look at a source: note its length, or write down why it is left out."""
        name = self._name(source)
        try:
            length = self._length(source)
        except VideoError as error:
            self._bad[name] = error.reason
            log.warning("skipping %s", error)
            return False
        if length < self._span:
            self._short[name] = length
            log.warning("skipping %s: %d frames of %d", name, length, self._span)
            return False
        self._lengths.append(length)
        return True

    def _blame(self, number: int, error: VideoError) -> None:
        """Count and name a source that broke while it was read, once."""
        if not self._broken[number]:
            self._broken[number] = True
            log.warning("skipping %s", error)
            self._expect_enough()

    def _expect_enough(self) -> None:
        report = self.report
        if not self.sources:
            need = f"a clip needs {self._span} frames ({self.frames} at stride {self.stride})"
            raise RuntimeError(f"no clip can be read from {self._place}: {need}\n{report}")
        if len(report.bad) > max(1, int(self.max_bad * self._total)):
            raise RuntimeError(
                f"too many {self._noun} of {self._place} are bad, over {self.max_bad:.0%}\n{report}"
            )
