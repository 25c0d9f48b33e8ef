"""Stopping on request at a step boundary, and keeping a second trainer out of a run folder."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupted(RuntimeError):
    """A signal or `stop_at` ended the run early, after its state was saved."""


class RunBusyError(RuntimeError):
    """Another process trains in this folder."""


class StopRequest:
    """Whether a signal asked to stop, and which."""

    name = ""

    def __bool__(self) -> bool:
        return bool(self.name)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn the first SIGTERM, SIGINT or SIGUSR1 into a request; a second one acts as always.

    Outside the main thread Python delivers no signals, and nothing is caught.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def catch(number: int, frame: FrameType | None) -> None:
        request.name = signal.Signals(number).name
        restore()

    before = {number: signal.signal(number, catch) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield request
    finally:
        restore()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder's lock; the system lets go of it when the process ends, however it does.

    Raises:
        RunBusyError: another process holds it; names its pid and host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise RunBusyError(
                f"{folder} is being trained by {owner}; wait for it, stop it, or choose another "
                "run.folder"
            ) from None
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process trains in `folder` now."""
    try:
        with open(folder / "lock", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
