"""The machine that a number belongs to: what it is, what it can do today, which cores are ours."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import interleave, wall

ROOT = Path(__file__).parent.parent


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that a number belongs to."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {**_fixed(device), "threads": torch.get_num_threads(), "cores": cores, "date": now}


def folder(device: torch.device) -> str:
    """`nvidia-h200` or `cpu-x86-64-2-cores`: where results of this kind of machine are kept."""
    name = f"cpu {platform.machine()} {os.cpu_count()} cores"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return slug(name)


def slug(text: str) -> str:
    """The words of a text as a name of a file."""
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


@functools.cache
def _fixed(device: torch.device) -> dict[str, Any]:
    from fastvid.kernels._shared import native

    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "device": device.type,
        "compiled": native.loaded(),
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "driver": gpu_state(device)["driver"],
        "commit": commit(),
    }


def commit(folder: Path = ROOT) -> str | None:
    """The commit of the checkout, "-dirty" where its code differs; None where there is no git.

    Results and pages do not count: they are what a measurement renews.
    """

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], capture_output=True, text=True, cwd=folder)
        return done.stdout.strip()

    code = [".", ":(exclude)benchmarks/results", ":(exclude)*.md"]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
    head = git("rev-parse", "--short", "HEAD")
    return f"{head}-dirty" if head and changed else head or None


def gpu_state(device: torch.device) -> dict[str, Any]:
    """Driver, memory in use, clocks, power and temperature as the driver tells them.

    Every field is None without a CUDA device or without nvidia-ml-py.
    """
    names = "driver", "device_mib", "sm_mhz", "memory_mhz", "power_w", "celsius"
    if device.type != "cuda" or importlib.util.find_spec("pynvml") is None:
        return dict.fromkeys(names)
    import pynvml

    try:
        pynvml.nvmlInit()
        # CUDA_VISIBLE_DEVICES renumbers CUDA's devices, not the driver's: the id is common to both.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        found = (
            pynvml.nvmlSystemGetDriverVersion(),
            pynvml.nvmlDeviceGetMemoryInfo(handle).used / 2**20,
            pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        )
    except pynvml.NVMLError:  # a container may forbid some of them
        return dict.fromkeys(names)
    return dict(zip(names, found, strict=True))


def measure_ceilings(device: torch.device, quick: bool = False) -> dict[str, float]:
    """What this machine can do today: TB/s of a copy (read + written), TFLOP/s of matmuls."""
    on_gpu = device.type == "cuda"
    copied = 2**31 if on_gpu else 2**25 if quick else 2**28
    side = 8192 if on_gpu else 256 if quick else 1024
    source = torch.empty(copied, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, device=device)
    a_half, b_half = a.bfloat16(), b.bfloat16()
    found = {}
    for name, thunk, work in (
        ("copy_tb_per_s", lambda: target.copy_(source), 2 * copied),
        ("matmul_bf16_tflop_per_s", lambda: a_half @ b_half, 2 * side**3),
        ("matmul_fp32_tflop_per_s", lambda: a @ b, 2 * side**3),
    ):
        times = interleave({name: wall([thunk], device, time.perf_counter)}, 0.3)
        found[name] = work / statistics.median(times[name]) / 1e12
    return found


@contextlib.contextmanager
def pinned(threads: int | None) -> Iterator[None]:
    """As many threads (None: as many as now), on as many cores and no others."""
    threads = threads or torch.get_num_threads()
    before = torch.get_num_threads(), _affinities()
    torch.set_num_threads(threads)
    if before[1]:
        cores = set(sorted(os.sched_getaffinity(0))[:threads])
        _set_affinities(dict.fromkeys(before[1], cores))
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        own = os.getpid()  # threads that were born meanwhile get what the first one had
        _set_affinities({task: before[1].get(task, before[1][own]) for task in _affinities()})


def _affinities() -> dict[int, set[int]]:
    """The cores that each thread of this process may use; empty where that cannot be asked."""
    if not Path("/proc/self/task").exists():
        return {}
    tasks = [int(path.name) for path in Path("/proc/self/task").iterdir()]
    return {task: os.sched_getaffinity(task) for task in tasks}


def _set_affinities(cores: dict[int, set[int]]) -> None:
    for task, allowed in cores.items():
        with contextlib.suppress(ProcessLookupError):  # it ended
            os.sched_setaffinity(task, allowed)


def cache_bytes(device: torch.device) -> int:
    """The size of the last cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().rstrip("K\n")) * 1024 for path in sizes), default=2**25)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
