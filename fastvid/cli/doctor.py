"""Say what this machine has, which path each op takes, and what to do about the rest."""

import argparse
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

CORE = ("torch", "numpy", "einops", "safetensors", "huggingface_hub")
TRITON_OF_TORCH = {  # from the requirements of PyTorch's own CUDA wheels
    "2.11": "3.6.0",
    "2.12": "3.7.0",
    "2.13": "3.7.1",
    "2.14": "3.8",
    "2.15": "3.9",
}
COMPILED_AS = {  # ops that another's compiled kernel serves too
    "gated_residual_norm_modulate": "norm_modulate",
    "gated_residual_norm_modulate_backward": "norm_modulate_backward",
    "guided_step_into": "guided_step",
}
PLAIN_ON_GPU = {"gated_residual"}  # one pass of PyTorch already


def main(argv: Sequence[str]) -> int:
    """Print the report; 1 if something that is there is broken, 0 otherwise."""
    argparse.ArgumentParser(prog="fastvid doctor", description=__doc__).parse_args(argv)
    broken: list[str] = []
    for title, section in (
        ("Versions", versions),
        ("Extras", extras),
        ("Machine", machine),
        ("Compiled part", compiled_part),
        ("Ops", ops),
    ):
        print(title)
        lines = list(section(broken))
        width = max(28, *(len(name) + 2 for name, _ in lines))
        for name, state in lines:
            print(f"  {name:{width}}{state}")
    for fault in broken:
        print(f"BROKEN: {fault}")
    print(f"{len(broken)} broken" if broken else "Everything that is here works.")
    return 1 if broken else 0


def installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def triton_fault(torch_version: str, triton_version: str | None) -> str | None:
    """The sentence to print if this Triton is not the one that this torch was built against."""
    wanted = TRITON_OF_TORCH.get(".".join(torch_version.split(".")[:2]))
    if triton_version is None or wanted is None:
        return None
    if (triton_version + ".").startswith(wanted + "."):
        return None
    return (
        f"torch {torch_version} was built against triton {wanted}, found {triton_version}:"
        f" pip install 'triton=={wanted}{'.*' if wanted.count('.') == 1 else ''}'"
    )


def versions(broken):
    from fastvid import __version__

    yield "fastvid", __version__
    yield "python", platform.python_version()
    for name in CORE:
        found = installed(name)
        if found is None:
            broken.append(f"{name} is missing: pip install {name}")
        yield name, found or "missing"
    triton = installed("triton")
    fault = triton_fault(installed("torch") or "", triton)
    if fault:
        broken.append(fault)
    yield "triton", triton or "not installed (needed on a GPU; CUDA builds of torch bring it)"


def extras(broken):
    from fastvid.cli import EXTRAS

    for extra in dict.fromkeys(EXTRAS.values()):
        absent = [m for m, owner in EXTRAS.items() if owner == extra and find_spec(m) is None]
        remedy = f"without {', '.join(absent)}: pip install 'fastvid[{extra}]'"
        yield extra, remedy if absent else "installed"


def machine(broken):
    import torch

    yield "system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    yield "threads", f"{torch.get_num_threads()}, {torch.backends.cpu.get_cpu_capability()}"
    if not torch.cuda.is_available():
        yield "GPU", gpu_absence(broken)
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        size = f"{gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
        yield f"GPU {index}", f"{gpu.name}, {size}, CUDA {torch.version.cuda}"
    free = shutil.disk_usage(Path.cwd()).free
    yield "free disk", f"{free / 2**30:.1f} GiB in {Path.cwd()}"


def gpu_absence(broken: list[str]) -> str:
    import torch

    if shutil.which("nvidia-smi") is None:
        return "none"
    if torch.version.cuda is None:
        broken.append("there is an NVIDIA driver, but torch is a CPU build: pip install torch")
        return "hidden from a CPU build of torch"
    return "none visible to torch"


def compiled_part(broken):
    from fastvid.kernels._shared import native

    for name, command in (("C++ compiler", os.environ.get("CXX", "c++")), ("nvcc", "nvcc")):
        path = shutil.which(command)
        yield name, first_line(path) if path else "none"
    reason = native.failure()
    if reason and native.LIBRARY.exists():
        broken.append(reason)
    yield "csrc", reason or f"loaded from {native.LIBRARY}"
    yield "csrc, CUDA kernels", "loaded" if native.cuda_loaded() else cuda_absence()


def cuda_absence() -> str:
    """Why the compiled part has no CUDA kernels, and what to do about it."""
    import torch

    from fastvid.kernels._shared import native

    if torch.version.cuda is None:
        return "none: torch is a CPU build"
    nvcc = "" if shutil.which("nvcc") else f"needs nvcc of CUDA {torch.version.cuda}; then "
    return f"not built: {nvcc}{native.BUILD}"


def first_line(compiler: str) -> str:
    """What `compiler` says of itself, beside its path."""
    run = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if "release" in line] or run.stdout.split(
        "\n"
    )
    return f"{lines[0].strip()} ({compiler})"


def ops(broken):
    """Path of every registered op on the CPU and, where there is one, on the GPU."""
    import torch

    from fastvid import functional  # noqa: F401  registers the ops
    from fastvid.kernels._shared import native

    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    gpu = torch.cuda.is_available()
    if gpu and find_spec("triton") is None:
        broken.append("there is a GPU, but triton is not installed; see the line of triton above")
    for qualified in sorted(torch._C._dispatch_get_all_op_names()):
        if not qualified.startswith("fastvid::"):
            continue
        name = qualified.removeprefix("fastvid::")
        kernel = COMPILED_AS.get(name, name)
        compiled = native.loaded() and hasattr(torch.ops.fastvid_cpp, kernel)
        paths = [f"CPU: {'C++, PyTorch for the rest' if compiled else 'PyTorch'}"]
        if gpu:
            path = "PyTorch" if name in PLAIN_ON_GPU else "Triton"
            paths.append(f"GPU: {path if has_kernel(qualified, 'CUDA') else 'none'}")
        yield name, "; ".join(paths)
