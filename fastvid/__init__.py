"""fastvid: custom kernels for efficient video diffusion."""

from fastvid import functional

__all__ = ["__version__", "functional"]
__version__ = "0.1.0"
