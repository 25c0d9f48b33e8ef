"""What is said of the machine, and the cores that a measurement keeps to."""

import os
import subprocess
import sys
import types

import pytest
import torch

from benchmarks import machine

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_a_measurement_keeps_to_as_many_cores_as_threads():
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    with machine.pinned(1):
        assert torch.get_num_threads() == 1
        assert len(os.sched_getaffinity(0)) == 1
        assert all(len(allowed) == 1 for allowed in machine._affinities().values())
        assert machine.environment(CPU)["threads"] == 1
        assert machine.environment(CPU)["cores"] == sorted(os.sched_getaffinity(0))
    assert torch.get_num_threads() == threads
    assert os.sched_getaffinity(0) == cores
    assert all(allowed == cores for allowed in machine._affinities().values())


def test_the_cores_come_back_after_an_error():
    cores = os.sched_getaffinity(0)
    with pytest.raises(KeyError), machine.pinned(1):
        raise KeyError
    assert os.sched_getaffinity(0) == cores


def test_ceilings_are_of_both_dtypes_and_of_a_copy():
    found = machine.measure_ceilings(CPU, quick=True)
    assert found.keys() == {
        "copy_tb_per_s",
        "matmul_bf16_tflop_per_s",
        "matmul_fp32_tflop_per_s",
    }
    assert min(found.values()) > 0


def test_environment_names_what_a_number_belongs_to():
    found = machine.environment(CPU)
    names = ("machine", "torch", "triton", "python", "commit", "date", "driver", "compiled")
    assert set(names) <= found.keys()
    assert found["driver"] is None


@pytest.fixture
def driver(monkeypatch):
    """A stand-in of nvidia-ml-py, for the device whose id is `id`."""

    class NVMLError(Exception):
        pass

    module = types.ModuleType("pynvml")
    module.__spec__ = types.SimpleNamespace()
    module.NVMLError = NVMLError
    module.NVML_CLOCK_SM, module.NVML_CLOCK_MEM, module.NVML_TEMPERATURE_GPU = 1, 2, 0
    module.nvmlInit = lambda: None
    module.nvmlSystemGetDriverVersion = lambda: "580.0"
    module.nvmlDeviceGetHandleByUUID = {"GPU-id": "handle"}.__getitem__
    module.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(used=3 * 2**20)
    module.nvmlDeviceGetClockInfo = lambda handle, kind: {1: 1980, 2: 3201}[kind]
    module.nvmlDeviceGetPowerUsage = lambda handle: 512_500
    module.nvmlDeviceGetTemperature = lambda handle, sensor: 41
    monkeypatch.setitem(sys.modules, "pynvml", module)
    properties = types.SimpleNamespace(uuid="id")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return module


def test_state_of_the_gpu_comes_from_the_driver(driver):
    assert machine.gpu_state(CUDA) == {
        "driver": "580.0",
        "device_mib": 3.0,
        "sm_mhz": 1980,
        "memory_mhz": 3201,
        "power_w": 512.5,
        "celsius": 41,
    }


def test_state_of_the_gpu_is_none_where_the_driver_says_nothing(driver, monkeypatch):
    def refuse(handle):
        raise driver.NVMLError

    driver.nvmlDeviceGetPowerUsage = refuse
    assert set(machine.gpu_state(CUDA).values()) == {None}
    monkeypatch.delitem(sys.modules, "pynvml")
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    assert set(machine.gpu_state(CUDA).values()) == {None}
    assert machine.gpu_state(CUDA).keys() == machine.gpu_state(CPU).keys()


def test_results_and_pages_make_no_commit_dirty(tmp_path):
    def git(*command):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)

    assert machine.commit(tmp_path) is None
    files = [tmp_path / "benchmarks/results/cpu/a.jsonl", tmp_path / "README.md", tmp_path / "a.py"]
    files[0].parent.mkdir(parents=True)
    for file in files:
        file.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one")
    head = machine.commit(tmp_path)
    assert head
    assert not head.endswith("-dirty")
    for file, expected in zip(files, (head, head, f"{head}-dirty"), strict=True):
        file.write_text("2")
        assert machine.commit(tmp_path) == expected
