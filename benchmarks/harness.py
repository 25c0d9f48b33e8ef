"""Measure rivals side by side: interleaved, on rotating inputs, with the match in the same row.

A case binds each rival to a set of inputs and gets a thunk; only the thunk is timed. Every round
times every rival once per input set, and the rival that goes first changes from round to round,
because the first one after an allocation storm pays for it. On a GPU the time is that of a
CUDA-graph replay (device time), and the wall time of eager calls stands beside it.
"""

import functools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import Tensor

Thunk = Callable[[], Any]
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line-up: what is computed, on which inputs, by whom, and what must move."""

    room: str
    name: str  # such as "forward"
    shape: dict[str, int]
    dtype: torch.dtype
    make_inputs: Callable[[torch.device], tuple[Tensor, ...]]
    rivals: dict[str, Callable[..., Thunk]]  # bind(*inputs) -> thunk; "fastvid" and "eager" are two
    oracle: Callable[..., Thunk]  # binds float64 inputs
    nbytes: int  # that cannot but be read and written
    flops: int = 0
    missing: dict[str, str] = field(default_factory=dict)  # rival -> how to install it

    @property
    def label(self) -> str:
        """`modulate/forward B=1 N=1024 D=384 bfloat16`."""
        sizes = " ".join(f"{key}={value}" for key, value in self.shape.items())
        return f"{self.room}/{self.name} {sizes} {str(self.dtype).removeprefix('torch.')}"


def forward_of(function: Callable[..., Tensor]) -> Callable[..., Thunk]:
    """Time `function(*inputs)` without gradients."""

    def bind(*inputs):
        def thunk():
            with torch.no_grad():
                return function(*inputs)

        return thunk

    return bind


def backward_of(function: Callable[..., Tensor]) -> Callable[..., Thunk]:
    """Time the gradients of `function(*inputs)`; the last input is that of the result."""

    def bind(*inputs):
        *leaves, grad = (tensor.detach() for tensor in inputs)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        with functorch.patch(donated_buffer=False):  # a graph walked twice keeps its buffers
            result = function(*leaves)
        return lambda: torch.autograd.grad(result, leaves, grad.to(result.dtype), retain_graph=True)

    return bind


def measure(
    case: Case,
    device: torch.device,
    *,
    seconds: float = 1.0,
    ceilings: dict[str, float] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """One row per rival.

    Args:
        seconds: how long all rivals are timed together, after a warm-up of a fifth of it.
        ceilings: what `measure_ceilings` returned, for the percentages.
        clock: seconds; a test passes its own.
    """
    if device.type == "cuda" and torch.cuda.current_stream() == torch.cuda.default_stream():
        # Autograd walks a graph on the stream that made it, and the default one is never captured.
        with torch.cuda.stream(torch.cuda.Stream()):
            return measure(case, device, seconds=seconds, ceilings=ceilings, clock=clock)
    torch._dynamo.reset()  # else the compiled rival falls back after eight cases
    inputs = _rotating(case, device)
    worth = judge(case, inputs[0])
    thunks: dict[str, list[Thunk]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, bind in case.rivals.items():
        start = clock()
        thunks[name] = [bind(*each) for each in inputs]
        result = thunks[name][0]()
        _wait(device)
        rows[name] = {"first_call_s": clock() - start, **worth(result)}
    turns = {name: _wall(calls, device, clock) for name, calls in thunks.items()}
    rounds = -(-5 // len(inputs))  # a round takes every set of inputs: slow rivals end in time
    times = interleave(turns, seconds, clock, rounds)
    if device.type == "cuda":
        wall = times
        replays = {name: _replay(calls) for name, calls in thunks.items()}
        times = interleave(replays, seconds, clock)
        for name in rows:
            rows[name]["wall_p50_ms"] = 1e3 * quantile(wall[name], 0.5)
            rows[name]["extra_mib"] = _extra_memory(thunks[name][0])
    common = {
        "case": case.label,
        "room": case.room,
        "name": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        **case.shape,
        "nbytes": case.nbytes,
        "flops": case.flops,
        **environment(device),
    }
    for name, row in rows.items():
        for percent in (20, 50, 80):
            row[f"p{percent}_ms"] = 1e3 * quantile(times[name], percent / 100)
        median = row["p50_ms"] / 1e3
        row["tb_per_s"] = case.nbytes / median / 1e12
        row["tflop_per_s"] = case.flops / median / 1e12
        if ceilings:
            row["of_copy"] = row["tb_per_s"] / ceilings["copy_tb_per_s"]
    found = [{**common, "rival": name, **row} for name, row in rows.items()]
    return found + [{**common, "rival": name, "install": how} for name, how in case.missing.items()]


def interleave(
    timed: dict[str, Callable[[], list[float]]],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    rounds: int = 5,
) -> dict[str, list[float]]:
    """Call every rival in turn for `seconds` and at least `rounds` rounds; all their times."""
    names = list(timed)
    start = clock()
    while clock() - start < seconds / 5:  # clocks and caches settle; nothing is kept
        for name in names:
            timed[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    start, turn = clock(), 0
    while turn < rounds or clock() - start < seconds:
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name] += timed[name]()
        turn += 1
    return times


def quantile(times: Iterable[float], share: float) -> float:
    """The value below which `share` of the times lie, between neighbours by a straight line."""
    ordered = sorted(times)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def measure_ceilings(device: torch.device, quick: bool = False) -> dict[str, float]:
    """What this machine can do today: TB/s of a copy (read + written), TFLOP/s of a matmul."""
    on_gpu = device.type == "cuda"
    copied = 2**31 if on_gpu else 2**25 if quick else 2**28
    side = 8192 if on_gpu else 256 if quick else 1024
    source = torch.empty(copied, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, device=device).bfloat16()
    found = {}
    for name, thunk, work in (
        ("copy_tb_per_s", lambda: target.copy_(source), 2 * copied),
        ("matmul_bf16_tflop_per_s", lambda: a @ b, 2 * side**3),
    ):
        times = interleave({name: _wall([thunk], device, time.perf_counter)}, 0.3)
        found[name] = work / statistics.median(times[name]) / 1e12
    return found


@functools.cache
def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that a number belongs to."""
    import importlib.metadata

    def output(*command):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    from fastvid.kernels._shared import native

    on_gpu = device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "compiled": native.loaded(),
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if on_gpu
        else None,
        "commit": output("git", "describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%d"),
    }


