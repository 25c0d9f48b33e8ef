"""The two networks of MarDini and what passes between them.

Source: Liu et al., arXiv:2410.20280, section 2 and figure 2.
"""

from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvid.functional import (
    Rotary,
    gated_residual,
    gated_residual_norm_modulate,
    norm_modulate,
    rotary_table,
)
from fastvid.models.mardini_config import GeneratorConfig, PlannerConfig
from fastvid.modules.attention import AsymmetricCrossAttention, PlanningKV
from fastvid.modules.embeddings import TimestepEmbedding
from fastvid.modules.frame_attention import EPS, FrameAttention, Stream, clip_visibility
from fastvid.modules.frames import Places, places, put, take
from fastvid.modules.linear import apply_linear
from fastvid.modules.mlp import MLP, GatedMLP
from fastvid.modules.tokens import drop_ends, embed, end_rows, to_latents

Context = PlanningKV | Tensor  # keys and values of planning signals, or the signals


class Planning(NamedTuple):
    """What the generator reads of a plan in every step: made once per video, by `project`."""

    contexts: tuple[Context, ...]  # of each block
    frame: Tensor  # (B or 1, T or 1, D), for the modulation of the MLPs


class References(NamedTuple):
    """What known frames are to the others in every step: made once per video, by `references`."""

    given: tuple[PlanningKV, ...]  # of each block, (B, R, N, heads, E)
    planning: Planning  # of the other frames
    places: Places  # of the other frames
    frames: int  # T


class PlannerBlock(nn.Module):
    """Attention within frames, identity attention over the clip, MLP; a norm before each."""

    def __init__(self, config: PlannerConfig):
        super().__init__()
        D = config.dim
        attention = partial(FrameAttention, D, config.heads, norm=config.qk_norm)
        self.spatial_norm = nn.RMSNorm(D, eps=EPS)
        self.spatial = attention("frame")
        self.clip_norm = nn.RMSNorm(D, eps=EPS)
        self.clip = attention("clip", identity=config.identity)
        self.mlp_norm = nn.RMSNorm(D, eps=EPS)
        self.mlp = _mlp(config)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = norm_modulate(x, *_weight(self.spatial_norm), rms=True, eps=EPS)
        y, _ = self.spatial(y, stream)
        x, y = _add_norm(x, y, self.clip_norm)
        y, _ = self.clip(y, stream)
        x, y = _add_norm(x, y, self.mlp_norm)
        return x + self.mlp(y)


