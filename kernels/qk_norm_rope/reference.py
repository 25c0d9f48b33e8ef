"""What `qk_norm_rope` means: plain PyTorch on any device, best run in float64."""

import torch
from torch import Tensor

from .rotary import Rotary


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    *,
    norm: str | None = "rms",
    across_heads: bool = False,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    eps: float = 1e-6,
    rotary: Rotary | None = None,
) -> tuple[Tensor, Tensor]:
    """q and k, normalised and turned; arguments as in `op.qk_norm_rope`."""
    q = _affine(q, q_weight, q_bias, norm, across_heads, eps)
    k = _affine(k, k_weight, k_bias, norm, across_heads, eps)
    return rotate(q, rotary), rotate(k, rotary)


def qk_norm_rope_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    norm: str | None = "rms",
    across_heads: bool = False,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    rotary: Rotary | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, q_weight, k_weight, q_bias and k_bias, written out."""
    grads = (
        _gradients(rotate(dy, rotary, back=True), x, weight, norm, across_heads, eps)
        for dy, x, weight in ((dq_out, q, q_weight), (dk_out, k, k_weight))
    )
    return tuple(grad for pair in zip(*grads, strict=True) for grad in pair)


def rotate(x: Tensor, rotary: Rotary | None, back: bool = False) -> Tensor:
    """Turn x (B, N, heads, E) by the angles of its tokens, or `back`."""
    if rotary is None:
        return x
    turned, channel, pair = [], 0, 0
    for axis, dim in enumerate(rotary.dims):
        row, columns = rotary.rows[..., axis].long(), slice(pair, pair + dim // 2)
        cos, sin = (t[:, columns][row].unsqueeze(2).to(x.dtype) for t in (rotary.cos, rotary.sin))
        sin = -sin if back else sin
        part = x[..., channel : channel + dim]
        split = (-1, 2) if rotary.interleaved else (2, -1)
        a, b = part.unflatten(-1, split).unbind(split.index(2) - 2)
        pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=split.index(2) - 2)
        turned.append(pairs.flatten(-2))
        channel, pair = channel + dim, pair + dim // 2
    return torch.cat([*turned, x[..., channel:]], dim=-1)


def _affine(x, weight, bias, norm, across_heads, eps):
    """(B, N, heads, E), normalised, with weight and bias."""
    y, _ = _normalize(x, norm, across_heads, eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.reshape(x.shape)


def _gradients(dy, x, weight, norm, across_heads, eps):
    """Of x, weight and bias."""
    normed, rstd = _normalize(x, norm, across_heads, eps)
    dy = dy.reshape(normed.shape)
    rows = tuple(range(dy.dim() - 1))
    g = dy if weight is None else dy * weight
    dx = g
    if norm is not None:
        dx = g - normed * (g * normed).mean(-1, keepdim=True)
        if norm == "layer":
            dx = dx - g.mean(-1, keepdim=True)
        dx = dx * rstd
    return dx.reshape(x.shape), (dy * normed).sum(rows), dy.sum(rows)


def _normalize(x, norm, across_heads, eps):
    """(B, N, heads, E) or across heads (B, N, heads * E); and 1 / its deviation."""
    x = x.flatten(2) if across_heads else x
    if norm is None:
        return x, torch.ones_like(x[..., :1])
    centred = x if norm == "rms" else x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd, rstd
