"""Training and validation clips out of video files."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

from .video import Fit, VideoError, find_videos, probe, read_clip
from .windows import How, WindowDataset

MAX_CACHE = 4 * 2**30  # bytes of decoded frames


class ClipDataset(WindowDataset):
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
        windows: How = "random",
        repeat: int = 1,
        seed: int = 0,
        hflip: bool = False,
        fit: Fit = "crop",
        max_bad: float = 0.1,
        cache: bool = False,
    ):
        paths: Sequence[str | os.PathLike[str]]
        if isinstance(source, (str, os.PathLike)):
            paths, place = find_videos(source), str(source)
        else:
            paths, place = source, "the list of files"
        self._cached: dict[str, Tensor] | None = {} if cache else None
        super().__init__(
            [str(path) for path in paths],
            place,
            "files",
            frames=frames,
            size=size,
            stride=stride,
            windows=windows,
            repeat=repeat,
            seed=seed,
            hflip=hflip,
            fit=fit,
            max_bad=max_bad,
        )

    def _name(self, source: str) -> str:
        return source

    def _length(self, source: str) -> int:
        info = probe(source)
        if info.cut:
            raise VideoError(source, "ends before its header says: it seems cut")
        if self._cached is not None and info.frames >= self._span:
            held = sum(clip.nbytes for clip in self._cached.values())
            if held + info.frames * 3 * self.size[0] * self.size[1] > MAX_CACHE:
                raise ValueError(f"cache would pass {MAX_CACHE >> 30} GiB: leave it off")
            self._cached[source] = read_clip(source, size=self.size, fit=self.fit)
        return info.frames

    def _read(self, source: str, start: int) -> Tensor:
        if self._cached is not None:
            return self._cached[source][start : start + self._span : self.stride]
        return read_clip(
            source, start, self.frames, stride=self.stride, size=self.size, fit=self.fit
        )
