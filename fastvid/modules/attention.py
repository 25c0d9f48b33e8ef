"""Attention over video tokens, without layout copies.

Over one axis of (B, T, N, D), q, k and v come from three products with the thirds of one weight.
Each is then a plain (B, T, N, heads * E) tensor: over tokens the attention sees it as a batch of
B * T, over frames it reads the strides. The result comes in the same layout, so that nothing is
ever transposed in memory. Over visible frames q, k and v are views of one product. Keys and values
of a context are projected once, whatever the number of denoising steps that read them.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvid.functional import (
    Visibility,
    asymmetric_attention,
    masked_attention,
    temporal_attention,
)
from fastvid.modules.linear import Deferred, apply_linear, apply_linear_parts, is_plain, linear


class SpatialAttention(nn.Module):
    """Every frame attends to itself: B * T sequences of N tokens. (B, T, N, D) to the same."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        _check_heads(dim, heads)
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)  # rows ordered q, k, v, then head
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor | Deferred) -> Tensor:
        q, k, v = apply_linear_parts(self.qkv, x, 3)
        B, T, N, D = q.shape
        out = _attend(q, k, v, (B * T, N, self.heads, D // self.heads))
        return apply_linear(self.proj, out)


class TemporalAttention(nn.Module):
    """Every token attends to itself at all times: B * N sequences of T. (B, T, N, D) to the same.

    A second linear layer `fc` follows the projection. Both are one product where that is cheaper,
    and for good after `fold`.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        _check_heads(dim, heads)
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.fc: nn.Linear | None = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor | Deferred,
        *,
        known: Tensor | None = None,
        window: tuple[int, int] | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Who sees whom and what turns is said as to `temporal_attention`.

        Args:
            known: (B or 1, T) bool, True for frames that see only themselves.
            window: `(back, forward)`, the frames that a frame sees before and after it.
            rotary: `(cos, sin)`, each (T or more, E / 2): row t turns q and k in frame t.
        """
        q, k, v = apply_linear_parts(self.qkv, x, 3)
        B, T, N, D = q.shape
        out = temporal_attention(
            *(part.unflatten(-1, (self.heads, -1)) for part in (q, k, v)),
            known=known, window=window, rotary=rotary,
        ).flatten(-2)  # fmt: skip
        # A compiled graph would be made anew on each side of a bound on the number of tokens.
        many = torch.compiler.is_compiling() or B * T * N >= 2 * D
        if many and self._can_merge():
            return linear(out, *self._both())
        out = apply_linear(self.proj, out)
        return out if self.fc is None else apply_linear(self.fc, out)

    def _can_merge(self) -> bool:
        return is_plain(self.proj, nn.Linear) and is_plain(self.fc, nn.Linear)

    def _both(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of `fc` after `proj`: D^3 to make, one D^2 per token less to apply."""
        assert self.fc is not None
        weight = self.fc.weight @ self.proj.weight
        bias = F.linear(self.proj.bias[None], self.fc.weight, self.fc.bias)[0]
        return weight, bias

    @torch.no_grad()
    def fold(self) -> None:
        """Make `fc` part of `proj`. For inference: the two can not be told apart again.

        Raises:
            RuntimeError: one of the two is wrapped, hooked or sharded.
        """
        if self.fc is None:
            return
        if not self._can_merge():
            raise RuntimeError(
                "proj and fc must be plain nn.Linear to be folded: merge adapters and remove hooks"
            )
        dtype = self.fc.weight.dtype
        self.double()
        weight, bias = self._both()
        self.to(dtype)
        self.proj.weight.copy_(weight)
        self.proj.bias.copy_(bias)
        self.fc = None


class MaskedSelfAttention(nn.Module):
    """Every frame attends to the frames that it sees. (B, N, D) to the same."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        _check_heads(dim, heads)
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)  # rows ordered q, k, v, then head
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, visibility: Visibility) -> Tensor:
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).unbind(2)
        return self.proj(masked_attention(q, k, v, visibility).view(B, N, D))


class PlanningKV(NamedTuple):
    """Keys and values of a context, each (B or 1, T or 1, Nk, heads, E): made once per video."""

    k: Tensor
    v: Tensor


class AsymmetricCrossAttention(nn.Module):
    """High-resolution tokens attend to a low-resolution context. (B, T, N, dim) to the same.

    `scope` is that of `asymmetric_attention`. `qk_norm`, such as nn.LayerNorm or nn.RMSNorm, makes
    the norms of q and k over their whole width, all heads together.

    Source: the attention across modules of Liu et al., MarDini, arXiv:2410.20280.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        context_dim: int,
        *,
        scope: Literal["frame", "clip"] = "frame",
        qk_norm: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__()
        _check_heads(dim, heads)
        self.heads = heads
        self.scope = scope
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(context_dim, 2 * dim)  # rows ordered k, v, then head
        self.q_norm, self.k_norm = (qk_norm(dim) if qk_norm else nn.Identity() for _ in "qk")
        self.proj = nn.Linear(dim, dim)

    def project_context(self, context: Tensor) -> PlanningKV:
        """Keys and values of `context`, (B or 1, T or 1, Nk, context_dim), for any number of steps.

        No context at all is one learned token, (1, 1, 1, context_dim).
        """
        k, v = self.kv(context).chunk(2, dim=-1)
        k = self.k_norm(k).to(v.dtype)  # autocast normalises in float32
        return PlanningKV(*(part.unflatten(-1, (self.heads, -1)) for part in (k, v)))

    def forward(self, x: Tensor, context: PlanningKV, known: Tensor | None = None) -> Tensor:
        """What `x` finds in `context`; unspecified in `known` (B, T) frames, where none is wanted.

        A softmax over one key is 1: where every token sees one key, as of a learned token, the
        result is one row for all, whatever `x` is, and no attention is computed.
        """
        _, frames, keys, _, _ = context.v.shape
        if keys * (frames if self.scope == "clip" else 1) == 1:
            return self.proj(context.v.flatten(-2)).expand_as(x)
        q = self.q(x)
        q = self.q_norm(q).to(q.dtype).unflatten(-1, (self.heads, -1))
        out = asymmetric_attention(q, *context, scope=self.scope, known=known)
        return self.proj(out.flatten(-2))


def _check_heads(dim: int, heads: int) -> None:
    if heads < 1 or dim % heads:
        raise ValueError(f"dim must be a multiple of heads, got dim={dim} and heads={heads}")


def _attend(q: Tensor, k: Tensor, v: Tensor, split: tuple[int, int, int, int]) -> Tensor:
    """(B, T, N, D) each, `split` as (sequences, length, heads, E), to (B, T, N, D)."""
    shape = q.shape
    q, k, v = (part.view(split).transpose(1, 2) for part in (q, k, v))
    # On a CPU the backward of SDPA in half precision takes 3 to 4 times as long as two products.
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and split[1] <= 128:
        out = (q @ k.transpose(-1, -2)).mul_(split[3] ** -0.5).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(shape)
