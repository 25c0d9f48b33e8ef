"""What `asymmetric_attention` means: plain PyTorch on any device, best run in float64."""

import torch
from torch import Tensor


def asymmetric_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scope: str = "frame",
    known: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Arguments as in `op.asymmetric_attention`."""
    p = _probabilities(q, k, scope, scale)
    out = torch.einsum("bthnm,btmhe->btnhe", p, _seen(v, q, scope))
    return _wanted(out, known)


def asymmetric_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scope: str = "frame",
    known: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, written out; those of k and v have their shapes."""
    dout = _wanted(dout, known)
    p = _probabilities(q, k, scope, scale)
    seen_k, seen_v = _seen(k, q, scope), _seen(v, q, scope)
    dv = torch.einsum("bthnm,btnhe->btmhe", p, dout)
    dp = torch.einsum("btnhe,btmhe->bthnm", dout, seen_v)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * _scale(q, scale)
    dq = torch.einsum("bthnm,btmhe->btnhe", ds, seen_k)
    dk = torch.einsum("bthnm,btnhe->btmhe", ds, q)
    return dq, _collect(dk, k, scope), _collect(dv, v, scope)


def _probabilities(q, k, scope, scale):
    """(B, T, heads, Nq, keys)."""
    scores = torch.einsum("btnhe,btmhe->bthnm", q, _seen(k, q, scope)) * _scale(q, scale)
    return scores.softmax(-1)


def _seen(x: Tensor, q: Tensor, scope: str) -> Tensor:
    """(B, T, keys, heads, E): what the queries of every frame see of x."""
    B, T = q.shape[:2]
    if scope == "clip":
        x = x.flatten(1, 2).unsqueeze(1)
    return x.expand(B, T, *x.shape[2:])


def _collect(dx: Tensor, x: Tensor, scope: str) -> Tensor:
    """The transpose of `_seen`: a sum over all that saw the same keys."""
    if scope == "clip":
        dx = dx.sum(1).unflatten(1, x.shape[1:3])
    return dx.sum_to_size(x.shape)


def _wanted(out: Tensor, known: Tensor | None) -> Tensor:
    return out if known is None else out.masked_fill(known[:, :, None, None, None], 0)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale
