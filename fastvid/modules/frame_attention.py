"""Self-attention with normalised, turned q and k, over a frame, over time or over a whole clip.

The frames of a clip are given (known, clean) or to be made. Under identity attention a known frame
sees itself alone, so what becomes of it never depends on the others: it can be computed by itself,
once, and its keys and values handed to the rest.

Source: Liu et al., MarDini, arXiv:2410.20280: identity attention, norm of q and k.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.functional import (
    FrameLayout,
    Rotary,
    Visibility,
    masked_attention,
    qk_norm_rope,
    temporal_attention,
)
from fastvid.modules.attention import PlanningKV
from fastvid.modules.frames import Places, take
from fastvid.modules.linear import apply_linear, apply_linear_parts

Over = Literal["frame", "time", "clip"]
Identity = Literal["self_token", "self_frame", "bypass", "none"]
EPS = 1e-6


class Stream(NamedTuple):
    """What attention must know of the F frames of a stream of tokens (B, F * N, D)."""

    frames: int  # F
    rotary: Rotary
    known: Tensor | None = None  # (B or 1, F) bool; None: all are to be made
    visibility: Visibility | None = None  # of all frames that attention over a clip reads
    alone: bool = False  # all are known, and computed without the others


class FrameAttention(nn.Module):
    """(B, F * N, D) to the same. The weights fit every `over`.

    Args:
        over: "frame", a token sees its own frame; "time", its own place in all frames; "clip",
            everything.
        identity: what a token of a known frame sees instead, over time and over a clip: itself
            ("self_token"), its frame ("self_frame"), nothing, so that it adds nothing ("bypass"),
            or as much as any other ("none").
        norm: of q and k over their whole width, all heads together.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        over: Over,
        *,
        identity: Identity = "self_token",
        norm: Literal["layer", "rms"] = "layer",
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads = {heads}, got {dim}")
        self.heads, self.over, self.norm = heads, over, norm
        # One token of a frame is all that attention over time shows of it.
        same = over == "time" and identity == "self_frame"
        self.identity: Identity = "none" if over == "frame" else "self_token" if same else identity
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)  # rows ordered k, v, then head
        kind = nn.LayerNorm if norm == "layer" else nn.RMSNorm
        self.q_norm, self.k_norm = (kind(dim, eps=EPS) for _ in "qk")
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        stream: Stream,
        given: PlanningKV | None = None,
        *,
        wanted: Places | None = None,
    ) -> tuple[Tensor, PlanningKV | None]:
        """What the tokens x find, and, of frames `alone`, what they are to others.

        Args:
            given: keys and values (B, R, N, heads, E) of frames that were `alone`; then no frame
                of x is known.
            wanted: only these frames come back.
        """
        own = None
        if stream.alone and self.over != "frame":
            out, own = self._alone(x, stream)
        else:
            out = self._seeing(x, stream, given)
        if wanted is not None:
            out = take(out, wanted)
        out = apply_linear(self.proj, out.flatten(-2))
        if self.identity == "bypass" and self.over != "frame":
            if stream.alone:
                out = torch.zeros_like(out)
            elif stream.known is not None and wanted is None:
                out = out.where(~stream.known[:, :, None, None], 0)
        return out.flatten(1, 2), own

    def _seeing(self, x: Tensor, stream: Stream, given: PlanningKV | None) -> Tensor:
        q, k, v = self._project(x, stream)
        if self.over == "frame":
            return _within_frames(q, k, v)
        if self.over == "clip":
            if given is not None:
                k, v = torch.cat([given.k, k], 1), torch.cat([given.v, v], 1)
            assert stream.visibility is not None
            q, k, v = (part.flatten(1, 2) for part in (q, k, v))
            out = masked_attention(q, k, v, stream.visibility)
            return out.unflatten(1, (stream.frames, -1))
        if given is None:
            known = None if self.identity == "none" else stream.known
            return temporal_attention(q, k, v, known=known)
        # As many queries as keys: a known frame's are never read.
        R = given.k.shape[1]
        q, k, v = (torch.cat(pair, 1) for pair in zip((given.k, *given), (q, k, v), strict=True))
        known = torch.arange(k.shape[1], device=x.device)[None] < R
        return temporal_attention(q, k, v, known=known)[:, R:]

    def _alone(self, x: Tensor, stream: Stream) -> tuple[Tensor, PlanningKV]:
        """Known frames see themselves; queries of tokens that see one token are never made."""
        own_frame = self.identity == "self_frame"
        q, k, v = self._project(x, stream, queries=own_frame)
        return _within_frames(q, k, v) if own_frame else v, PlanningKV(k, v)

    def _project(
        self, x: Tensor, stream: Stream, *, queries: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (B, F, N, heads, E), normalised and turned; q is k without `queries`."""
        k, v = apply_linear_parts(self.kv, x, 2)
        q = apply_linear(self.q, x) if queries else k
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        q, k = qk_norm_rope(
            q,
            k,
            norm=self.norm,
            across_heads=True,
            q_weight=self.q_norm.weight,
            k_weight=self.k_norm.weight,
            q_bias=getattr(self.q_norm, "bias", None),
            k_bias=getattr(self.k_norm, "bias", None),
            eps=EPS,
            rotary=stream.rotary,
        )
        return tuple(part.unflatten(1, (stream.frames, -1)) for part in (q if queries else k, k, v))


def clip_visibility(
    queries: int,
    keys: int,
    tokens: int,
    device: torch.device,
    known: Tensor | None = None,
    identity: Identity = "self_token",
) -> Visibility:
    """Of attention over a clip whose frames have `tokens` each.

    With `known` (B, frames) both sides are the same frames; without, all queries see all keys.
    """
    layout = _layout(keys, tokens, device)
    if known is None or identity == "none":
        return Visibility.full(
            layout if queries == keys else _layout(queries, tokens, device), layout
        )
    rows: Literal["self_token", "self_frame"] = (
        "self_frame" if identity == "self_frame" else "self_token"
    )
    return Visibility.identity(layout, known, rows)


def _layout(frames: int, tokens: int, device: torch.device) -> FrameLayout:
    # Made on the host, which then knows the sizes too; a compiled graph must not.
    at = device if torch.compiler.is_compiling() else torch.device("cpu")
    return FrameLayout(torch.full((frames,), tokens, device=at), device=device)


def _within_frames(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, F, N, heads, E) each, every frame to itself."""
    shape = q.shape
    q, k, v = (part.flatten(0, 1).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(shape)
