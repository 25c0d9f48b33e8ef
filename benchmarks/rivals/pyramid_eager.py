"""miniFLUX in the official order of operations, plainly: the peer of `fastvid.models.pyramid_flow`.

Written from the published description. Columns lie behind each other in (b, tokens, D); adaLN is
expanded to every token, q, k and v have layers of their own, positions are 2 x 2 matrices made in
every call, and attention takes one dense mask per column. It loads the official state dict.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def sinusoid(timestep: Tensor) -> Tensor:
    steps = torch.arange(128, device=timestep.device)
    angles = timestep[:, None].float() * torch.exp(-math.log(10000) / 128 * steps)
    return torch.cat([angles.cos(), angles.sin()], -1)


def rotations(ids: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Positions (L, 3) as matrices (L, 1, E / 2, 2, 2)."""
    parts = []
    for axis, dim in enumerate(dims):
        steps = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device)
        rates = 1 / 10000 ** (steps / dim)
        angles = ids[:, axis, None].double() * rates
        cos, sin = angles.cos(), angles.sin()
        parts.append(torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2)))
    return torch.cat(parts, 1).float()[:, None]


def rotated(x: Tensor, matrices: Tensor) -> Tensor:
    pairs = x.float().unflatten(-1, (-1, 1, 2))
    return (
        (matrices[..., 0] * pairs[..., 0] + matrices[..., 1] * pairs[..., 1]).flatten(-2).type_as(x)
    )


def spread(rows: Tensor, lengths: list[int]) -> Tensor:
    """(b * columns, D), row b * columns + c of column c, to (b, tokens of all columns, D)."""
    count = len(lengths)
    parts = [rows[c::count, None].expand(-1, n, -1) for c, n in enumerate(lengths)]
    return torch.cat(parts, 1)


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x) * self.weight


