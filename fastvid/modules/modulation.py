"""adaLN on video tokens: modulation before a branch, the gated residual after it."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from fastvid import functional
from fastvid.modules.linear import Deferred, is_plain


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Deferred:
    """LayerNorm without parameters, then `* (1 + scale) + shift`.

    Args:
        x: (B, T, N, D) tokens.
        shift, scale: (B, D), or (1, D) when all samples share them.
    """
    return Deferred(_modulated, (x, shift, scale))


def normed(x: Tensor, norm: nn.Module) -> Tensor | Deferred:
    """The affine LayerNorm `norm` of x (..., D); made now where `norm` is wrapped or hooked."""
    if is_plain(norm, nn.LayerNorm):
        return Deferred(partial(_normed, eps=norm.eps), (x, norm.weight, norm.bias))
    return norm(x)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return functional.norm_modulate(x.flatten(1, 2), shift, scale).view(x.shape)


def _normed(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor | None = None, *, in_place: bool = False
) -> Tensor:
    """`x + gate * branch` for tokens (B, T, N, D) and gate (B, D) or (1, D); no gate is one.

    `in_place` writes the sum into `x`, for where nothing is recorded for a backward.
    """
    if gate is None:
        return x.add_(branch) if in_place else x + branch
    if in_place:
        return x.addcmul_(branch, gate[:, None, None])
    return functional.gated_residual(x.flatten(1, 2), branch.flatten(1, 2), gate).view(x.shape)
