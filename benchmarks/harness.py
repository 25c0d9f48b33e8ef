"""Measure rivals side by side: interleaved, on rotating inputs, with the match in the same row.

A case binds each rival to a set of inputs and gets a thunk; only the thunk is timed. Every round
times every rival once per input set (`timing.py`). On a GPU the time is that of a CUDA-graph
replay (device time), and the wall time of eager calls stands beside it. `README.md` names every
column of a row.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import Tensor

from benchmarks.machine import cache_bytes, environment, gpu_state
from benchmarks.timing import Clock, Thunk, interleave, quantile, quantiles, replay, wait, wall
from fastvid.kernels._shared import native

Row = dict[str, Any]


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
    sets: int = 128  # of inputs, at most; fewer where a rival takes a second
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


def backward_of(function: Callable[..., Any], results: int = 1) -> Callable[..., Thunk]:
    """Time the gradients of `function(*inputs)`; the last inputs are those of its results."""

    def bind(*inputs):
        inputs = [tensor.detach() for tensor in inputs]
        leaves = [leaf.requires_grad_() for leaf in inputs[:-results]]
        with functorch.patch(donated_buffer=False):  # a graph walked twice keeps its buffers
            found = _tensors(function(*leaves))
        grads = [grad.to(x.dtype) for grad, x in zip(inputs[-results:], found, strict=True)]
        return lambda: torch.autograd.grad(found, leaves, grads, retain_graph=True)

    return bind


def without_cpp(bind: Callable[..., Thunk]) -> Callable[..., Thunk]:
    """Time the same on a machine that had no compiler."""

    def bound(*inputs):
        with _no_cpp():
            thunk = bind(*inputs)

        def slower():
            with _no_cpp():
                return thunk()

        return slower

    return bound


@contextlib.contextmanager
def _no_cpp():
    loaded, native.loaded = native.loaded, lambda: False
    try:
        yield
    finally:
        native.loaded = loaded


def measure(
    case: Case,
    device: torch.device,
    *,
    seconds: float = 1.0,
    budget: float = math.inf,
    sets: int = 128,
    ceilings: dict[str, float] | None = None,
    clock: Clock = time.perf_counter,
) -> list[Row]:
    """One row per rival.

    A rival that raises has a row that says what; the others are measured all the same. Eager sets
    the tolerance: what it raises is raised.

    Args:
        seconds: how long all rivals are timed together, after a warm-up of a fifth of it.
        budget: seconds for the whole case. When they are over no further rival is begun and no
            further round starts.
        sets: at most so many sets of inputs, which together are three times the last cache.
        ceilings: what `measure_ceilings` returned, for the percentages.
        clock: seconds; a test passes its own.
    """
    options = {"seconds": seconds, "budget": budget, "sets": sets, "ceilings": ceilings}
    if device.type == "cuda" and torch.cuda.current_stream() == torch.cuda.default_stream():
        # Autograd walks a graph on the stream that made it, and the default one is never captured.
        with torch.cuda.stream(torch.cuda.Stream()):
            return measure(case, device, clock=clock, **options)
    torch._dynamo.reset()  # else the compiled rival falls back after eight cases
    end = clock() + budget
    inputs = _rotating(case, device, min(sets, case.sets))
    thunks: dict[str, list[Thunk]] = {}
    rows: dict[str, Row] = {}
    thunks["eager"], eager, cost = _first_calls(case.rivals["eager"], inputs, device, clock)
    worth = judge(case, inputs[0], eager)
    rows["eager"] = {**cost, **worth(eager)}
    del eager
    for name, bind in case.rivals.items():
        if name != "fastvid" and clock() > end:
            rows.setdefault(name, {"skipped": f"the row's {budget:.3g} s were over"})
            continue
        try:
            if name != "eager":
                thunks[name], result, cost = _first_calls(bind, inputs, device, clock)
                rows[name] = {**cost, **worth(result)}
                del result
            if device.type == "cuda":
                rows[name] |= _peaks(bind, inputs[0])
        except Exception as error:  # no kernel for this size, out of memory: the others go on
            thunks.pop(name, None)
            rows[name] = {"failed": in_one_line(error)}
    for name, columns in _times(thunks, device, seconds, end, clock).items():
        rows[name] |= columns
        _rates(rows[name], case, ceilings)
    common = {
        "case": case.label,
        "room": case.room,
        "name": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        **case.shape,
        "nbytes": case.nbytes,
        "flops": case.flops,
        "sets": len(inputs),
        **(ceilings or {}),
        **environment(device),
        **gpu_state(device),
    }
    found = [{**common, "rival": name, **rows[name]} for name in case.rivals]
    return found + [{**common, "rival": name, "install": how} for name, how in case.missing.items()]


def _first_calls(bind, inputs, device, clock) -> tuple[list[Thunk], Any, Row]:
    """The thunk of every set, the first result, and what the first call cost."""

    def begin():
        start = clock()
        thunk = bind(*inputs[0])
        result = thunk()
        wait(device)
        return thunk, result, clock() - start

    thunk, result, first = begin()
    *_, again = begin()
    cost = {"first_call_s": first, "compile_s": max(0.0, first - again)}
    return [thunk] + [bind(*each) for each in inputs[1:]], result, cost


def _times(thunks, device, seconds, end, clock) -> dict[str, Row]:
    """The columns of time; `ratio_*` is theirs over ours, call by call.

    Both are replays or both are eager calls: what cannot be captured is compared with our calls.
    """
    rounds = -(-5 // len(next(iter(thunks.values()))))  # a round takes every set of inputs
    turns = {name: wall(calls, device, clock) for name, calls in thunks.items()}
    walls = interleave(turns, seconds, clock, rounds, end - clock())
    columns: dict[str, Row] = {name: {} for name in thunks}
    replays = {}
    for name, calls in thunks.items() if device.type == "cuda" else ():
        columns[name]["wall_p50_ms"] = 1e3 * quantile(walls[name], 0.5)
        try:
            replays[name] = replay(calls)
        except Exception as error:  # it waits for the device, or its library does
            columns[name]["not_captured"] = in_one_line(error)
    replayed = interleave(replays, seconds, clock, limit=end - clock()) if replays else {}
    for name in thunks:
        columns[name] |= quantiles(replayed.get(name, walls[name]), "*_ms", 1e3)
        of_a_kind = replayed if {name, "fastvid"} <= replayed.keys() else walls
        if "fastvid" in thunks:
            pairs = zip(of_a_kind[name], of_a_kind["fastvid"], strict=True)
            columns[name] |= quantiles((a / b for a, b in pairs), "ratio_*")
    return columns


def _rates(row: Row, case: Case, ceilings: dict[str, float] | None) -> None:
    """What was moved and computed per second, and its share of what the machine can do."""
    median = row["p50_ms"] / 1e3
    row["tb_per_s"] = case.nbytes / median / 1e12
    row["tflop_per_s"] = case.flops / median / 1e12
    if ceilings:
        row["of_copy"] = row["tb_per_s"] / ceilings["copy_tb_per_s"]
        if case.flops:
            kind = "fp32" if case.dtype == torch.float32 else "bf16"
            row["of_matmul"] = row["tflop_per_s"] / ceilings[f"matmul_{kind}_tflop_per_s"]


def in_one_line(error: Exception) -> str:
    """`RuntimeError: no kernel available`."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def matches(rows: list[Row]) -> bool:
    """Whether our results were measured and matched their oracles."""
    return all(row.get("match", False) for row in rows if row.get("rival", "fastvid") == "fastvid")


