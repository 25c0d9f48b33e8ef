"""Latents to tokens and back; a learned token at the end of each row of a frame."""

import torch
from einops import rearrange
from torch import Tensor, nn

from fastvid.modules.linear import apply_linear


def embed(layer: nn.Module, latents: Tensor, patch: int) -> Tensor:
    """(B, C, T, H, W) to tokens (B, T, H / patch * W / patch, D), in the dtype of the weights."""
    x = rearrange(latents, "b c t (h p) (w q) -> b t (h w) (c p q)", p=patch, q=patch)
    dtype = next(layer.parameters()).dtype
    return apply_linear(layer, x.to(dtype)).to(dtype)  # autocast must not narrow the stream


def to_latents(x: Tensor, rows: int, patch: int) -> Tensor:
    """(B, T, rows * columns, patch * patch * C) to (B, C, T, H, W)."""
    return rearrange(x, "b t (h w) (p q c) -> b c t (h p) (w q)", h=rows, p=patch, q=patch)


def end_rows(x: Tensor, token: Tensor | None, rows: int) -> Tensor:
    """(B, T, rows * columns, D) to (B, T, rows * (columns + 1), D); no token changes nothing."""
    if token is None:
        return x
    x = rearrange(x, "b t (h w) d -> b t h w d", h=rows)
    ends = token.to(x.dtype).expand(*x.shape[:3], 1, -1)
    return torch.cat([x, ends], 3).flatten(2, 3)


def drop_ends(x: Tensor, rows: int) -> Tensor:
    """The other way."""
    return rearrange(x, "b t (h w) d -> b t h w d", h=rows)[:, :, :, :-1].flatten(2, 3)
