"""The CUDA sources, compiled for the GPUs of the compiled part. Needs nvcc, no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(ROOT.glob("csrc/*/*.cu"))
# Most registers of any of its kernels: 65536 / 128 / registers blocks of 128 threads run at once.
REGISTERS = {"guided_step_cuda": 48, "philox_cuda": 32}


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_keep_to_their_registers_and_use_no_stack(source):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    from torch.utils.cpp_extension import include_paths

    command = [nvcc, "-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"-I{path}" for path in include_paths()]
    command += [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in ("80", "90a")]
    command += ["--threads=2", "--resource-usage", "-c", "-o", "/dev/null"]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = done.stdout + done.stderr
    stack = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", found)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", found)]
    assert len(stack) == len(registers) >= 2  # a kernel for two architectures at least
    assert set(stack) == {("0", "0")}
    assert max(registers) <= REGISTERS[source.stem]
    assert "warning" not in found
