"""What pyproject.toml cannot say: `kernels/` is `fastvid.kernels`; `csrc/` is built if possible.

FASTVID_CSRC=0 leaves the compiled part out.
"""

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

rooms = [f"fastvid.kernels.{name}" for name in find_namespace_packages("kernels")]
packages = [*find_packages(include=["fastvid", "fastvid.*"]), "fastvid.kernels", *rooms]


def nvcc_of_torch(cuda: str | None, home: str | None) -> bool:
    """Whether `home` has an nvcc of the CUDA release of torch, without which nothing compiles."""
    nvcc = Path(home or "", "bin", "nvcc")
    if cuda is None or home is None or not nvcc.exists():
        return False
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)", said)
    return release is not None and release[1] == cuda.split(".")[0]


def compiled_part() -> dict:
    """Every `csrc/<room>/*.cpp` in one library over PyTorch's stable ABI; `.cu` too with nvcc."""
    sources = sorted(str(path) for path in Path("csrc").glob("*/*.cpp"))
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if os.environ.get("FASTVID_CSRC") == "0" or not (sources and compiler and find_spec("torch")):
        return {}
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    # One binary for every torch from 2.11; with py_limited_api, for every Python from 3.10.
    define = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    host = ["-O3", "-g0", "-fopenmp-simd", "-fno-math-errno", "-fvisibility=hidden"]
    flags = {"cxx": ["-std=c++20", *host, *define]}
    cuda = nvcc_of_torch(torch.version.cuda, CUDA_HOME)
    if cuda:
        sources += sorted(str(path) for path in Path("csrc").glob("*/*.cu"))
        # compute_80: what later GPUs compile when the library is loaded.
        targets = [("80", "[sm_80,compute_80]"), ("90a", "sm_90a")]
        flags["nvcc"] = [f"-gencode=arch=compute_{sm},code={code}" for sm, code in targets]
        flags["nvcc"] += ["-std=c++20", "-O3", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA"]
        flags["nvcc"] += define
    extension = (CUDAExtension if cuda else CppExtension)(
        "fastvid.kernels._shared._csrc",
        sources,
        depends=sorted(str(path) for path in Path("csrc").glob("*/*.h")),
        extra_compile_args=flags,
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    packages=packages,
    package_dir={"fastvid.kernels": "kernels"},
    package_data={"": ["*.md", "*.yaml", "py.typed"]},
    **compiled_part(),
)
