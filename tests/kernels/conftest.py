"""What every room's tests share: budgets, poisoned and guarded memory, both CPU paths."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from fastvid.kernels._shared import native

ROOT = Path(__file__).parents[2]


@pytest.fixture
def within_budget():
    """`within_budget(actual, eager, exact)`: no worse than rounding allows.

    `exact` is float64, `eager` the same arithmetic by plain PyTorch in the dtype of `actual`. The
    largest error may be twice eager's, the root mean square 1.2 times eager's; both get one
    rounding of the result on top, which eager may have been spared by luck.
    """

    def check(actual, eager, exact, name="result"):
        assert actual.shape == exact.shape, f"{name}: {actual.shape} instead of {exact.shape}"
        if exact.numel() == 0:
            return
        exact = exact.to(actual.device)
        error, allowed = (actual.double() - exact).abs(), (eager.double() - exact).abs()
        eps = torch.finfo(actual.dtype).eps
        worst = 2 * allowed.max() + eps * exact.abs().max()
        assert error.max() <= worst, f"{name}: error {error.max():.3g} > {worst:.3g}"
        typical = 1.2 * _rms(allowed) + eps / 4 * _rms(exact)
        assert _rms(error) <= typical, f"{name}: rms {_rms(error):.3g} > {typical:.3g}"

    return check


def _rms(tensor):
    return tensor.square().mean().sqrt()


@pytest.fixture(params=["compiled", "pytorch"])
def cpu_path(request, monkeypatch):
    """Run the test with the compiled library and without it."""
    if request.param == "pytorch":
        monkeypatch.setattr(native, "loaded", lambda: False)
    elif not native.loaded():
        pytest.skip(f"no compiled library: {native.failure()}")
    return request.param


@pytest.fixture(params=[32, 16])
def vectors(request):
    """Run the test with the C++ of machines that have narrower vectors: bytes of one."""
    if not native.loaded():
        pytest.skip(f"no compiled library: {native.failure()}")
    limit = torch.ops.fastvid_cpp.limit_vectors
    if limit(request.param) != request.param:
        limit(64)
        pytest.skip(f"this machine has no vectors of {request.param} bytes")
    yield request.param
    limit(64)


@pytest.fixture
def interpreter():
    """Triton kernels run here: on the GPU, or interpreted on the CPU."""
    triton = pytest.importorskip("triton")
    versions = [
        tuple(int(part) for part in module.__version__.split(".")[:2]) for module in (triton, numpy)
    ]
    if not torch.cuda.is_available() and versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")


@pytest.fixture
def poisoned():
    """`torch.empty` comes filled with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def guard_bands(monkeypatch):
    """Tensors made by `new_empty` lie between bands that must not change. Call it to check."""
    plain, buffers = torch.Tensor.new_empty, []
    pad, sentinel = 4096, 77.0

    def new_empty(self, *size, **options):
        wanted = plain(self, *size, **options)
        buffer = plain(self, wanted.numel() + 2 * pad, dtype=wanted.dtype).fill_(sentinel)
        buffers.append(buffer)
        return buffer[pad : pad + wanted.numel()].view(wanted.shape)

    def check():
        assert buffers, "nothing was allocated through new_empty"
        for buffer in buffers:
            assert (buffer[:pad] == sentinel).all(), "written before the start"
            assert (buffer[-pad:] == sentinel).all(), "written past the end"

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    return check


@pytest.fixture
def child():
    """Run Python code in a fresh process and return what it printed; fail if it died."""

    def run(code, interpret=True):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
        )
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.fixture
def compilations(child):
    """`compilations(code)`: run launchers without a GPU, compiling for sm_90 but launching nothing.

    `code` ends by printing `count(kernel)` for the kernels it used.
    """
    pytest.importorskip("triton")
    prelude = """
import functools, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class OnlyCompiles:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_active_torch_device = lambda self: torch.device("cpu")
    map_python_to_cpp_type = lambda self, name: name

driver.set_active(OnlyCompiles())
JITFunction.__getitem__ = lambda self, grid: functools.partial(self.warmup, grid=grid)
count = lambda kernel: sum(len(cache[0]) for cache in kernel.device_caches.values())
"""
    return lambda code: child(prelude + code, interpret=False)


def pytest_collection_modifyitems(items):
    """What another Triton may break, for `-m triton`."""
    for item in items:
        if {"interpreter", "compilations"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.triton)
