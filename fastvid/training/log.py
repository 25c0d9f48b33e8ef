"""What a run says about itself: log.jsonl, TensorBoard, a progress bar. Rank 0 alone speaks."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastvid.data.atomic import whole

_log = logging.getLogger(__name__)


class LogError(RuntimeError):
    """A file that tells of the run could not be written; what was saved is untouched."""


class Log:
    """Lines of `log.jsonl`, the same numbers in TensorBoard (where installed), and a bar.

    On a resume, lines past the checkpoint are dropped, so that the file reads as one run.
    """

    def __init__(self, folder: Path, *, step: int, steps: int, samples: int, enabled: bool = True):
        self.enabled = enabled
        self.samples = samples  # per step
        self.step = step
        self.started = time.perf_counter()
        if not enabled:
            return
        from tqdm import tqdm

        self.path, self.events = folder / "log.jsonl", folder / "tb"
        with writing(self.path):
            _drop_after(self.path, step)
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        with writing(self.events):
            self.board = _board(self.events, step)
        self.bar = tqdm(
            total=steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def steps(self, step: int, **numbers: float) -> None:
        """Means over the steps since the last call, with speed and memory. Steps count from 1."""
        now = time.perf_counter()
        speed = self.samples * (step - self.step) / max(now - self.started, 1e-9)
        self.started, self.step = now, step
        self.numbers("train", step, **numbers, samples_per_s=speed, peak_gb=peak_memory() / 1e9)
        if self.enabled:
            shown = {name: f"{value:.4g}" for name, value in numbers.items()}
            self.bar.set_postfix(shown | {"samples/s": f"{speed:.3g}"})

    def numbers(self, kind: str, step: int, **numbers: float) -> None:
        self.line(kind, step, **numbers)
        if self.enabled and self.board:
            with writing(self.events):
                for name, value in numbers.items():
                    self.board.add_scalar(f"{kind}/{name}", value, step)

    def line(self, kind: str, step: int, **values: Any) -> None:
        if self.enabled:
            with writing(self.path):
                self.file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
                self.file.flush()

    def say(self, text: str) -> None:
        if self.enabled:
            self.bar.write(text, file=sys.stderr)

    def image(self, name: str, step: int, path: Path) -> None:
        """Show a PNG in TensorBoard."""
        if self.enabled and self.board:
            import numpy as np
            from PIL import Image

            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            with writing(self.events):
                self.board.add_image(name, pixels, step, dataformats="HWC")

    def advance(self) -> None:
        if self.enabled:
            self.bar.update()

    def close(self) -> None:
        if self.enabled:
            self.bar.close()
            with writing(self.path):
                self.file.close()
            if self.board:
                with writing(self.events):
                    self.board.close()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name `path` where the file system refuses: its own message names no file when a disk is full.

    Raises:
        LogError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise LogError(
            f"could not write {path}: {error}; make room, then go on from the last checkpoint"
        ) from error


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line cut short by a crash is left out.

    Any other damaged line is left out with a warning.
    """
    path = folder / "log.jsonl"
    if not path.is_file():
        return []
    lines = []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            if number < len(texts):
                _log.warning("%s: line %d is damaged and left out", path, number)
    return lines


def peak_memory() -> int:
    """Bytes: of the device where CUDA is in use, else of the process, at their highest."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _drop_after(path: Path, step: int) -> None:
    lines = [line for line in read_log(path.parent) if line["step"] <= step]
    if path.exists():
        with whole(path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=step + 1)
