"""The cases of a GPU on a machine without one."""

import importlib

import torch


def cases_on_a_gpu(room, monkeypatch):
    """Those of a GPU's sizes; the tables behind them are made on the CPU, nothing is run."""
    bench = importlib.import_module(f"benchmarks.kernels.bench_{room}")
    for name in ("SHAPES", "CPU", "RULED"):
        if hasattr(bench, name):
            on_gpu = {"CPU": "GPU"}.get(name, f"GPU_{name}")
            monkeypatch.setattr(bench, name, getattr(bench, on_gpu))
    return bench.cases(torch.device("cpu"), False)
