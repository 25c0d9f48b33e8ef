"""`pytest benchmarks/`: the cases of `python -m benchmarks kernels` through pytest-benchmark."""

import pytest
import torch

from benchmarks import harness, run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc):
    """One test per case and rival; tiny sizes unless --full is given."""
    quick = not metafunc.config.getoption("--full")
    found = [
        pytest.param(case, rival, id=f"{case.label} {rival}")
        for room in run.rooms()
        for case in run.cases(room, DEVICE, quick)
        for rival in case.rivals
    ]
    metafunc.parametrize(("case", "rival"), found)


def test_kernel(benchmark, case, rival):
    inputs = case.make_inputs(DEVICE)
    thunk = case.rivals[rival](*inputs)
    match = harness.judge(case, inputs)(thunk())
    benchmark.group = case.label
    benchmark.extra_info |= {**harness.environment(DEVICE), **match}

    def timed():
        thunk()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(timed)
    assert match["match"] or rival != "fastvid", f"off by {match['error']:.2e}"
