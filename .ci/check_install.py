"""Fail if installing the package replaced the pinned torch, or brought in what nothing may need."""

import shutil
import sys
from importlib import metadata
from pathlib import Path

pins = [line.split("==") for line in Path("constraints.txt").read_text().split() if "==" in line]
names = {(dist.metadata["Name"] or "").lower() for dist in metadata.distributions()}
faults = [
    f"{name} is {metadata.version(name)}, constraints.txt says {pin}"
    for name, pin in pins
    if metadata.version(name).partition("+")[0] != pin
]
if "torchvision" in names:
    faults.append("torchvision was installed; nothing here may need it")
if shutil.which("nvidia-smi") is None:
    heavy = sorted(name for name in names if name.startswith("nvidia-") and name != "nvidia-ml-py")
    if heavy:
        faults.append(
            f"a machine without a GPU got {', '.join(heavy)}: torch is a CUDA build here; remove"
            " .venv and give the index of CPU builds: make TORCH_INDEX=URL test"
        )
sys.exit("\n".join(faults) or None)
