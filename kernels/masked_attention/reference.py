"""The definition: dense attention in plain PyTorch, with its gradient written out.

Everything is computed in the dtype of `q`; give float64 for an oracle. Memory is O(tokens²).
"""

import torch
from torch import Tensor


def forward(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over the visible pairs.

    Args:
        q: (B, N, heads, E). k, v: (B, M, heads, E). visible: bool (B or 1, N, M).
    Returns:
        out (B, N, heads, E) and lse (B, heads, N), the natural log of each row's sum of
        exponentials. A row that sees nothing has out 0 and lse -inf.
    """
    weights, lse = _weights(q, k, visible, scale)
    return torch.einsum("bhnm,bmhe->bnhe", weights, v), lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `q`, `k` and `v` for the cotangent `dout` of `out`."""
    weights, _ = _weights(q, k, visible, scale)
    dv = torch.einsum("bhnm,bnhe->bmhe", weights, dout)
    dweights = torch.einsum("bnhe,bmhe->bhnm", dout, v)
    delta = (dweights * weights).sum(-1, keepdim=True)
    dscores = weights * (dweights - delta) * scale
    dq = torch.einsum("bhnm,bmhe->bnhe", dscores, k)
    dk = torch.einsum("bhnm,bnhe->bmhe", dscores, q)
    return dq, dk, dv


def _weights(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bnhe,bmhe->bhnm", q, k) * scale
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    blind = lse == -torch.inf
    weights = (scores - lse.masked_fill(blind, 0.0)[..., None]).exp()
    return weights, lse
