"""What pyproject.toml cannot say: `kernels/` is `fastvid.kernels`; `csrc/` is built if possible.

FASTVID_CSRC=0 leaves the compiled part out.
"""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

rooms = [f"fastvid.kernels.{name}" for name in find_namespace_packages("kernels")]
packages = [*find_packages(include=["fastvid", "fastvid.*"]), "fastvid.kernels", *rooms]


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
    cuda = torch.version.cuda is not None and CUDA_HOME is not None
    if cuda:
        sources += sorted(str(path) for path in Path("csrc").glob("*/*.cu"))
        targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in ("80", "90a")]
        flags["nvcc"] = ["-std=c++20", "-O3", "-DUSE_CUDA", *define, *targets]
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
