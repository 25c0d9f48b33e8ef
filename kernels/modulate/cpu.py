"""The CPU paths of `norm_modulate`: PyTorch's fused pieces, and the compiled kernel."""

import torch
from torch import Tensor

from .reference import per_group


def forward(x, shift, scale, rms, eps, dtype):
    """LayerNorm or RMSNorm in float32 (float64 for float64), modulated in place."""
    wide = x.to(_accumulator(x))
    if rms:
        mean = wide.new_empty(0)
        rstd = torch.rsqrt(wide.square().mean(-1) + eps)
        y = wide * rstd.unsqueeze(-1)
    else:
        y, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], None, None, eps)
        mean, rstd = mean.squeeze(-1), rstd.squeeze(-1)
    grouped = _by_group(y, scale)
    torch.addcmul(_rows(shift, y), grouped, 1 + _rows(scale, y), out=grouped)
    return y.to(dtype).contiguous(), mean, rstd


def backward(dy, x, scale, mean, rstd, rms):
    """dx, dshift, dscale."""
    wide = x.to(_accumulator(x))
    dy = dy.to(wide.dtype)
    mean, rstd = mean.unsqueeze(-1), rstd.unsqueeze(-1)
    dnormed = (_by_group(dy, scale) * (1 + _rows(scale, dy))).flatten(1, 2)
    normed = wide * rstd if rms else (wide - mean).mul_(rstd)
    if rms:
        dx = torch.addcmul(dnormed, normed, (dnormed * normed).mean(-1, keepdim=True), value=-1)
        dx *= rstd
    else:
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            dnormed, wide, x.shape[-1:], mean, rstd, None, None, [True, False, False]
        )
    dshift, dscale = per_group(dy, scale), per_group(normed.mul_(dy), scale)
    return dx.to(x.dtype).contiguous(), dshift.to(scale.dtype), dscale.to(scale.dtype)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _by_group(rows: Tensor, modulation: Tensor) -> Tensor:
    """(B, N, D) viewed as (B, groups, tokens, D)."""
    groups = modulation.shape[1] if modulation.dim() == 3 else 1
    return rows.unflatten(1, (groups, rows.shape[1] // max(groups, 1)))


def _rows(modulation: Tensor, like: Tensor) -> Tensor:
    """(B|1, D) or (B|1, groups, D) viewed as (B|1, groups, 1, D), in the dtype of `like`."""
    groups = modulation if modulation.dim() == 3 else modulation.unsqueeze(1)
    return groups.unsqueeze(2).to(like.dtype)


def compiled_serves(*dtypes: torch.dtype) -> bool:
    """Whether the C++ kernel knows these dtypes."""
    return all(dtype in (torch.float32, torch.bfloat16) for dtype in dtypes)


def compiled_forward(x, shift, scale, rms, eps, dtype):
    """The C++ kernel."""
    x, shift, scale = _rows_together(x), _rows_together(shift), _rows_together(scale)
    y = x.new_empty(x.shape, dtype=dtype)
    rstd = x.new_empty(x.shape[:2], dtype=torch.float32)
    mean = rstd.new_empty(0) if rms else torch.empty_like(rstd)
    if y.numel():
        torch.ops.fastvid_cpp.norm_modulate(x, shift, scale, rms, eps, y, mean, rstd)
    return y, mean, rstd


def compiled_backward(dy, x, scale, mean, rstd, rms):
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