class MarDiniPlanner(nn.Module):
    """Low-resolution latents, some frames known, to planning signals for all frames."""

    def __init__(self, config: PlannerConfig, channels: int):
        super().__init__()
        self.config = config
        D, p = config.dim, config.patch
        self.patch = nn.Linear(channels * p * p, D)
        self.unknown = nn.Parameter(torch.empty(D))  # the paper's [MASK]
        self.next = nn.Parameter(torch.empty(D)) if config.next_token else None
        self.blocks = nn.ModuleList(PlannerBlock(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(D, eps=EPS)  # Llama's; the paper says nothing of it
        self.head = nn.Linear(D, channels * p * p)  # of the first stage of training

    def forward(self, low: Tensor, known: Tensor, checkpoint_blocks: int = 0) -> Tensor:
        """(B, C, T, h, w) and (B or 1, T) to (B, T, tokens, D)."""
        config, T = self.config, low.shape[2]
        # What stands in unknown frames is not read, not even by the gradient of a weight.
        x = embed(self.patch, low.where(known[:, None, :, None, None], 0), config.patch)
        x = x.where(known[:, :, None, None], self.unknown.to(x.dtype))
        rows, columns = (size // config.patch for size in low.shape[3:])
        x = end_rows(x, self.next, rows)
        visibility = clip_visibility(T, T, x.shape[2], x.device, known, config.identity)
        stream = Stream(T, _rotary(config, T, rows, columns, x.device), known, visibility)
        x = x.flatten(1, 2)
        for index, block in enumerate(self.blocks):
            x = _run(block, index < checkpoint_blocks, x, stream)
        x = norm_modulate(x, *_weight(self.norm), rms=True, eps=EPS).unflatten(1, (T, -1))
        return x if self.next is None or config.signal_next else drop_ends(x, rows)


class Condition(nn.Module):
    """Shift, scale and gate (..., D) of a condition (..., D); they start at zero."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, dim)
        self.fc2 = nn.Linear(dim, 3 * dim)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.fc2(F.silu(self.fc1(condition))).chunk(3, -1)


class GeneratorBlock(nn.Module):
    """Attention within frames, identity attention between them, cross-attention to the plan, MLP.

    The timestep modulates the first, timestep and plan the last.
    """

    def __init__(self, config: GeneratorConfig, context_dim: int):
        super().__init__()
        D, heads = config.dim, config.heads
        attention = partial(FrameAttention, D, heads, norm=config.qk_norm)
        norm = nn.LayerNorm if config.qk_norm == "layer" else nn.RMSNorm
        self.spatial_condition = Condition(D)
        self.spatial = attention("frame")
        self.between_norm = nn.RMSNorm(D, eps=EPS)
        self.between = attention(config.attention, identity=config.identity)
        self.cross_norm = nn.RMSNorm(D, eps=EPS)
        self.cross = AsymmetricCrossAttention(
            D, heads, context_dim, scope=config.cross_scope, qk_norm=partial(norm, eps=EPS)
        )
        self.mlp_condition = Condition(D)
        self.mlp = _mlp(config)

    def forward(
        self,
        x: Tensor,
        times: Tensor,
        plan: Tensor,
        context: Context,
        stream: Stream,
        given: PlanningKV | None = None,
        *,
        last: bool = False,
        wanted: Places | None = None,
    ) -> tuple[Tensor, PlanningKV | None]:
        """Tokens x (B, F * N, D) to the same; of known frames by themselves, what others read too.

        Args:
            times, plan: (B or 1, F or 1, D), embeddings of the timestep, and with the plan added.
            context: of these frames.
            given: what this block returned of known frames by themselves.
            last: nothing reads known frames after this block: anything may come back for them.
            wanted: only these frames come back.
        """
        y, count = x, stream.frames  # y: what a part reads, then what it found
        shift, scale, gate = self.spatial_condition(times)
        y, _ = self.spatial(norm_modulate(y, shift, scale, rms=True, eps=EPS), stream)
        x, y = _add_norm(x, y, self.between_norm, gate)
        y, own = self.between(y, stream, given, wanted=wanted)
        if stream.alone and last:
            return x, own
        if wanted is not None:
            x = take(x.unflatten(1, (count, -1)), wanted)
            count, x = x.shape[1], x.flatten(1, 2)
            plan, context = take(plan, wanted), self.context_of(context, wanted)
        x, y = _add_norm(x, y, self.cross_norm)
        if isinstance(context, Tensor):
            context = self.cross.project_context(context)
        unwanted = stream.known if last and wanted is None else None
        y = self.cross(y.unflatten(1, (count, -1)), context, unwanted).flatten(1, 2)
        shift, scale, gate = self.mlp_condition(plan)
        x, y = gated_residual_norm_modulate(x, y, None, shift, scale, rms=True, eps=EPS)
        return gated_residual(x, self.mlp(y), gate), own

    def context_of(self, context: Context, chosen: Places) -> Context:
        """What the chosen frames read of the context of all."""
        whole = self.cross.scope == "clip"  # then all of it, as the one frame that all share

        def part_of(part: Tensor) -> Tensor:
            return part.flatten(1, 2)[:, None] if whole else take(part, chosen)

        if isinstance(context, Tensor):
            return part_of(context)
        return PlanningKV(*map(part_of, context))

    def _within(self, x: Tensor, times: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        """Attention within frames, and the norm for that between them."""
        shift, scale, gate = self.spatial_condition(times)
        h = self.spatial(norm_modulate(x, shift, scale, rms=True, eps=EPS), stream)
        return _add_norm(x, h, self.between_norm, gate)

    def _after(
        self,
        x: Tensor,
        h: Tensor | None,
        plan: Tensor,
        context: Context,
        count: int,
        unwanted: Tensor | None = None,
    ) -> Tensor:
        """Cross-attention and MLP behind the attention between frames, which found h."""
        if h is None:
            y = norm_modulate(x, *_weight(self.cross_norm), rms=True, eps=EPS)
        else:
            x, y = _add_norm(x, h, self.cross_norm)
        if isinstance(context, Tensor):
            context = self.cross.project_context(context)
        h = self.cross(y.unflatten(1, (count, -1)), context, unwanted).flatten(1, 2)
        shift, scale, gate = self.mlp_condition(plan)
        x, y = gated_residual_norm_modulate(x, h, None, shift, scale, rms=True, eps=EPS)
        return gated_residual(x, self.mlp(y), gate)


class MarDiniGenerator(nn.Module):
    """Noisy latents and a plan to velocities."""

    def __init__(self, config: GeneratorConfig, channels: int, context_dim: int):
        super().__init__()
        self.config = config
        D, p = config.dim, config.patch
        self.patch = nn.Linear(channels * p * p, D)
        self.next = nn.Parameter(torch.empty(D)) if config.next_token else None
        self.timestep = TimestepEmbedding(D)
        self.plan = nn.Linear(context_dim, D) if config.modulated_by_plan else None
        self.unconditional = nn.Parameter(torch.empty(1, 1, 1, context_dim))  # in place of a plan
        self.blocks = nn.ModuleList(
            GeneratorBlock(config, context_dim) for _ in range(config.depth)
        )
        self.final_condition = nn.Linear(D, 2 * D)
        self.final = nn.Linear(D, channels * p * p)

    def planning(
        self, signal: Tensor | None, dropped: Tensor | None = None, *, project: bool = True
    ) -> Planning:
        """Of a signal, or of the learned token in its place.

        `project` makes the keys and values of all blocks now, else each block makes its own.
        """
        if signal is None:
            signal = self.unconditional
        elif dropped is not None:
            token = self.unconditional.to(signal.dtype)
            signal = token.where(dropped[:, None, None, None], signal)
        frame = signal.new_zeros(1, 1, self.config.dim)
        if self.plan is not None:
            frame = apply_linear(self.plan, signal.mean(2))
        if not project:
            return Planning((signal,) * len(self.blocks), frame)
        blocks = cast(list[GeneratorBlock], self.blocks)
        return Planning(tuple(block.cross.project_context(signal) for block in blocks), frame)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        known: Tensor,
        planning: Planning,
        checkpoint_blocks: int = 0,
    ) -> Tensor:
        """(B, C, T, H, W), (B or 1,) and known (B or 1, T) to velocities, 0 in known frames."""
        wanted = places(~known)
        known = known.to(latents.device, non_blocking=True)
        x, stream = self._enter(latents, known)
        times = self._times(timestep)
        if self.config.ref_t == "zero":
            times = self._times(torch.zeros_like(timestep)).where(known[:, :, None], times)
        plan = times + planning.frame
        for index, (block, context) in enumerate(zip(self.blocks, planning.contexts, strict=True)):
            end: dict[str, Any] = {}
            if index == len(self.blocks) - 1:
                end = {"last": True, "wanted": wanted}
            again = index < checkpoint_blocks
            x, _ = _run(block, again, x, times, plan, context, stream, **end)
        if wanted is not None:
            times = take(times, wanted)
        x = self._leave(x, times, latents)
        if wanted is not None:
            return put(x, wanted, stream.frames, dim=2)
        return x.where(~known[:, None, :, None, None], 0)

    def references(self, clean: Tensor, known: Tensor, planning: Planning) -> References:
        """Of the known frames of clean (B, C, T, H, W)."""
        known = known.cpu()
        ours, others = places(known), places(~known)
        if ours is None or others is None:
            counts = known.sum(1).tolist()
            raise ValueError(f"known must hold as many frames in each sample, got {counts}")
        x, stream = self._enter(clean, None, ours)
        times = self._times(torch.zeros(1, dtype=torch.int64, device=clean.device))
        stream = stream._replace(alone=True)
        own, given = self._planning_of(planning, ours), []
        plan = times + own.frame
        for index, (block, context) in enumerate(zip(self.blocks, own.contexts, strict=True)):
            last = index == len(self.blocks) - 1
            x, kv = block(x, times, plan, context, stream, last=last)
            given.append(kv)
        return References(tuple(given), self._planning_of(planning, others), others, known.shape[1])

    def with_references(self, latents: Tensor, timestep: Tensor, known: References) -> Tensor:
        """As `forward`, computing the unknown frames only."""
        x, stream = self._enter(latents, None, known.places)
        times = self._times(timestep)
        plan = times + known.planning.frame
        parts = zip(self.blocks, known.planning.contexts, known.given, strict=True)
        for block, context, given in parts:
            x, _ = block(x, times, plan, context, stream, given)
        return put(self._leave(x, times, latents), known.places, known.frames, dim=2)

    def _planning_of(self, planning: Planning, chosen: Places) -> Planning:
        """What the chosen frames read of it."""
        parts = zip(cast(list[GeneratorBlock], self.blocks), planning.contexts, strict=True)
        contexts = tuple(block.context_of(context, chosen) for block, context in parts)
        return Planning(contexts, take(planning.frame, chosen))

    def _times(self, timestep: Tensor) -> Tensor:
        return self.timestep(timestep)[:, None]

    def _enter(
        self, latents: Tensor, known: Tensor | None, chosen: Places | None = None
    ) -> tuple[Tensor, Stream]:
        """Tokens (B, F * N, D) of all frames, or of those chosen, and what attention must know."""
        config, T = self.config, latents.shape[2]
        if chosen is not None:
            latents = take(latents, chosen, dim=2)
        rows, columns = (size // config.patch for size in latents.shape[3:])
        x = end_rows(embed(self.patch, latents, config.patch), self.next, rows)
        count, tokens = x.shape[1:3]
        visibility = None
        if config.attention == "clip":
            visibility = clip_visibility(count, T, tokens, x.device, known, config.identity)
        rotary = _rotary(config, T, rows, columns, x.device, chosen)
        return x.flatten(1, 2), Stream(count, rotary, known, visibility)

    def _leave(self, x: Tensor, times: Tensor, latents: Tensor) -> Tensor:
        """Tokens (B, F * N, D) to velocities (B, C, F, H, W)."""
        config = self.config
        shift, scale = self.final_condition(F.silu(times)).chunk(2, -1)
        x = apply_linear(self.final, norm_modulate(x, shift, scale, rms=True, eps=EPS))
        rows, columns = (size // config.patch for size in latents.shape[3:])
        x = x.unflatten(1, (-1, rows * (columns + config.next_token)))
        x = x if self.next is None else drop_ends(x, rows)
        return to_latents(x, rows, config.patch).to(latents.dtype)


def _run(block: nn.Module, again: bool, *inputs: Any, **options: Any) -> Any:
    """`block(*inputs, **options)`, recomputed in the backward where `again`."""
    if again and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, **options)
    return block(*inputs, **options)


def _weight(norm: nn.RMSNorm, groups: int | None = None) -> tuple[Tensor, Tensor]:
    """A norm's weight as the shift and scale, (1, D) or (1, groups, D), of `norm_modulate`."""
    scale = (norm.weight - 1)[None]
    if groups is not None:
        scale = scale[:, None].expand(-1, groups, -1)
    return torch.zeros_like(scale), scale


def _add_norm(
    x: Tensor, h: Tensor, norm: nn.RMSNorm, gate: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`x + gate * h` and its norm, in one pass."""
    shift, scale = _weight(norm, None if gate is None else gate.shape[1])
    return gated_residual_norm_modulate(x, h, gate, shift, scale, rms=True, eps=EPS)


def _mlp(config: PlannerConfig | GeneratorConfig) -> nn.Module:
    if config.hidden == "gelu":
        return MLP(config.dim, config.mlp)
    if config.hidden == "silu":
        return MLP(config.dim, config.mlp, F.silu)
    narrow = -(-2 * config.mlp // 3 // 256) * 256  # Llama's rule: as many weights as two matrices
    return GatedMLP(config.dim, narrow)


def _rotary(
    config: PlannerConfig | GeneratorConfig,
    frames: int,
    rows: int,
    columns: int,
    device: torch.device,
    chosen: Places | None = None,
) -> Rotary:
    """Frame and place in the frame, counted row by row, of the tokens of all or chosen frames."""
    tokens, width = rows * (columns + config.next_token), config.dim // config.heads
    by_frame = config.frame_channels or width // 2
    tables = [
        rotary_table(torch.arange(length, device=device), channels, theta=config.theta)
        for length, channels in ((frames, by_frame), (tokens, width - by_frame))
    ]
    ranges = (torch.arange(n, dtype=torch.int32, device=device) for n in (frames, tokens))
    grid = torch.stack(torch.meshgrid(*ranges, indexing="ij"), -1)[None]  # (1, T, N, 2)
    grid = grid if chosen is None else take(grid, chosen)
    return Rotary.of(tables, grid.flatten(1, 2))
