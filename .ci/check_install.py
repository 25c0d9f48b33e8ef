"""Fail if installing the package replaced the pinned torch, or brought in what nothing may need."""

import shutil
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def faults(pins: Iterable[Requirement], installed: Mapping[str, str], gpu: bool) -> list[str]:
    """What is wrong with the distributions `installed`, lower-case name to version.

    A pin without a local tag takes any build of that release, `2.13.0+cpu` as well as `+cu130`:
    the index decides which. What a CUDA build brings to a machine without a GPU is told below.
    """
    found = [
        f"{pin.name} is {installed.get(pin.name, 'missing')}, constraints.txt says {pin}"
        for pin in pins
        if not pin.specifier.contains(installed.get(pin.name, "0"), prereleases=True)
    ]
    if "torchvision" in installed:
        found.append("torchvision was installed; nothing here may need it")
    heavy = sorted(n for n in installed if n.startswith("nvidia-") and n != "nvidia-ml-py")
    if heavy and not gpu:
        found.append(
            f"a machine without a GPU got {', '.join(heavy)}: torch is a CUDA build here; remove"
            " .venv and give the index of CPU builds: make TORCH_INDEX=URL test"
        )
    return found


if __name__ == "__main__":
    lines = (line.partition("#")[0] for line in Path("constraints.txt").read_text().splitlines())
    pins = [Requirement(line) for line in lines if line.strip()]
    here = {(d.metadata["Name"] or "").lower(): d.version for d in metadata.distributions()}
    sys.exit("\n".join(faults(pins, here, shutil.which("nvidia-smi") is not None)) or None)
