"""VDT in the official order of operations, plainly: the peer of `fastvid.models.vdt`.

Written from the published description. Tokens move between (B*T, N, D) and (B*N, T, D) by
copies, each block has its own adaLN layer, LayerNorm and modulation are apart, `temporal_fc`
stands behind the temporal projection, and attention is a packed qkv layer with PyTorch's SDPA.
It loads the official state dict and takes latents (B, T, C, H, W).
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: float, frames: int, video: bool):
        super().__init__()
        self.frames, self.video = frames, video
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if video:
            self.temporal_norm1 = nn.LayerNorm(dim)
            self.temporal_attn = Attention(dim, heads)
            self.temporal_fc = nn.Linear(dim, dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        T = self.frames
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(
            c
        ).chunk(6, dim=1)
        if self.video:
            N = x.shape[1]
            x = rearrange(x, "(b t) n d -> (b n) t d", t=T)
            x = x + self.temporal_fc(self.temporal_attn(self.temporal_norm1(x)))
            x = rearrange(x, "(b n) t d -> (b t) n d", n=N)
        u = rearrange(self.norm1(x), "(b t) n d -> b (t n) d", t=T)
        u = rearrange(modulate(u, shift_msa, scale_msa), "b (t n) d -> (b t) n d", t=T)
        u = rearrange(self.attn(u), "(b t) n d -> b (t n) d", t=T)
        x = x + rearrange(gate_msa.unsqueeze(1) * u, "b (t n) d -> (b t) n d", t=T)
        u = rearrange(self.norm2(x), "(b t) n d -> b (t n) d", t=T)
        u = self.mlp(modulate(u, shift_mlp, scale_mlp))
        return x + rearrange(gate_mlp.unsqueeze(1) * u, "b (t n) d -> (b t) n d", t=T)


class FinalLayer(nn.Module):
    def __init__(self, dim: int, out: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor, frames: int) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        x = rearrange(self.norm_final(x), "(b t) n d -> b (t n) d", t=frames)
        return rearrange(self.linear(modulate(x, shift, scale)), "b (t n) d -> (b t) n d", t=frames)


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        steps = torch.arange(128, dtype=torch.float32, device=t.device)
        angles = t[:, None].float() * torch.exp(-math.log(10000) * steps / 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, rows: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, dim)


class VDTEager(nn.Module):
    """`VDTEager(config)`; `load_state_dict(model.to_official_state_dict())`.

    `config` is a `fastvid.models.vdt.VDTConfig`. Labels are never dropped.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, p = config.dim, config.patch
        video = config.mode == "video"
        self.x_embedder = PatchEmbed(config.channels, D, p)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = LabelEmbedder(config.num_classes + (config.class_dropout > 0), D)
        tokens = (config.height // p) * (config.width // p)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, D), requires_grad=False)
        if video:
            self.time_embed = nn.Parameter(torch.zeros(1, config.frames, D), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(D, config.heads, config.mlp_ratio, config.frames, video)
            for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(D, p * p * config.out_channels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, T, C, H, W) latents and (B,) timesteps to (B, T, C or 2C, H, W)."""
        B, T, _, H, _ = x.shape
        p = self.config.patch
        x = self.x_embedder(rearrange(x, "b t c h w -> (b t) c h w")) + self.pos_embed
        if self.config.mode == "video":
            N = x.shape[1]
            x = rearrange(x, "(b t) n d -> (b n) t d", b=B) + self.time_embed
            x = rearrange(x, "(b n) t d -> (b t) n d", n=N)
        c = self.t_embedder(t) + self.y_embedder.embedding_table(torch.zeros_like(t))
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c, T)
        x = rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=H // p, p=p, q=p)
        return rearrange(x, "(b t) c h w -> b t c h w", b=B)
