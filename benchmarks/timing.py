"""How times are taken: rivals in turn, quantiles of what they needed, replays of a CUDA graph."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

Thunk = Callable[[], Any]
Clock = Callable[[], float]


def interleave(
    timed: dict[str, Callable[[], list[float]]],
    seconds: float,
    clock: Clock = time.perf_counter,
    rounds: int = 5,
    limit: float = math.inf,
) -> dict[str, list[float]]:
    """Call every rival in turn and return all their times, the same number of each.

    The rival that goes first changes from round to round, because the first one after an
    allocation storm pays for it.

    Args:
        seconds: at least so long, after a warm-up of a fifth of it.
        rounds: at least so many.
        limit: seconds after which no further round starts, whatever the two above say.
    """
    names = list(timed)
    start = clock()
    while clock() - start < min(seconds, limit) / 5:  # clocks and caches settle; nothing is kept
        for name in names:
            timed[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    start, turn, spent = clock(), 0, 0.0
    while turn == 0 or (spent < limit and (turn < rounds or spent < seconds)):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name] += timed[name]()
        turn += 1
        spent = clock() - start
    return times


def quantile(times: Iterable[float], share: float) -> float:
    """The value below which `share` of the times lie, between neighbours by a straight line."""
    ordered = sorted(times)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def quantiles(times: Iterable[float], name: str, unit: float = 1.0) -> dict[str, float]:
    """`p20`, `p50` and `p80` in the place of the `*` of `name`, times `unit`."""
    times = list(times)
    return {name.replace("*", f"p{p}"): unit * quantile(times, p / 100) for p in (20, 50, 80)}


def wait(device: torch.device) -> None:
    """Until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall(calls: list[Thunk], device: torch.device, clock: Clock) -> Callable[[], list[float]]:
    """Seconds of each call on the CPU; the mean of a row of calls on a GPU."""

    def timed():
        if device.type == "cuda":
            wait(device)
            start = clock()
            for call in calls:
                call()
            wait(device)
            return [(clock() - start) / len(calls)]
        times = []
        for call in calls:
            start = clock()
            call()
            times.append(clock() - start)
        return times

    return timed


def replay(calls: list[Thunk]) -> Callable[[], list[float]]:
    """Device seconds per call, from replays of a CUDA graph that goes round the inputs."""
    repeats = max(20, len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for turn in range(repeats):
            calls[turn % len(calls)]()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed():
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return [start.elapsed_time(end) / 1e3 / repeats]

    return timed
