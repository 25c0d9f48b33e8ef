"""adaLN on video tokens: modulation before a branch, the gated residual after it."""

import torch
from torch import Tensor

from fastvid.functional import norm_modulate


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters, then `* (1 + scale) + shift`.

    Args:
        x: (B, T, N, D) tokens.
        shift, scale: (B, D), or (1, D) when all samples share them.
    """
    return norm_modulate(x.flatten(1, 2), shift, scale).view(x.shape)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor | None = None) -> Tensor:
    """`x + gate * branch` for tokens (B, T, N, D) and gate (B, D) or (1, D); no gate is one.

    Where nothing is recorded for a backward, `x` itself is updated and returned.
    """
    if torch.is_grad_enabled():
        return x + branch if gate is None else torch.addcmul(x, branch, gate[:, None, None])
    return x.add_(branch) if gate is None else x.addcmul_(branch, gate[:, None, None])
