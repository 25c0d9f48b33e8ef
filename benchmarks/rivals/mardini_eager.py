"""MarDini in plain eager PyTorch: the peer of `fastvid.models.mardini`.

Written from the published description. Who sees whom is a dense bias over all pairs of tokens, all
frames go through all layers, the keys and values of the plan are made in every step, a clip without
a plan attends to the learned token in all places, and tokens are copied to (B * N, T, D) for
attention over time. The names of the weights are those of `fastvid`.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

EPS = 1e-6


def angles(config, frames: int, rows: int, columns: int) -> Tensor:
    """(T * N, E / 2) angles in float64: of the frame, then of the place in the frame."""
    tokens, width = rows * (columns + config.next_token), config.dim // config.heads
    by_frame = config.frame_channels or width // 2
    parts = []
    for length, channels in ((frames, by_frame), (tokens, width - by_frame)):
        pairs = torch.arange(0, channels, 2, dtype=torch.float64) / channels
        parts.append(torch.arange(length)[:, None] * config.theta**-pairs)
    time = repeat(parts[0], "t e -> (t n) e", n=tokens)
    return torch.cat([time, repeat(parts[1], "n e -> (t n) e", t=frames)], -1)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn neighbouring pairs of (B, N, heads, E)."""
    cos, sin = (f(turn).float().to(x)[:, None] for f in (torch.cos, torch.sin))
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def sight(known: Tensor, tokens: int, identity: str) -> Tensor:
    """The bias (B, 1, T * tokens, T * tokens) of identity attention, float32."""
    frame = torch.arange(known.shape[1], device=known.device).repeat_interleave(tokens)
    if identity == "self_frame":
        own = frame[:, None] == frame
    else:
        own = torch.eye(len(frame), dtype=torch.bool, device=known.device)
    free = torch.full_like(known, True) if identity == "none" else ~known
    visible = free[:, frame, None] | own
    return torch.zeros(visible.shape, device=known.device).masked_fill(~visible, -math.inf)[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """(S, N, heads, E) sequences."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    bias = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def norm_of(kind: str, dim: int) -> nn.Module:
    return (nn.LayerNorm if kind == "layer" else nn.RMSNorm)(dim, eps=EPS)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.dim
        self.heads = config.heads
        self.q, self.kv, self.proj = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)
        self.q_norm, self.k_norm = norm_of(config.qk_norm, D), norm_of(config.qk_norm, D)

    def forward(self, x: Tensor, over: str, turn: Tensor, known: Tensor, identity: str) -> Tensor:
        """x (B, T, N, D)."""
        T, N = x.shape[1:3]
        flat = x.flatten(1, 2)
        k, v = self.kv(flat).chunk(2, -1)
        q, k = self.q_norm(self.q(flat)), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        q, k = rotate(q, turn), rotate(k, turn)
        if over == "frame":
            q, k, v = (rearrange(part, "b (t n) h e -> (b t) n h e", t=T) for part in (q, k, v))
            out = rearrange(attend(q, k, v), "(b t) n h e -> b t n (h e)", t=T)
        elif over == "time":
            q, k, v = (rearrange(part, "b (t n) h e -> (b n) t h e", t=T) for part in (q, k, v))
            bias = sight(known, 1, identity).repeat_interleave(N, 0)
            out = rearrange(attend(q, k, v, bias), "(b n) t h e -> b t n (h e)", n=N)
        else:
            out = attend(q, k, v, sight(known, N, identity))
            out = rearrange(out, "b (t n) h e -> b t n (h e)", t=T)
        out = self.proj(out)
        if identity == "bypass" and over != "frame":
            out = out.masked_fill(known[:, :, None, None], 0)
        return out


class CrossAttention(nn.Module):
    def __init__(self, config, context_dim: int):
        super().__init__()
        D = config.dim
        self.heads, self.scope = config.heads, config.cross_scope
        self.q, self.kv, self.proj = nn.Linear(D, D), nn.Linear(context_dim, 2 * D), nn.Linear(D, D)
        self.q_norm, self.k_norm = norm_of(config.qk_norm, D), norm_of(config.qk_norm, D)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, T, N, D), context (B, T, M, context_dim)."""
        T = x.shape[1]
        k, v = self.kv(context).chunk(2, -1)
        q, k = self.q_norm(self.q(x)), self.k_norm(k)
        form = "b t n (h e) -> b (t n) h e"
        if self.scope == "frame":
            form = "b t n (h e) -> (b t) n h e"
        q, k, v = (rearrange(part, form, h=self.heads) for part in (q, k, v))
        out = attend(q, k, v)
        if self.scope == "frame":
            return self.proj(rearrange(out, "(b t) n h e -> b t n (h e)", t=T))
        return self.proj(rearrange(out, "b (t n) h e -> b t n (h e)", t=T))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PlannerBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.dim
        self.identity = config.identity
        self.spatial_norm, self.spatial = nn.RMSNorm(D, eps=EPS), SelfAttention(config)
        self.clip_norm, self.clip = nn.RMSNorm(D, eps=EPS), SelfAttention(config)
        self.mlp_norm, self.mlp = nn.RMSNorm(D, eps=EPS), Mlp(D, config.mlp)

    def forward(self, x: Tensor, turn: Tensor, known: Tensor) -> Tensor:
        x = x + self.spatial(self.spatial_norm(x), "frame", turn, known, "none")
        x = x + self.clip(self.clip_norm(x), "clip", turn, known, self.identity)
        return x + self.mlp(self.mlp_norm(x))


class Condition(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, dim), nn.Linear(dim, 3 * dim)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.fc2(F.silu(self.fc1(condition))).chunk(3, -1)


class GeneratorBlock(nn.Module):
    def __init__(self, config, context_dim: int):
        super().__init__()
        D = config.dim
        self.config = config
        self.free_norm = nn.RMSNorm(D, eps=EPS, elementwise_affine=False)
        self.spatial_condition, self.spatial = Condition(D), SelfAttention(config)
        self.between_norm, self.between = nn.RMSNorm(D, eps=EPS), SelfAttention(config)
        self.cross_norm, self.cross = nn.RMSNorm(D, eps=EPS), CrossAttention(config, context_dim)
        self.mlp_condition, self.mlp = Condition(D), Mlp(D, config.mlp)

    def forward(self, x, times, plan, context, turn, known):
        config = self.config
        shift, scale, gate = self.spatial_condition(times)
        y = self.free_norm(x) * (1 + scale) + shift
        x = x + gate * self.spatial(y, "frame", turn, known, "none")
        y = self.between_norm(x)
        x = x + self.between(y, config.attention, turn, known, config.identity)
        x = x + self.cross(self.cross_norm(x), context)
        shift, scale, gate = self.mlp_condition(plan)
        return x + gate * self.mlp(self.free_norm(x) * (1 + scale) + shift)


class Timestep(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(256, dim), nn.Linear(dim, dim)

    def forward(self, timestep: Tensor) -> Tensor:
        steps = torch.arange(128, dtype=torch.float32, device=timestep.device)
        turn = timestep[..., None].float() * torch.exp(-math.log(10000) * steps / 128)
        waves = torch.cat([turn.cos(), turn.sin()], -1)
        return self.fc2(F.silu(self.fc1(waves.to(self.fc1.weight.dtype))))


class Network(nn.Module):
    """What planner and generator share: patches in and out, [NEXT] tokens, positions."""

    def __init__(self, config, channels: int):
        super().__init__()
        self.config = config
        self.patch = nn.Linear(channels * config.patch**2, config.dim)
        if config.next_token:
            self.next = nn.Parameter(torch.empty(config.dim))

    def grid(self, latents: Tensor) -> tuple[int, int]:
        return tuple(size // self.config.patch for size in latents.shape[3:])

    def embed(self, latents: Tensor) -> Tensor:
        p = self.config.patch
        x = rearrange(latents, "b c t (h p) (w q) -> b t (h w) (c p q)", p=p, q=p)
        return self.patch(x.to(self.patch.weight.dtype))

    def end_rows(self, x: Tensor, rows: int) -> Tensor:
        if not self.config.next_token:
            return x
        x = rearrange(x, "b t (h w) d -> b t h w d", h=rows)
        return torch.cat([x, self.next.expand(*x.shape[:3], 1, -1)], 3).flatten(2, 3)

    def drop_ends(self, x: Tensor, rows: int) -> Tensor:
        if not self.config.next_token:
            return x
        x = rearrange(x, "b t (h w) d -> b t h w d", h=rows)
        return x[:, :, :, :-1].flatten(2, 3)


class Planner(Network):
    def __init__(self, config, channels: int):
        super().__init__(config, channels)
        self.unknown = nn.Parameter(torch.empty(config.dim))
        self.blocks = nn.ModuleList(PlannerBlock(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim, eps=EPS)
        self.head = nn.Linear(config.dim, channels * config.patch**2)

    def forward(self, low: Tensor, known: Tensor) -> Tensor:
        rows, columns = self.grid(low)
        x = torch.where(known[:, :, None, None], self.embed(low), self.unknown)
        x = self.end_rows(x, rows)
        turn = angles(self.config, low.shape[2], rows, columns).to(low.device)
        for block in self.blocks:
            x = block(x, turn, known)
        return self.drop_ends(self.norm(x), rows)


class Generator(Network):
    def __init__(self, config, channels: int, context_dim: int):
        super().__init__(config, channels)
        D = config.dim
        self.timestep = Timestep(D)
        self.plan = nn.Linear(context_dim, D)
        self.unconditional = nn.Parameter(torch.empty(1, 1, 1, context_dim))
        self.blocks = nn.ModuleList(
            GeneratorBlock(config, context_dim) for _ in range(config.depth)
        )
        self.free_norm = nn.RMSNorm(D, eps=EPS, elementwise_affine=False)
        self.final_condition = nn.Linear(D, 2 * D)
        self.final = nn.Linear(D, channels * config.patch**2)

    def forward(self, latents: Tensor, timestep: Tensor, known: Tensor, signal: Tensor) -> Tensor:
        rows, columns = self.grid(latents)
        x = self.end_rows(self.embed(latents), rows)
        turn = angles(self.config, latents.shape[2], rows, columns).to(latents.device)
        steps = timestep[:, None]
        if self.config.ref_t == "zero":
            steps = steps.expand(known.shape).masked_fill(known, 0)
        times = self.timestep(steps)[:, :, None]
        plan = times + self.plan(signal.mean(2, keepdim=True))
        for block in self.blocks:
            x = block(x, times, plan, signal, turn, known)
        shift, scale = self.final_condition(F.silu(times)).chunk(2, -1)
        x = self.drop_ends(self.final(self.free_norm(x) * (1 + scale) + shift), rows)
        p = self.config.patch
        x = rearrange(x, "b t (h w) (p q c) -> b c t (h p) (w q)", h=rows, p=p, q=p)
        return x.masked_fill(known[:, None, :, None, None], 0)


class MarDiniEager(nn.Module):
    """`MarDiniEager(config)`; `load_state_dict(model.state_dict())`.

    `config` is a `fastvid.models.mardini.MarDiniConfig` with GELU in its MLPs.
    """

    def __init__(self, config):
        super().__init__()
        self.planner = Planner(config.planner, config.channels)
        self.generator = Generator(config.generator, config.channels, config.planner.dim)

    def plan(self, low: Tensor, known: Tensor) -> Tensor:
        """(B, C, T, h, w) and (B, T) to (B, T, tokens, D)."""
        return self.planner(low, known)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        known: Tensor,
        signal: Tensor | None,
        tokens: int = 1,
    ) -> Tensor:
        """(B, C, T, H, W) and (B,) to velocities; no signal is the learned token, so many times."""
        if signal is None:
            signal = self.generator.unconditional.expand(*known.shape, tokens, -1)
        return self.generator(latents, timestep.expand(len(latents)), known, signal)
