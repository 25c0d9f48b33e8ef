"""What the ops mean: plain PyTorch on any device, best run in float64."""

import torch
from torch import Tensor


def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, *, rms: bool = False, eps: float = 1e-6
) -> Tensor:
    """`norm(x) * (1 + scale) + shift`, shapes as in `op.norm_modulate`."""
    normed, _ = _normalize(x, rms, eps)
    return normed * (1 + per_token(scale, x)) + per_token(shift, x)


def norm_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, *, rms: bool = False, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale, written out."""
    normed, rstd = _normalize(x, rms, eps)
    g = dy * (1 + per_token(scale, x))
    dx = g - normed * (g * normed).mean(-1, keepdim=True)
    if not rms:
        dx = dx - g.mean(-1, keepdim=True)
    return dx * rstd, per_group(dy, scale), per_group(dy * normed, scale)


def gated_residual(x: Tensor, h: Tensor, gate: Tensor | None) -> Tensor:
    """`x + gate * h`; without a gate `x + h`."""
    return x + (h if gate is None else per_token(gate, x) * h)


def gated_residual_backward(
    dsum: Tensor, h: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of h and gate; that of x is `dsum` itself."""
    if gate is None:
        return dsum, None
    return per_token(gate, h) * dsum, per_group(dsum * h, gate)


def gated_residual_norm_modulate(
    x: Tensor,
    h: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    *,
    rms: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The sum `x + gate * h`, and the sum normalised and modulated."""
    total = gated_residual(x, h, gate)
    return total, norm_modulate(total, shift, scale, rms=rms, eps=eps)


def gated_residual_norm_modulate_backward(
    dsum: Tensor,
    dy: Tensor,
    total: Tensor,
    h: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    *,
    rms: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of x, h, gate, shift and scale; `total` is the sum that forward returned."""
    through_norm, dshift, dscale = norm_modulate_backward(dy, total, scale, rms=rms, eps=eps)
    dx = dsum + through_norm
    return dx, *gated_residual_backward(dx, h, gate), dshift, dscale


def _normalize(x: Tensor, rms: bool, eps: float) -> tuple[Tensor, Tensor]:
    centred = x if rms else x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd, rstd


def per_token(modulation: Tensor, x: Tensor, starts: Tensor | None = None) -> Tensor:
    """Repeat (B|1, D) or (B|1, groups, D) to one row per token, (B, N, D).

    Groups are equal parts of the tokens or, of unequal frames, group `g` owns those from
    `starts[b, g]` to `starts[b, g + 1]`.
    """
    groups = modulation if modulation.dim() == 3 else modulation.unsqueeze(1)
    if starts is None:
        tokens = x.shape[1] // max(groups.shape[1], 1)
        return groups.repeat_interleave(tokens, dim=1).expand(x.shape)
    group = (starts[:, 1:, None] <= torch.arange(x.shape[1], device=x.device)).sum(1)  # (B|1, N)
    return groups.expand(len(x), -1, -1).gather(1, group[:, :, None].expand(x.shape))


def per_group(rows: Tensor, modulation: Tensor) -> Tensor:
    """Sum (B, N, D) rows to the shape of `modulation`: the transpose of `per_token`."""
    B, N, D = rows.shape
    groups = modulation.shape[1] if modulation.dim() == 3 else 1
    summed = rows.reshape(B, groups, N // max(groups, 1), D).sum(2)
    if modulation.shape[0] == 1:
        summed = summed.sum(0, keepdim=True)
    return summed.reshape(modulation.shape)
