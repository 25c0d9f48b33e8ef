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
    wide = _accumulator(x)
    dy, x_wide = dy.to(wide), x.to(wide)
    rstd = rstd.unsqueeze(-1)
    normed = x_wide * rstd if rms else (x_wide - mean.unsqueeze(-1)) * rstd
    dshift = per_group(dy, scale).to(scale.dtype)
    dscale = per_group(dy * normed, scale).to(scale.dtype)
    g = (_by_group(dy, scale) * (1 + _rows(scale, dy))).flatten(1, 2)
    projection = (g * normed).mean(-1, keepdim=True)
    if not rms:
        g -= g.mean(-1, keepdim=True)
    dx = torch.addcmul(g, normed, projection, value=-1).mul_(rstd)
    return dx.to(x.dtype).contiguous(), dshift.contiguous(), dscale.contiguous()


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