def append(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """Add rows to a JSONL file, flushed, so that a cut-off run keeps what it measured."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of one case, for people."""
    lines = [rows[0]["case"]] if rows else []
    ours = next((row["p50_ms"] for row in rows if row["rival"] == "fastvid"), None)
    for row in rows:
        if "install" in row:
            lines.append(f"  {row['rival']:<10} not here: {row['install']}")
            continue
        spread = f"{row['p50_ms']:9.3f} ms ({row['p20_ms']:.3f} to {row['p80_ms']:.3f})"
        versus = f"{row['p50_ms'] / ours:6.2f}x" if ours else ""
        copy = f"{100 * row['of_copy']:4.0f} % of copy" if "of_copy" in row else ""
        match = "match" if row["match"] else "NO MATCH"
        lines.append(
            f"  {row['rival']:<10} {spread:<36} {versus:>8}"
            f" {row['tb_per_s']:7.4f} TB/s {copy}  {match} ({row['error']:.1e})"
        )
    return "\n".join(lines)


def _rotating(case: Case, device: torch.device) -> list[tuple[Tensor, ...]]:
    """Enough sets of inputs that a call finds none of its own in the last cache."""
    first = case.make_inputs(device)
    size = sum(tensor.nbytes for tensor in first)
    sets = max(1, min(16, -(-3 * _cache_bytes(device) // size)))
    return [first] + [case.make_inputs(device) for _ in range(sets - 1)]


def judge(case: Case, inputs: tuple[Tensor, ...]) -> Callable[[Any], dict[str, Any]]:
    """Compare a result with the oracle by the budget of the tests.

    The largest error may be twice eager's and the root mean square 1.2 times eager's, both with a
    rounding of the result on top; errors are relative to the largest value.
    """
    exact = _tensors(case.oracle(*(tensor.double() for tensor in inputs))())
    eager = _tensors(case.rivals["eager"](*inputs)())
    allowed = [
        (2 * largest + eps * size.abs().max().item(), 1.2 * typical + eps / 4 * _rms(size))
        for tensor, size in zip(eager, exact, strict=True)
        for largest, typical in [_errors(tensor, size)]
        for eps in [torch.finfo(tensor.dtype).eps]
    ]

    def worth(result):
        found = [_errors(*pair) for pair in zip(_tensors(result), exact, strict=True)]
        good = all(
            a <= b
            for own, limits in zip(found, allowed, strict=True)
            for a, b in zip(own, limits, strict=True)
        )
        sizes = [max(tensor.abs().max().item(), 1e-30) for tensor in exact]
        error = max(largest / size for (largest, _), size in zip(found, sizes, strict=True))
        return {"error": error, "match": good}

    return worth


def _errors(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """The largest error and the root mean square."""
    error = found.double() - exact
    return error.abs().max().item(), _rms(error)


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _wall(
    calls: list[Thunk], device: torch.device, clock: Callable[[], float]
) -> Callable[[], list[float]]:
    """Seconds of each call on the CPU; the mean of a row of calls on a GPU."""

    def timed():
        if device.type == "cuda":
            _wait(device)
            start = clock()
            for call in calls:
                call()
            _wait(device)
            return [(clock() - start) / len(calls)]
        times = []
        for call in calls:
            start = clock()
            call()
            times.append(clock() - start)
        return times

    return timed


def _replay(calls: list[Thunk], repeats: int = 20) -> Callable[[], list[float]]:
    """Device seconds per call, from replays of a CUDA graph that goes round the inputs."""
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


def _extra_memory(thunk: Thunk) -> float:
    """MiB that one call holds at its peak beyond what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    thunk()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().rstrip("K\n")) * 1024 for path in sizes), default=2**25)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
