"""The CPU paths of `norm_modulate`: PyTorch's fused pieces, and the compiled kernel."""

import torch
from torch import Tensor

from .reference import per_group

# Groups of at least so many tokens go through PyTorch's LayerNorm one by one.
LONG_GROUP = 16


def forward(x, shift, scale, rms, eps, dtype):
    """LayerNorm or RMSNorm in float32 (float64 for float64), modulated in place."""
    if _in_long_groups(x, scale, rms):
        return _forward_by_group(x, shift, scale, eps, dtype)
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
    if _in_long_groups(x, scale, rms):
        return _backward_by_group(dy, x, scale, mean, rstd)
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


def _in_long_groups(x: Tensor, scale: Tensor, rms: bool) -> bool:
    """Where a wide copy of the whole of x would cost more than a call per group."""
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    return narrow and not rms and x.shape[1] >= LONG_GROUP * max(_groups(scale), 1)


def _forward_by_group(x, shift, scale, eps, dtype):
    """Modulation is the affine part of LayerNorm: float32 beside a narrow x, and rounded once."""
    y = x.new_empty(x.shape, dtype=dtype)
    mean, rstd = x.new_empty((2, *x.shape[:2]), dtype=torch.float32)
    gain, offset = _rows(1 + scale.float(), mean), _rows(shift, mean)
    for b, g, rows in _each_group(x, scale, most=x.shape[1]):
        affine = gain[b % len(gain), g, 0].contiguous(), offset[b % len(offset), g, 0].contiguous()
        y[b, rows], m, r = torch.native_layer_norm(x[b, rows], x.shape[-1:], *affine, eps)
        mean[b, rows], rstd[b, rows] = m.squeeze(-1), r.squeeze(-1)
    return y, mean, rstd


def _backward_by_group(dy, x, scale, mean, rstd):
    """As `backward`, on wide copies of so few tokens that they stay in the cache."""
    dx = x.new_empty(x.shape)
    gain = _rows(1 + scale.float(), mean)
    dshift, dscale = gain.new_zeros((2, *gain.shape))
    for b, g, rows in _each_group(x, scale, most=128):
        own, stats = b % len(gain), (mean[b, rows, None], rstd[b, rows, None])
        wide, upstream = x[b, rows].float(), dy[b, rows].float()
        dx[b, rows], _, _ = torch.ops.aten.native_layer_norm_backward(
            upstream * gain[own, g], wide, x.shape[-1:], *stats, None, None, [True, False, False]
        )
        dshift[own, g, 0] += upstream.sum(0)
        dscale[own, g, 0] += wide.sub_(stats[0]).mul_(stats[1]).mul_(upstream).sum(0)
    return dx, dshift.to(scale.dtype).view(scale.shape), dscale.to(scale.dtype).view(scale.shape)


def _each_group(x: Tensor, modulation: Tensor, most: int):
    """Sample, group and a slice of at most `most` of its tokens."""
    tokens = x.shape[1] // _groups(modulation)
    for b in range(x.shape[0]):
        for g in range(_groups(modulation)):
            for start in range(0, tokens, most):
                first = g * tokens + start
                yield b, g, slice(first, first + min(most, tokens - start))


def _groups(modulation: Tensor) -> int:
    return modulation.shape[1] if modulation.dim() == 3 else 1


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _by_group(rows: Tensor, modulation: Tensor) -> Tensor:
    """(B, N, D) viewed as (B, groups, tokens, D)."""
    groups = _groups(modulation)
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
