"""Transformer blocks on text and video tokens, for columns of several sizes in one call.

A column is a batch of sequences of one size, (B, N, D); a list of columns is packed. Linear layers
run once on the tokens of all columns, while norms, modulation, positions and attention read every
column as it is: a modulation has one row per sample, and nothing is padded, expanded or hidden.

Sources: Esser et al., arXiv:2403.03206 (joint blocks); Jin et al., arXiv:2410.05954 (columns).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvid.functional import (
    Rotary,
    Visibility,
    gated_residual,
    masked_attention,
    norm_modulate,
    qk_norm_rope,
)
from fastvid.modules.linear import Deferred, apply_linear, gelu, materialise
from fastvid.modules.mlp import MLP


class KV(NamedTuple):
    """Keys, normed and turned to their positions, and values: (B, tokens, heads, E) each."""

    k: Tensor
    v: Tensor


class QKV(NamedTuple):
    """Of one column, (B, N, heads, E) each."""

    q: Tensor
    k: Tensor
    v: Tensor


class Scene(NamedTuple):
    """What a block must know of a column, whose tokens are the text's and then the frames'."""

    visibility: Visibility  # of the tokens that ask, on `past` and all tokens of the call
    rotary: Rotary  # positions of the tokens of the call
    asking: int  # the last so many tokens ask and go on: all of them but in the last block
    past: KV | None = None  # tokens before those of the call, from a call before
    keep: int = 0  # hand back the keys and values of the first so many, past ones included


class Stream(nn.Module):
    """The text's or the video's side of a joint block: what comes before attention, and after.

    The text of the last block `ends`: it is seen, and changes no more.
    """

    def __init__(self, dim: int, heads: int, eps: float, *, ends: bool = False):
        super().__init__()
        self.heads, self.eps = heads, eps
        self.modulation = nn.Linear(dim, (2 if ends else 6) * dim)  # shift, scale, gate; of the MLP
        self.qkv = nn.Linear(dim, 3 * dim)  # rows ordered q, k, v, then head
        self.q_norm = nn.Parameter(torch.ones(dim // heads))
        self.k_norm = nn.Parameter(torch.ones(dim // heads))
        if not ends:
            self.proj = nn.Linear(dim, dim)
            self.mlp = MLP(dim, 4 * dim)

    def go_on(
        self, columns: list[Tensor], rows: list[tuple[Tensor, ...]], attended: list[Tensor]
    ) -> list[Tensor]:
        """The columns behind attention and MLP."""
        branch = apply_linear(self.proj, joined(attended))
        columns = _added(columns, branch, [row[2] for row in rows])
        branch = self.mlp(modulated(columns, [row[3:5] for row in rows]))
        return _added(columns, branch, [row[5] for row in rows])


class JointBlock(nn.Module):
    """Text and frames attend together, each side through weights of its own."""

    def __init__(self, dim: int, heads: int, eps: float, *, last: bool = False):
        super().__init__()
        self.text = Stream(dim, heads, eps, ends=last)
        self.video = Stream(dim, heads, eps)
        self.last = last

    def forward(
        self, text: list[Tensor], video: list[Tensor], condition: Tensor, scenes: list[Scene]
    ) -> tuple[list[Tensor], list[Tensor], list[KV | None]]:
        """
        Args:
            text: columns (B, L, D); none at all where all of them are in the past.
            video: columns (B, N, D).
            condition: (samples of all columns, D), activated.
        Returns:
            Text, video and what the scenes keep. Of the last block: no text, and the video tokens
            that ask.
        """
        video_rows = modulation_rows(self.video.modulation, condition, video)
        lengths = [x.shape[1] for x in text] or [0] * len(video)
        turns = [
            scene.rotary._replace(rows=scene.rotary.rows[:, length:])
            for scene, length in zip(scenes, lengths, strict=True)
        ]
        x = modulated(video, [row[:2] for row in video_rows])
        asked = project(self.video, x, video, turns)
        if text:  # it stands at position 0, where nothing is turned
            text_rows = modulation_rows(self.text.modulation, condition, text)
            x = modulated(text, [row[:2] for row in text_rows])
            first = project(self.text, x, text, [None] * len(text))
            asked = [
                QKV(*(torch.cat(pair, 1) for pair in zip(*both, strict=True)))
                for both in zip(first, asked, strict=True)
            ]
        attended, kept = attend(asked, scenes)
        if self.last:
            video = [x[:, -s.asking :] for x, s in zip(video, scenes, strict=True)]
            return [], self.video.go_on(video, video_rows, attended), kept
        seen = [
            out.split([n, out.shape[1] - n], 1) for out, n in zip(attended, lengths, strict=True)
        ]
        if text:
            text = self.text.go_on(text, text_rows, [out[0] for out in seen])
        return text, self.video.go_on(video, video_rows, [out[1] for out in seen]), kept


class SingleBlock(nn.Module):
    """Attention and MLP beside each other, on one stream of text and video tokens."""

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__()
        self.heads, self.eps = heads, eps
        self.modulation = nn.Linear(dim, 3 * dim)  # shift, scale, gate
        self.qkv = nn.Linear(dim, 3 * dim)  # rows ordered q, k, v, then head
        self.q_norm = nn.Parameter(torch.ones(dim // heads))
        self.k_norm = nn.Parameter(torch.ones(dim // heads))
        self.fc = nn.Linear(dim, 4 * dim)
        self.proj = nn.Linear(5 * dim, dim)  # of what attention found, and of the MLP's middle

    def forward(
        self, columns: list[Tensor], condition: Tensor, scenes: list[Scene]
    ) -> tuple[list[Tensor], list[KV | None]]:
        """Columns (B, N, D) to those of their tokens that ask, and what the scenes keep."""
        rows = modulation_rows(self.modulation, condition, columns)
        x: Tensor | Deferred = modulated(columns, [row[:2] for row in rows])
        if not torch.is_grad_enabled():
            x = materialise(x)  # for both linear layers
        asked = project(self, x, columns, [scene.rotary for scene in scenes])
        attended, kept = attend(asked, scenes)
        if any(s.asking < c.shape[1] for c, s in zip(columns, scenes, strict=True)):
            columns = [c[:, -s.asking :] for c, s in zip(columns, scenes, strict=True)]
            x = modulated(columns, [row[:2] for row in rows])
        middle = apply_linear(self.fc, x)
        branch = apply_linear(self.proj, Deferred(_beside, (joined(attended), middle)))
        return _added(columns, branch, [row[2] for row in rows]), kept


def joined(columns: Sequence[Tensor]) -> Tensor:
    """The tokens of all columns (B, N, ...), one after the other: (tokens, ...)."""
    flat = [column.flatten(0, 1) for column in columns]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def separated(tokens: Tensor, columns: Sequence[Tensor]) -> list[Tensor]:
    """What `joined` put together, as views in the batches and lengths of `columns`."""
    shapes = [column.shape[:2] for column in columns]
    parts = tokens.split([B * N for B, N in shapes]) if len(shapes) > 1 else [tokens]
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def modulation_rows(
    layer: nn.Module, condition: Tensor, columns: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]:
    """`layer(condition)` by column, cut to the width of the tokens: rows (B, D) each."""
    rows = apply_linear(layer, condition).unflatten(-1, (-1, columns[0].shape[-1]))
    return [part.unbind(1) for part in rows.split([len(column) for column in columns])]


def modulated(columns: Sequence[Tensor], rows: Sequence[Sequence[Tensor]]) -> Deferred:
    """LayerNorm without parameters and `* (1 + scale) + shift`, joined; rows hold the two."""
    shifts, scales = zip(*rows, strict=True)
    return Deferred(_modulated, (*columns, *shifts, *scales))


def project(
    block: "Stream | SingleBlock",
    x: Tensor | Deferred,
    columns: Sequence[Tensor],
    turns: Sequence[Rotary | None],
) -> list[QKV]:
    """q, k and v of each column, from the joined tokens `x`."""
    found = []
    for part, rotary in zip(separated(apply_linear(block.qkv, x), columns), turns, strict=True):
        q, k, v = part.unflatten(-1, (3, block.heads, -1)).unbind(2)
        q, k = qk_norm_rope(
            q, k, q_weight=block.q_norm, k_weight=block.k_norm, eps=block.eps, rotary=rotary
        )
        found.append(QKV(q, k, v))
    return found


def attend(asked: Sequence[QKV], scenes: Sequence[Scene]) -> tuple[list[Tensor], list[KV | None]]:
    """Attention of q, k and v of each column: (B, tokens that ask, D), and what is kept."""
    attended, kept = [], []
    for (q, k, v), scene in zip(asked, scenes, strict=True):
        if scene.past is not None:
            k, v = (torch.cat(pair, 1) for pair in zip(scene.past, (k, v), strict=True))
        out = masked_attention(q[:, -scene.asking :], k, v, scene.visibility)
        attended.append(out.flatten(2))
        parts = (part[:, : scene.keep].clone() for part in (k, v))
        kept.append(KV(*parts) if scene.keep else None)
    return attended, kept


def _modulated(*inputs: Tensor) -> Tensor:
    third = len(inputs) // 3
    groups = (inputs[i : i + third] for i in range(0, len(inputs), third))
    return joined([norm_modulate(*group) for group in zip(*groups, strict=True)])


def _beside(attended: Tensor, middle: Tensor) -> Tensor:
    return torch.cat([attended, gelu(middle)], -1)


def _added(columns: Sequence[Tensor], branch: Tensor, gates: Sequence[Tensor]) -> list[Tensor]:
    parts = separated(branch, columns)
    return [gated_residual(*part) for part in zip(columns, parts, gates, strict=True)]
