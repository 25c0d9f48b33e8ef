"""Training and validation clips out of video files.

What an item holds is decided by (seed, epoch, index) alone, not by a worker's history: a run
resumes with nothing but the place of its sampler, and any number of workers reads the same clips.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .video import Fit, VideoError, find_videos, probe, read_clip

log = logging.getLogger(__name__)

MAX_CACHE = 4 * 2**30  # bytes of decoded frames
_TRIES = 8  # files tried for one item before giving up


@dataclass(frozen=True)
class Report:
    """What became of the files: `bad` could not be read, `short` hold too few frames."""

    files: int
    bad: dict[str, str]  # path: why
    short: dict[str, int]  # path: its frames

    def __str__(self) -> str:
        lines = [f"{self.files} files, {len(self.bad)} bad, {len(self.short)} too short"]
        lines += [f"bad: {path}: {reason}" for path, reason in self.bad.items()]
        lines += [f"too short: {path}: {frames} frames" for path, frames in self.short.items()]
        return "\n".join(lines)


class ClipDataset(torch.utils.data.Dataset):
    """Windows of video files as `{"video": (3, T, H, W), "path": str, "start": int}`.

    `video` is float32 in [-1, 1], `start` the number of its first frame in the file. An index is an
    int, which means epoch 0, or the `(epoch, index)` that `ResumableSampler` gives.

    With `windows="random"` an epoch takes one random window of every file (`repeat` of them); with
    `"grid"` the windows lie side by side from frame 0 on and every epoch is the same: validation.

    A file that cannot be read is skipped, counted and named in `report`; its turn goes to another
    file, chosen by (seed, epoch, index) again. Damage that shows only while decoding is found when
    it is met, by whichever worker, and counted for all of them.

    Args:
        source: a folder (searched to its depths) or the files themselves.
        frames: T, frames per clip.
        size: (H, W) in pixels, fitted as `video.resize` says.
        stride: distance between two frames of a clip, in frames of the file.
        windows: "random" or "grid".
        repeat: random windows per file and epoch.
        seed: of starts and flips.
        hflip: mirror half of the clips, by chance.
        fit: "crop" or "letterbox".
        max_bad: share of bad files at which to stop; a single one is always tolerated.
        cache: decode every file once and keep it, for small sets only. Reading then costs nothing,
            and a file with any damage at all counts as bad.
    Raises:
        FileNotFoundError: the folder is missing or holds no video.
        RuntimeError: too many files are bad, or none is long enough: the message names them.
        ValueError: an argument makes no sense.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        frames: int,
        size: tuple[int, int],
        stride: int = 1,
        windows: Literal["random", "grid"] = "random",
        repeat: int = 1,
        seed: int = 0,
        hflip: bool = False,
        fit: Fit = "crop",
        max_bad: float = 0.1,
        cache: bool = False,
    ):
        if min(frames, stride, repeat, *size) < 1 or seed < 0:
            raise ValueError(
                "frames, stride, repeat and size must be >= 1, seed >= 0, got "
                f"frames={frames}, stride={stride}, repeat={repeat}, size={size}, seed={seed}"
            )
        if windows not in ("random", "grid"):
            raise ValueError(f'windows must be "random" or "grid", got {windows!r}')
        self.frames, self.size, self.stride = frames, (size[0], size[1]), stride
        self.windows, self.repeat, self.seed, self.hflip = windows, repeat, seed, hflip
        self.fit: Fit = fit
        self.max_bad = max_bad
        self._span = (frames - 1) * stride + 1  # frames of the file that a clip covers

        if isinstance(source, (str, os.PathLike)):
            paths, self._from = find_videos(source), str(source)
        else:
            paths, self._from = [Path(p) for p in source], "the list of files"
        if not paths:
            raise ValueError("source is an empty list of files")
        self._files = len(paths)
        self._bad: dict[str, str] = {}
        self._short: dict[str, int] = {}
        self._cached: dict[str, Tensor] = {}
        self.paths: list[str] = []
        self._lengths: list[int] = []
        for path in map(str, paths):
            self._admit(path, cache)
        # Told to all workers through shared memory: which files broke while being read.
        self._broken = torch.zeros(len(self.paths), dtype=torch.bool).share_memory_()
        self._expect_enough()
        self._grid = [
            (i, start)
            for i, length in enumerate(self._lengths)
            for start in range(0, length - self._span + 1, self._span)
        ]

    @property
    def report(self) -> Report:
        """What was skipped so far, by this process and by its workers."""
        met = {
            self.paths[int(i)]: "broke while it was read" for i in self._broken.nonzero().flatten()
        }
        return Report(self._files, met | self._bad, dict(self._short))

    def __len__(self) -> int:
        return len(self._grid) if self.windows == "grid" else len(self.paths) * self.repeat

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = index if isinstance(index, tuple) else (0, index)
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        for attempt in range(_TRIES):
            # The draw depends on the attempt, not on what is known to be bad: the same anywhere.
            rng = np.random.default_rng([self.seed, epoch, index, attempt])
            file, start = self._place(index, attempt, rng)
            try:
                clip = self._read(file, start)
            except VideoError as error:
                self._blame(file, error)
                continue
            if self.hflip and rng.random() < 0.5:
                clip = clip.flip(-1)
            video = clip.transpose(0, 1).float().div_(127.5).sub_(1)
            return {"video": video.contiguous(), "path": self.paths[file], "start": start}
        raise RuntimeError(f"{_TRIES} files in a row cannot be read\n{self.report}")

    def _place(self, index: int, attempt: int, rng: np.random.Generator) -> tuple[int, int]:
        """Which file, and the first frame in it."""
        if self.windows == "grid":
            return self._grid[index if attempt == 0 else int(rng.integers(len(self._grid)))]
        file = index % len(self.paths) if attempt == 0 else int(rng.integers(len(self.paths)))
        return file, int(rng.integers(self._lengths[file] - self._span + 1))

    def _read(self, file: int, start: int) -> Tensor:
        path = self.paths[file]
        if path in self._cached:
            return self._cached[path][start : start + self._span : self.stride]
        return read_clip(path, start, self.frames, stride=self.stride, size=self.size, fit=self.fit)

    def _admit(self, path: str, cache: bool) -> None:
        """Look at a file: keep it, or write down why not."""
        try:
            info = probe(path)
            if info.cut:
                raise VideoError(path, "ends before its header says: it seems cut")
            if info.frames < self._span:
                self._short[path] = info.frames
                log.warning("skipping %s: %d frames of %d", path, info.frames, self._span)
                return
            if cache:
                held = sum(clip.nbytes for clip in self._cached.values())
                if held + info.frames * 3 * self.size[0] * self.size[1] > MAX_CACHE:
                    raise ValueError(f"cache would pass {MAX_CACHE >> 30} GiB: leave it off")
                self._cached[path] = read_clip(path, size=self.size, fit=self.fit)
        except VideoError as error:
            self._bad[path] = error.reason
            log.warning("skipping %s", error)
            return
        self.paths.append(path)
        self._lengths.append(info.frames)

    def _blame(self, file: int, error: VideoError) -> None:
        """Count and name a file that broke while it was read, once."""
        if not self._broken[file]:
            self._broken[file] = True
            log.warning("skipping %s", error)
            self._expect_enough()

    def _expect_enough(self) -> None:
        report = self.report
        if not self.paths:
            need = f"a clip needs {self._span} frames ({self.frames} at stride {self.stride})"
            raise RuntimeError(f"no clip can be read from {self._from}: {need}\n{report}")
        if len(report.bad) > max(1, int(self.max_bad * self._files)):
            raise RuntimeError(
                f"too many files of {self._from} are bad, over {self.max_bad:.0%}\n{report}"
            )
