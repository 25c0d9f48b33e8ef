"""Two models, each in a fresh process, called in turn: A, B, A, B.

Each process holds one model alone, so its peak memory is its own, and the turns put both under the
same weather. Where the two together do not fit in the machine's memory they run one after the
other.
"""

import ctypes
import gc
import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks.machine import ROOT
from benchmarks.timing import quantile


class Contender:
    """A process that runs `python -m module --contender SPEC` and obeys line by line.

    It ends with the `with` block. An answer that is not there by `end`, as `time.monotonic()` has
    it, is a `RuntimeError`.
    """

    def __init__(self, module: str, spec: dict[str, Any], end: float = math.inf):
        command = [sys.executable, "-m", module, "--contender", json.dumps(spec)]
        self.end = end
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        try:
            self.about = self._read()  # it says so when it is warm
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *error: object) -> None:
        with self.process:  # closes its pipes and waits
            self.process.kill()

    def call(self) -> dict[str, float]:
        """One timed call: `wall_s`, `cpu_s`."""
        self._write("call")
        return self._read()

    def finish(self) -> dict[str, Any]:
        """The last answer: `baseline_mib`, `peak_mib`, and what it said at the start."""
        self._write("finish")
        return self.about | self._read()

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        left = None if self.end == math.inf else max(0.0, self.end - time.monotonic())
        if not select.select([self.process.stdout], [], [], left)[0]:
            raise RuntimeError("the row's seconds were over before a contender answered")
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contender ended with status {self.process.wait()}; see above")
        return json.loads(line)


def serve(
    prepare: Callable[[], tuple[Callable[[], Any], Callable[[Any], None]]],
    device: torch.device,
    once: bool = False,
) -> None:
    """The other side: make the thunk, time its first call, keep the result, then obey.

    Args:
        prepare: gives the thunk and what keeps the result of its first call.
        once: only that result is wanted.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # stray prints must not look like answers

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    thunk, keep = prepare()
    results: list[Any] = []
    first = _timed(lambda: results.append(thunk()), device)["wall_s"]
    keep(results.pop())
    if once:
        answer({"first_call_s": first})
        return
    del keep
    gc.collect()
    _give_back_memory()
    baseline = _memory(device, reset=True)
    thunk()
    answer({"first_call_s": first})
    for line in sys.stdin:
        if line.strip() == "finish":
            answer({"baseline_mib": baseline, "peak_mib": _memory(device, peak=True)})
            return
        answer(_timed(thunk, device))


def duel(
    module: str,
    specs: dict[str, dict[str, Any]],
    *,
    turns: int,
    rounds: int,
    seconds: float,
    need_mib: float,
    end: float = math.inf,
) -> dict[str, Any]:
    """Times and memory of two contenders; the ratios are theirs over ours, round by round.

    Args:
        specs: `{"fastvid": ..., "eager": ...}`, what each contender is told, its "device" too.
        turns: pairs of fresh processes. Where their memory lies is luck, worth some percent.
        rounds: calls of each per turn, at least; more until `seconds` have passed if both fit.
        need_mib: memory of one contender, to decide whether both fit at once.
        end: by `time.monotonic()`; no round starts that would not be done by then, and no answer
            is awaited any longer.
    """
    apart = 2 * need_mib > _available_mib(torch.device(specs["fastvid"]["device"]))
    calls: dict[str, list[dict[str, float]]] = {name: [] for name in specs}
    last: dict[str, dict[str, Any]] = {name: {"peak_mib": 0} for name in specs}
    for turn in range(turns):
        names = sorted(specs, reverse=turn % 2 == 0)
        for together in [[name] for name in names] if apart else [names]:
            with ExitStack() as stack:
                contenders = {
                    name: stack.enter_context(Contender(module, specs[name], end))
                    for name in together
                }
                start = now = time.monotonic()
                done, took = 0, 0.0
                while done == 0 or (
                    (done < rounds or (now - start < seconds and not apart)) and now + took < end
                ):
                    for name in together:
                        calls[name].append(contenders[name].call())
                    together.reverse()
                    done, took, now = done + 1, time.monotonic() - now, time.monotonic()
                for name, contender in contenders.items():
                    last[name] = max(last[name], contender.finish(), key=lambda x: x["peak_mib"])
    row: dict[str, Any] = {"apart": apart, "turns": turns, "rounds": len(calls["fastvid"])}
    for name, about in last.items():
        wall = [call["wall_s"] for call in calls[name]]
        row |= {f"{name}_p{p}_ms": 1e3 * quantile(wall, p / 100) for p in (20, 50, 80)}
        row |= {f"{name}_{key}": value for key, value in about.items()}
    pairs = list(zip(calls["eager"], calls["fastvid"], strict=False))  # the time may have been over
    for kind in ("wall", "cpu"):
        ratios = [theirs[f"{kind}_s"] / ours[f"{kind}_s"] for theirs, ours in pairs]
        row |= {f"{kind}_ratio_p{p}": quantile(ratios, p / 100) for p in (20, 50, 80)}
    extra = {name: about["peak_mib"] - about["baseline_mib"] for name, about in last.items()}
    row["peak_ratio"] = last["fastvid"]["peak_mib"] / last["eager"]["peak_mib"]
    row["extra_ratio"] = extra["fastvid"] / max(extra["eager"], 1e-9)
    return row


def _timed(thunk: Callable[[], Any], device: torch.device) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    thunk()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def _memory(device: torch.device, *, peak: bool = False, reset: bool = False) -> float:
    """MiB held: the allocator's on a GPU, else the resident pages of this process."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return held(device) / 2**20
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the high-water mark
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["VmHWM" if peak else "VmRSS"].split()[0]) / 2**10


def _give_back_memory() -> None:
    """What loading left free in the C heap goes back to the system before the count starts."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _available_mib(device: torch.device) -> float:
    """What a new process can have: of the device's memory, or of the host's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what this process holds and does not use
        return torch.cuda.mem_get_info(device)[0] / 2**20
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