class AdaLN(nn.Module):
    """Norm, and as many rows as `parts`, one for each token."""

    def __init__(self, dim: int, parts: int):
        super().__init__()
        self.linear = nn.Linear(dim, parts * dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.parts = parts

    def forward(self, x: Tensor, condition: Tensor, lengths: list[int] | None) -> tuple:
        rows = self.linear(F.silu(condition))
        rows = rows[:, None] if lengths is None else spread(rows, lengths)
        shift, scale, *rest = rows.chunk(self.parts, -1)
        return self.norm(x) * (1 + scale) + shift, *rest


class Gelu(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(Gelu(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, joint: bool):
        super().__init__()
        self.heads = heads
        names = ["to_q", "to_k", "to_v"] + ["add_q_proj", "add_k_proj", "add_v_proj"] * joint
        for name in names:
            setattr(self, name, nn.Linear(dim, dim))
        for name in ["norm_q", "norm_k"] + ["norm_added_q", "norm_added_k"] * joint:
            setattr(self, name, RMSNorm(dim // heads))
        if joint:
            self.to_out = nn.Sequential(nn.Linear(dim, dim))
            self.to_add_out = nn.Linear(dim, dim)

    def video(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            rearrange(f(x), "b n (h e) -> b n h e", h=self.heads)
            for f in (self.to_q, self.to_k, self.to_v)
        )
        return self.norm_q(q), self.norm_k(k), v

    def text(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layers = self.add_q_proj, self.add_k_proj, self.add_v_proj
        q, k, v = (rearrange(f(x), "b n (h e) -> b n h e", h=self.heads) for f in layers)
        return self.norm_added_q(q), self.norm_added_k(k), v


def attend(q: Tensor, k: Tensor, v: Tensor, matrices: Tensor, visible: Tensor) -> Tensor:
    q, k = rotated(q, matrices), rotated(k, matrices)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return out.transpose(1, 2).flatten(2)


class JointBlock(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm1_context = AdaLN(dim, 6), AdaLN(dim, 6)
        self.attn = Attention(dim, heads, joint=True)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2_context = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff, self.ff_context = FeedForward(dim), FeedForward(dim)

    def forward(self, video, text, condition, lengths, matrices, visible):
        count = len(lengths)
        u, gate, shift, scale, mlp_gate = self.norm1(video, condition, lengths)
        w, t_gate, t_shift, t_scale, t_mlp_gate = self.norm1_context(text, condition, None)
        parts = zip(*(x.split(lengths, 1) for x in self.attn.video(u)), strict=True)
        text_parts = self.attn.text(w)
        found, texts = [], torch.empty_like(text)
        for c, part in enumerate(parts):
            q, k, v = (
                torch.cat([t[c::count], x], 1) for t, x in zip(text_parts, part, strict=True)
            )
            out = attend(q, k, v, matrices[c], visible[c])
            found.append(out[:, text.shape[1] :])
            texts[c::count] = out[:, : text.shape[1]]
        video = video + gate * self.attn.to_out(torch.cat(found, 1))
        u = self.norm2(video) * (1 + scale) + shift
        video = video + mlp_gate * self.ff(u)
        text = text + t_gate * self.attn.to_add_out(texts)
        w = self.norm2_context(text) * (1 + t_scale) + t_shift
        return video, text + t_mlp_gate * self.ff_context(w)


class SingleBlock(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm = AdaLN(dim, 3)
        self.attn = Attention(dim, heads, joint=False)
        self.proj_mlp = nn.Linear(dim, 4 * dim)
        self.proj_out = nn.Linear(5 * dim, dim)

    def forward(self, x, condition, lengths, matrices, visible):
        u, gate = self.norm(x, condition, lengths)
        hidden = F.gelu(self.proj_mlp(u), approximate="tanh")
        parts = zip(*(y.split(lengths, 1) for y in self.attn.video(u)), strict=True)
        found = [attend(*part, matrices[c], visible[c]) for c, part in enumerate(parts)]
        return x + gate * self.proj_out(torch.cat([torch.cat(found, 1), hidden], -1))


class Embedder(nn.Module):
    def __init__(self, width: int, dim: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class PyramidFluxEager(nn.Module):
    """`PyramidFluxEager(config)`; `load_state_dict(model.to_official_state_dict())`.

    `config` is a `fastvid.models.pyramid_flow.PyramidFluxConfig`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, cells = config.dim, config.channels * config.patch**2
        self.x_embedder = nn.Linear(cells, D)
        self.context_embedder = nn.Linear(config.text_width, D)
        self.time_text_embed = nn.ModuleDict(
            {
                "timestep_embedder": Embedder(256, D),
                "text_embedder": Embedder(config.pooled_width, D),
            }
        )
        self.transformer_blocks = nn.ModuleList(
            JointBlock(D, config.heads) for _ in range(config.joint_blocks)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(D, config.heads) for _ in range(config.single_blocks)
        )
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(D, 2 * D)})
        self.norm_last = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(D, cells)

    def forward(
        self,
        samples: list[list[Tensor]],
        timestep: Tensor,
        text: Tensor,
        valid: Tensor,
        pooled: Tensor,
    ) -> list[Tensor]:
        """Columns of clips (b, C, t, h, w), the noisy one last; row b * columns + c is column c's.

        Args:
            text: (b * columns, L, text width).
            valid: (b * columns, L) bool, False where the text is padding.
        """
        p, count, L = self.config.patch, len(samples), text.shape[1]
        dims = (self.config.time_width, self.config.row_width, self.config.column_width)
        pattern = "b c t (h p) (w q) -> b (t h w) (p q c)"
        tokens, matrices, visible, lengths = [], [], [], []
        for c, clips in enumerate(samples):
            tokens.append(torch.cat([rearrange(x, pattern, p=p, q=p) for x in clips], 1))
            lengths.append(tokens[-1].shape[1])
            ids = torch.cat([torch.zeros(L, 3), positions(clips, p)]).to(text.device)
            matrices.append(rotations(ids, dims))
            time = ids[:, 0]
            real = valid.new_ones(len(clips[0]), lengths[-1])
            number = torch.cat([valid[c::count], real], 1)  # padding sees padding
            same = number[:, :, None] == number[:, None, :]
            visible.append((same & (time[:, None] >= time))[:, None])
        video = self.x_embedder(torch.cat(tokens, 1))
        text = self.context_embedder(text)
        condition = self.time_text_embed["timestep_embedder"](sinusoid(timestep))
        condition = condition + self.time_text_embed["text_embedder"](pooled)
        for block in self.transformer_blocks:
            video, text = block(video, text, condition, lengths, matrices, visible)
        parts = [
            torch.cat([text[c::count], part], 1) for c, part in enumerate(video.split(lengths, 1))
        ]
        x, lengths = torch.cat(parts, 1), [L + n for n in lengths]
        for block in self.single_transformer_blocks:
            x = block(x, condition, lengths, matrices, visible)
        scale, shift = spread(self.norm_out["linear"](F.silu(condition)), lengths).chunk(2, -1)
        x = self.proj_out(self.norm_last(x) * (1 + scale) + shift)
        outputs = []
        for part, clips in zip(x.split(lengths, 1), samples, strict=True):
            _, _, t, h, w = clips[-1].shape
            noisy = part[:, -t * (h // p) * (w // p) :]
            pattern = "b (t h w) (p q c) -> b c t (h p) (w q)"
            outputs.append(rearrange(noisy, pattern, t=t, h=h // p, w=w // p, p=p, q=p))
        return outputs


def positions(clips: list[Tensor], patch: int) -> Tensor:
    """(tokens, 3): running frame, and the cell on the grid of the noisy clip."""
    full, parts, time = clips[-1].shape[3:], [], 0
    for clip in clips:
        T, H, W = clip.shape[2], clip.shape[3] // patch, clip.shape[4] // patch
        lines = [torch.arange(time, time + T).float()]
        for cells, size in zip(full, (H, W), strict=True):
            line = torch.arange(cells // patch).float()[None, None]
            lines.append(F.interpolate(line, size, mode="linear")[0, 0])
        parts.append(torch.cartesian_prod(*lines))
        time += T
    return torch.cat(parts)
