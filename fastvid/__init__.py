"""fastvid: custom kernels for efficient video diffusion."""

__version__ = "0.1.0"
