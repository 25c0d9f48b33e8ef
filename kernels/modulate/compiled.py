"""The C++ kernels on the CPU: which dtypes they know, and what they are handed."""

import torch
from torch import Tensor


def serves(*tensors: Tensor | torch.dtype | None) -> bool:
    """Whether the C++ kernels know these dtypes."""
    dtypes = (t.dtype if isinstance(t, Tensor) else t for t in tensors if t is not None)
    return all(dtype in (torch.float32, torch.bfloat16) for dtype in dtypes)


def forward(x, shift, scale, rms, eps, dtype):
    """The C++ kernel."""
    x, shift, scale = _rows_together(x), _rows_together(shift), _rows_together(scale)
    y = x.new_empty(x.shape, dtype=dtype)
    rstd = x.new_empty(x.shape[:2], dtype=torch.float32)
    mean = rstd.new_empty(0) if rms else torch.empty_like(rstd)
    if y.numel():
        torch.ops.fastvid_cpp.norm_modulate(x, shift, scale, rms, eps, y, mean, rstd)
    return y, mean, rstd


def backward(dy, x, scale, mean, rstd, rms):
    """The C++ kernel."""
    dy, x, scale = _rows_together(dy), _rows_together(x), _rows_together(scale)
    dx = x.new_empty(x.shape)
    if not dx.numel():
        return dx, scale.new_zeros(scale.shape), scale.new_zeros(scale.shape)
    dshift, dscale = scale.new_empty(scale.shape), scale.new_empty(scale.shape)
    torch.ops.fastvid_cpp.norm_modulate_backward(dy, x, scale, mean, rstd, rms, dx, dshift, dscale)
    return dx, dshift, dscale


def _rows_together(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