def select(case: Case, rivals: list[str] | None) -> Case:
    """The case with fastvid, eager (which sets the tolerance) and such of these rivals; or all."""
    if rivals is None:
        return case
    wanted = {"fastvid", "eager", *rivals}
    kept = {name: bind for name, bind in case.rivals.items() if name in wanted}
    missing = {name: how for name, how in case.missing.items() if name in wanted}
    return dataclasses.replace(case, rivals=kept, missing=missing)


def append(path: Path | None, rows: list[Row]) -> None:
    """Add rows to a JSON Lines file, flushed, so that a cut-off run keeps what it measured."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")  # a run was killed within its last line
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON Lines file, none without the file; what was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def table(rows: list[Row]) -> str:
    """The rows of one case, for people; the ratio is theirs over ours, the median of pairs."""
    lines = [rows[0]["case"]] if rows else []
    for row in rows:
        fault = next((f"{k}: {row[k]}" for k in ("failed", "skipped") if k in row), "")
        fault = f"not here: {row['install']}" if "install" in row else fault
        if fault:
            lines.append(f"  {row['rival']:<12} {fault}")
            continue
        parts = [f"{row['p50_ms']:9.3f} ms ({row['p20_ms']:.3f} to {row['p80_ms']:.3f})".ljust(36)]
        parts.append(f"{row['ratio_p50']:6.2f}x" if "ratio_p50" in row else " " * 7)
        if "wall_p50_ms" in row:
            parts.append(f"call {row['wall_p50_ms']:.3f} ms")
        parts.append(f"{row['tb_per_s']:7.4f} TB/s")
        parts.append(f"{100 * row['of_copy']:4.0f} % of copy" if "of_copy" in row else "")
        if row["flops"]:
            parts.append(f"{row['tflop_per_s']:8.3f} TFLOP/s")
        parts.append(f"{100 * row['of_matmul']:4.0f} % of matmul" if "of_matmul" in row else "")
        if "peak_mib" in row:
            parts.append(f"peak {row['peak_mib']:.0f} MiB, {row['extra_mib']:.1f} of its own")
        match = "match" if row["match"] else "NO MATCH"
        parts.append(f"{match} ({row['error']:.1e})")
        lines.append(f"  {row['rival']:<12} " + "  ".join(part for part in parts if part))
    return "\n".join(lines)


def _rotating(case: Case, device: torch.device, most: int) -> list[tuple[Tensor, ...]]:
    """Enough sets of inputs that a call finds none of its own in the last cache."""
    first = case.make_inputs(device)
    size = max(1, sum(tensor.nbytes for tensor in first))
    sets = max(1, min(most, -(-3 * cache_bytes(device) // size)))
    return [first] + [case.make_inputs(device) for _ in range(sets - 1)]


def judge(case: Case, inputs: tuple[Tensor, ...], eager: Any) -> Callable[[Any], dict[str, Any]]:
    """Compare a result with the oracle by the budget of the tests.

    The largest error may be twice eager's and the root mean square 1.2 times eager's, both with a
    rounding of the result on top; errors are relative to the largest value.

    Args:
        eager: its result on these inputs.
    """
    exact = _tensors(case.oracle(*(tensor.double() for tensor in inputs))())
    allowed = [
        (2 * largest + eps * size.abs().max().item(), 1.2 * typical + rounding * _rms(size))
        for tensor, size in zip(_tensors(eager), exact, strict=True)
        for largest, typical in [_errors(tensor, size)]
        for eps in [torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0]
        for rounding in [eps / 4 if size.numel() >= 64 else eps / 2]  # few do not average out
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


def _peaks(bind: Callable[..., Thunk], inputs: tuple[Tensor, ...]) -> Row:
    """MiB of a rival's own: inputs, what its backward keeps and a call; the call's alone.

    What the other rivals and sets of inputs hold meanwhile is not counted.
    """
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    thunk = bind(*inputs)
    torch.cuda.synchronize()
    bound = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    thunk()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - bound
    own = sum(tensor.nbytes for tensor in inputs) + bound - before
    return {"peak_mib": (own + extra) / 2**20, "extra_mib": extra / 2**20}
