"""The compiled part: what `setup.py` makes of `csrc/`, if this machine could build it."""

import functools
import logging
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_csrc.abi3.so")
BUILD = "pip install --no-build-isolation -e .  (in the checkout; needs a C++20 compiler and ninja)"


@functools.cache
def failure() -> str | None:
    """Load the compiled part once; None if it is in this process, else the reason it is not."""
    if not LIBRARY.exists():
        return f"not built: {BUILD}"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        reason = f"{LIBRARY} does not load, build it again: {BUILD}\n{error}"
        logging.getLogger("fastvid.kernels").warning("%s", reason)
        return reason
    return None


def loaded() -> bool:
    """True if the ops of `csrc/` are there to be called as `torch.ops.fastvid_cpp.<name>`."""
    return failure() is None


@functools.cache
def cuda_loaded() -> bool:
    """True if it holds the CUDA kernels too, as `torch.ops.fastvid_cuda.<name>`."""
    return failure() is None and hasattr(torch.ops.fastvid_cuda, "guided_step")
