import logging

import pytest
import torch

from fastvid import cli
from fastvid.cli import doctor
from fastvid.functional import gated_residual_norm_modulate, guided_step
from fastvid.kernels._shared import native, paths


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Where the compiled part is looked for; nothing there yet, nothing remembered."""
    path = tmp_path / "_csrc.abi3.so"
    monkeypatch.setattr(native, "LIBRARY", path)
    native.failure.cache_clear()
    yield path
    native.failure.cache_clear()


def test_report_names_versions_machine_and_ops(capsys):
    assert cli.main(["doctor"]) == 0
    report = capsys.readouterr().out
    for line in ("torch ", "triton ", "free disk ", "nvcc ", "csrc ", "norm_modulate "):
        assert f"  {line}" in report


def test_long_names_keep_their_column(capsys, monkeypatch):
    name = "x" * 40
    monkeypatch.setattr(doctor, "ops", lambda broken: [("short", "CPU: a"), (name, "CPU: b")])
    cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert f"  {name}  CPU: b" in lines
    assert f"  {'short':42}CPU: a" in lines


def test_ops_are_said_to_take_the_paths_that_they_log(caplog):
    """Of ops whose compiled kernel has the name of another."""
    if not native.loaded():
        pytest.skip(f"no compiled library: {native.failure()}")
    paths.announce.cache_clear()
    x, row = torch.ones(1, 2, 8, requires_grad=True), torch.ones(1, 8)
    state = torch.ones(1, 1, 1, 2, 2)
    with caplog.at_level(logging.DEBUG, "fastvid.kernels"):
        total, y = gated_residual_norm_modulate(x, x, row, row, row)
        (total + y).sum().backward()
        guided_step(state, state, torch.ones(1, 5), torch.tensor(0), out=state)
    logged = dict(record.getMessage().split(": ") for record in caplog.records)
    logged["guided_step_into"] = logged.pop("guided_step")
    said = dict(doctor.ops([]))
    assert len(logged) == 3
    for op, path in logged.items():
        assert said[op].startswith(f"CPU: {path}"), op


def test_an_op_that_is_pytorch_on_a_gpu_is_not_said_to_be_triton(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    said = dict(doctor.ops([]))
    assert said["gated_residual"].endswith("GPU: PyTorch")
    assert said["gated_residual_backward"].endswith("GPU: Triton")


def test_absent_library_comes_with_the_command_that_builds_it(library, capsys):
    assert not native.loaded()
    assert cli.main(["doctor"]) == 0
    assert "not built: pip install --no-build-isolation -e ." in capsys.readouterr().out


def test_broken_library_is_warned_of_once_and_named(library, caplog, capsys):
    library.write_bytes(b"not a library")
    assert not native.loaded()
    assert not native.loaded()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(library) in caplog.text
    assert cli.main(["doctor"]) == 1
    assert f"BROKEN: {library} does not load" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cuda", "nvcc", "says"),
    [
        (None, "/bin/nvcc", "none: torch is a CPU build"),
        ("13.0", None, "not built: needs nvcc of CUDA 13.0; then pip install --no-build-isolation"),
        ("13.0", "/bin/nvcc", "not built: pip install --no-build-isolation -e ."),
    ],
)
def test_absent_cuda_kernels_come_with_what_builds_them(monkeypatch, cuda, nvcc, says):
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr(doctor.shutil, "which", lambda command: nvcc)
    assert doctor.cuda_absence().startswith(says)


@pytest.mark.parametrize("there", [True, False])
def test_cuda_kernels_are_reported(monkeypatch, capsys, there):
    monkeypatch.setattr(native, "cuda_loaded", lambda: there)
    cli.main(["doctor"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "csrc, CUDA" in line)
    assert line.endswith("  loaded") == there


@pytest.mark.parametrize(
    ("torch_version", "triton_version", "remedy"),
    [
        ("2.13.0+cpu", "3.7.1", None),
        ("2.11.0", "3.6.0", None),
        ("2.14.1", "3.8.2", None),
        ("2.13.0", None, None),
        ("9.0.0", "3.7.1", None),
        ("2.13.0", "3.9.0", "pip install 'triton==3.7.1'"),
        ("2.12.1", "3.7.1", "pip install 'triton==3.7.0'"),
        ("2.14.0", "3.7.1", "pip install 'triton==3.8.*'"),
    ],
)
def test_triton_must_be_the_one_of_torch(torch_version, triton_version, remedy):
    fault = doctor.triton_fault(torch_version, triton_version)
    assert fault is None if remedy is None else fault.endswith(remedy)


def test_wrong_triton_is_a_fault_of_the_machine(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "triton_fault", lambda torch, triton: "wrong triton")
    assert cli.main(["doctor"]) == 1
    assert "BROKEN: wrong triton" in capsys.readouterr().out


def test_missing_extra_is_no_fault(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "find_spec", lambda name: name == "triton" or None)
    assert cli.main(["doctor"]) == 0
    assert "without jsonargparse" in capsys.readouterr().out
