"""Two models, each in a fresh process, called in turn: A, B, A, B.

Each process holds one model alone, so its peak memory is its own, and the turns put both under the
same weather. Where the two together do not fit in the machine's memory they run one after the
other.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.machine import ROOT
from benchmarks.timing import quantile


class Contender:
    """A process that runs `python -m module --contender SPEC` and obeys line by line."""

    def __init__(self, module: str, spec: dict[str, Any]):
        command = [sys.executable, "-m", module, "--contender", json.dumps(spec)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        self.about = self._read()  # it says so when it is warm

    def call(self) -> dict[str, float]:
        """One timed call: `wall_s`, `cpu_s`."""
        self._write("call")
        return self._read()

    def finish(self) -> dict[str, Any]:
        """End the process: `baseline_mib`, `peak_mib`, and what it said at the start."""
        self._write("finish")
        last = self._read()
        self.process.wait()
        return self.about | last

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contender ended with status {self.process.wait()}; see above")
        return json.loads(line)


def serve(
    prepare: Callable[[], tuple[Callable[[], Any], Callable[[Any], None]]], device: torch.device
) -> None:
    """The other side: make the thunk, time its first call, keep the result, then obey.

    Args:
        prepare: gives the thunk and what keeps the result of its first call.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # stray prints must not look like answers

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    thunk, keep = prepare()
    results: list[Any] = []
    first = _timed(lambda: results.append(thunk()), device)["wall_s"]
    keep(results.pop())
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
) -> dict[str, Any]:
    """Times and memory of two contenders; the ratios are theirs over ours, round by round.

    Args:
        specs: `{"fastvid": ..., "eager": ...}`, what each contender is told.
        turns: pairs of fresh processes. Where their memory lies is luck, worth some percent.
        rounds: calls of each per turn, at least; more until `seconds` have passed if both fit.
        need_mib: memory of one contender, to decide whether both fit at once.
    """
    apart = 2 * need_mib > _available_mib()
    calls: dict[str, list[dict[str, float]]] = {name: [] for name in specs}
    ends: dict[str, dict[str, Any]] = {name: {"peak_mib": 0} for name in specs}
    for turn in range(turns):
        names = sorted(specs, reverse=turn % 2 == 0)
        for together in [[name] for name in names] if apart else [names]:
            contenders = {name: Contender(module, specs[name]) for name in together}
            start, done = time.perf_counter(), 0
            while done < rounds or (time.perf_counter() - start < seconds and not apart):
                for name in together:
                    calls[name].append(contenders[name].call())
                together.reverse()
                done += 1
            for name, contender in contenders.items():
                ends[name] = max(ends[name], contender.finish(), key=lambda end: end["peak_mib"])
    row: dict[str, Any] = {"apart": apart, "turns": turns, "rounds": len(calls["fastvid"])}
    for name, end in ends.items():
        wall = [call["wall_s"] for call in calls[name]]
        row |= {f"{name}_p{p}_ms": 1e3 * quantile(wall, p / 100) for p in (20, 50, 80)}
        row |= {f"{name}_{key}": value for key, value in end.items()}
    pairs = list(zip(calls["eager"], calls["fastvid"], strict=True))
    for kind in ("wall", "cpu"):
        ratios = [theirs[f"{kind}_s"] / ours[f"{kind}_s"] for theirs, ours in pairs]
        row |= {f"{kind}_ratio_p{p}": quantile(ratios, p / 100) for p in (20, 50, 80)}
    extra = {name: end["peak_mib"] - end["baseline_mib"] for name, end in ends.items()}
    row["peak_ratio"] = ends["fastvid"]["peak_mib"] / ends["eager"]["peak_mib"]
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


def _available_mib() -> float:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
