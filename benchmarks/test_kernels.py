"""`pytest benchmarks/`: the cases of `python -m benchmarks kernels` through pytest-benchmark."""

import pytest
import torch

from benchmarks import harness, machine, run
from benchmarks.timing import wait

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc):
    """One test per case and rival, those included that are not installed."""
    config = metafunc.config
    wanted = [config.getoption(f"--{option}") for option in ("name", "shape", "dtype")]
    found = [
        pytest.param(case, rival, id=f"{case.label} {rival}")
        for room in config.getoption("--room") or run.rooms()
        for case in run.cases(room, DEVICE, not config.getoption("--full"))
        if run.is_wanted(case, *wanted)
        for case in [harness.select(case, config.getoption("--rival"))]
        for rival in [*case.rivals, *case.missing]
    ]
    metafunc.parametrize(("case", "rival"), found)


def test_kernel(benchmark, case, rival):
    if rival in case.missing:
        pytest.skip(f"{rival} is not here: {case.missing[rival]}")
    inputs = case.make_inputs(DEVICE)
    thunk = case.rivals[rival](*inputs)
    eager = case.rivals["eager"](*inputs)()
    match = harness.judge(case, inputs, eager)(thunk())
    benchmark.group = case.label
    benchmark.extra_info |= {**machine.environment(DEVICE), **match}

    def timed():
        thunk()
        wait(DEVICE)

    benchmark(timed)
    assert match["match"] or rival != "fastvid", f"off by {match['error']:.2e}"
