"""What `temporal_attention` means: plain PyTorch on any device, best run in float64."""

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]


def temporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    known: Tensor | None = None,
    window: tuple[int, int] | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention along T, arguments as in `op.temporal_attention`."""
    p, _, _ = _probabilities(q, k, known, window, rotary, scale)
    return torch.einsum("bnhts,bsnhe->btnhe", p, v)


def temporal_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    known: Tensor | None = None,
    window: tuple[int, int] | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, written out."""
    p, turned_q, turned_k = _probabilities(q, k, known, window, rotary, scale)
    dv = torch.einsum("bnhts,btnhe->bsnhe", p, dout)
    dp = torch.einsum("btnhe,bsnhe->bnhts", dout, v)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * _scale(q, scale)
    dq = torch.einsum("bnhts,bsnhe->btnhe", ds, turned_k)
    dk = torch.einsum("bnhts,btnhe->bsnhe", ds, turned_q)
    if rotary is not None:
        cos, sin = rotary
        dq, dk = rotate(dq, (cos, -sin)), rotate(dk, (cos, -sin))
    return dq, dk, dv


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), ... of x (B, T, N, heads, E) by the angles of its frame."""
    cos, sin = (table[: x.shape[1], None, None].to(x.dtype) for table in rotary)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def visible(
    frames: int, known: Tensor | None, window: tuple[int, int] | None, device: torch.device
) -> Tensor:
    """(B|1, T, T) bool: which frames (last axis) each frame sees. Every frame sees itself."""
    t = torch.arange(frames, device=device)
    after = t[None, :] - t[:, None]  # of the frame that is seen, in frames
    seen = torch.ones_like(after, dtype=torch.bool)[None]
    if window is not None:
        back, forward = window
        seen = seen & (after >= -back) & (after <= forward)
    if known is not None:
        seen = seen & ~known[:, :, None]
    return seen | (after == 0)


def _probabilities(q, k, known, window, rotary, scale):
    """(B, N, heads, T, T), and q and k as they were turned."""
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    scores = torch.einsum("btnhe,bsnhe->bnhts", q, k) * _scale(q, scale)
    seen = visible(q.shape[1], known, window, q.device)[:, None, None]
    return scores.masked_fill(~seen, -torch.inf).softmax(-1), q, k


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale
