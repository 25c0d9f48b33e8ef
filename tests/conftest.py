"""Shared fixtures. Without CUDA the Triton kernels run in the interpreter."""

import os

import pytest
import torch

# Triton reads this once, at its first import, so it is settled before any test module loads.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption("--parity-dir", default=None, help="folder with the reference tensors")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def parity_dir(request):
    path = request.config.getoption("--parity-dir")
    if path is None:
        pytest.skip("give --parity-dir to compare with the reference tensors")
    from pathlib import Path

    return Path(path)


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def rand(device):
    """`rand(2, 3, dtype=...)`: normal numbers, the same in every run."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape, dtype=torch.float32):
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float64)
        return values.to(dtype)

    return draw
