"""What a run says about itself: log.jsonl, TensorBoard, a progress bar. Rank 0 alone speaks."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch


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

        self.path = folder / "log.jsonl"
        _drop_after(self.path, step)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self.board = _board(folder / "tb", step)
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
            for name, value in numbers.items():
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def line(self, kind: str, step: int, **values: Any) -> None:
        if self.enabled:
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
            self.board.add_image(name, pixels, step, dataformats="HWC")

    def advance(self) -> None:
        if self.enabled:
            self.bar.update()

    def close(self) -> None:
        if self.enabled:
            self.file.close()
            self.bar.close()
            if self.board:
                self.board.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line cut short by a crash is left out."""
    lines = []
    path = folder / "log.jsonl"
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
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
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=step + 1)
