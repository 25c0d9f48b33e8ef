"""Pyramid Flow's two networks: miniFLUX, and the MMDiT of Stable Diffusion 3 made for video.

Source: Jin et al., "Pyramidal Flow Matching for Efficient Video Generative Modeling",
arXiv:2410.05954. Both predict the velocity, towards the noise, of the newest frames of a clip from
the frames before them, which are clean and the coarser the older they are. Frames see the text and
no later frame; all tokens share one timestep. Written from the published description.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvid.models import pyramid_official as official
from fastvid.models.pyramid_columns import (
    Column,
    Prefix,
    Size,
    arrange,
    by_sample,
    check,
    check_prefix,
    clip_sizes,
    new_prefix,
    trimmed,
)
from fastvid.modules.checkpoints import read
from fastvid.modules.embeddings import TimestepEmbedding, sincos_table
from fastvid.modules.hub import HubModel, expect_types, refuse_misfits
from fastvid.modules.joint import (
    KV,
    JointBlock,
    Scene,
    SingleBlock,
    joined,
    modulated,
    modulation_rows,
    separated,
)
from fastvid.modules.linear import apply_linear

# Far beyond any model: a config that comes in a file is refused before anything is made.
_LIMIT, _MOST_BLOCKS = 65536, 1024


@dataclass(frozen=True, kw_only=True)
class PyramidFluxConfig:
    """What a miniFLUX is made of; the published size by default."""

    channels: int = 16
    patch: int = 2
    heads: int = 30
    head_width: int = 64
    joint_blocks: int = 8
    single_blocks: int = 16
    text_width: int = 4096
    pooled_width: int = 768
    time_width: int = 16  # channels of a head that turn by the frame,
    row_width: int = 24  # by the row
    column_width: int = 24  # and by the column

    def __post_init__(self):
        _expect_sizes(self)
        if any(width % 2 for width in self.rotary_dims):
            raise ValueError(f"time_, row_ and column_width must be even, got {self.rotary_dims}")
        if sum(self.rotary_dims) != self.head_width:
            raise ValueError(
                f"time_width, row_width and column_width must add up to head_width = "
                f"{self.head_width}, got {self.rotary_dims}"
            )

    @property
    def dim(self) -> int:
        return self.heads * self.head_width

    @property
    def rotary_dims(self) -> tuple[int, ...]:
        return (self.time_width, self.row_width, self.column_width)


@dataclass(frozen=True, kw_only=True)
class PyramidMMDiTConfig:
    """What an MMDiT is made of; the published size by default."""

    channels: int = 16
    patch: int = 2
    heads: int = 24
    head_width: int = 64
    joint_blocks: int = 24
    text_width: int = 4096
    pooled_width: int = 2048
    positions: int = 192  # side of the largest grid, in patches
    trained_positions: int = 64  # the distance from end to end of a grid, however fine
    frames: int = 200  # of the longest clip, in latent frames
    interpolate_history: bool = True  # coarse clips lie on the grid of the noisy unit

    def __post_init__(self):
        _expect_sizes(self)
        if self.dim % 4:
            raise ValueError(f"heads * head_width must be a multiple of 4, got {self.dim}")

    @property
    def dim(self) -> int:
        return self.heads * self.head_width

    @property
    def rotary_dims(self) -> tuple[int, ...]:
        return (self.head_width,)


class _PyramidModel(HubModel):
    """What both networks share: all but the blocks and the positions."""

    # Methods that start a forward pass of their own, for what wraps `forward`.
    forward_methods = ("packed", "extend")

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.checkpoint_blocks = 0  # the first so many blocks are recomputed in the backward
        D, cells = config.dim, config.patch**2 * config.channels
        self.patch = nn.Linear(cells, D)
        self.context = nn.Linear(config.text_width, D)
        self.timestep = TimestepEmbedding(D)
        self.pooled = nn.Sequential(nn.Linear(config.pooled_width, D), nn.SiLU(), nn.Linear(D, D))
        self.blocks = nn.ModuleList(self._make_blocks())
        self.modulation = nn.Linear(D, 2 * D)  # shift and scale before the final layer
        self.final = nn.Linear(D, cells)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier, but for the embedders of text and timestep; branches and output start at zero."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            parts = module.weight.chunk(3) if name.endswith("qkv") else [module.weight]
            for part in parts:
                nn.init.xavier_uniform_(part)
            if name.endswith("modulation") or name == "final":
                nn.init.zeros_(module.weight)
            if name.split(".")[0] in ("timestep", "pooled", "context"):
                nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        *,
        history: Sequence[Tensor] = (),
        text: Tensor,
        text_lengths: Tensor,
        pooled: Tensor,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """The velocity of one noisy unit.

        Args:
            latents: (B, C, T, H, W), the noisy unit; T > 1 denoises several frames at once, each
                of which sees those before it.
            timestep: (B,) floats from 0, clean, to 1000, noise.
            history: the frames before, as clips (B, C, t, h, w), oldest first, each at the
                resolution of its own.
            text: (B, L, text_width), embeddings of the prompt.
            text_lengths: (B,) integers, how many of the L are no padding. On the CPU, what is
                padding in all samples is left out.
            pooled: (B, pooled_width), the embedding of the whole prompt.
            prefix: what `extend` returned for the same text, timestep, resolution and first
                frames of `history`: these are not computed again, and `text` and those frames are
                not read.
        Returns:
            (B, C, T, H, W), noise minus data, dtype of `latents`.
        Raises:
            TypeError: an argument is no tensor of the kind above.
            ValueError: a shape is not the one above, H or W is no whole number of patches, there
                are more frames or patches than the positions reach, or `prefix` is of another
                history.
        """
        column = Column(latents, timestep, text, text_lengths, pooled, history)
        if prefix is None:
            return self._packed([column])[0]
        check(column, self.config)
        return self._run([column], prefix)[0][0]

    def packed(self, columns: Sequence[Column]) -> list[Tensor]:
        """The velocities of several columns, of different sizes, through one pass.

        The tokens of all columns go through every linear layer together.

        Args:
            columns: the arguments of `forward`, of each column. Batches may differ.
        """
        if not columns:
            raise ValueError("columns must hold at least one Column, got none")
        return self._packed(columns)

    def extend(
        self,
        latents: Tensor,
        timestep: Tensor,
        *,
        keep: int,
        history: Sequence[Tensor],
        text: Tensor,
        text_lengths: Tensor,
        pooled: Tensor,
        prefix: Prefix | None = None,
    ) -> tuple[Tensor, Prefix]:
        """`forward`, and a prefix for the calls of later units. Without gradients.

        Args:
            keep: how many of the oldest frames of `history` the new prefix holds, at least 1 and
                no fewer than `prefix` does: those that will be seen at the same resolution.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        column = Column(latents, timestep, text, text_lengths, pooled, history)
        check(column, self.config)
        with torch.no_grad():
            (out,), found = self._run([column], prefix, keep)
        assert found is not None
        return out, found

    def _packed(self, columns: Sequence[Column]) -> list[Tensor]:
        for index, column in enumerate(columns):
            check(column, self.config, f"columns[{index}]." if len(columns) > 1 else "")
        groups = [by_sample(column) for column in columns]
        outputs, _ = self._run([column for group in groups for column in group])
        ends = list(accumulate(len(group) for group in groups))
        parts = [outputs[a:b] for a, b in pairwise([0, *ends])]
        return [part[0] if len(part) == 1 else torch.cat(part) for part in parts]

    def _run(
        self, columns: Sequence[Column], prefix: Prefix | None = None, keep: int = 0
    ) -> tuple[list[Tensor], Prefix | None]:
        """The velocities of checked columns, and what the first one keeps."""
        config = self.config
        columns = [trimmed(column) for column in columns]
        sizes = [clip_sizes(column, config.patch) for column in columns]
        for its_sizes in sizes:
            self._check_reach(its_sizes)
            check_prefix(columns[0], its_sizes, prefix, keep)

        timestep = self.timestep(torch.cat([column.timestep for column in columns]))
        pooled = torch.cat([column.pooled for column in columns]).to(timestep.dtype)
        condition = F.silu(timestep + self.pooled(pooled))
        scenes = [
            arrange(column, its_sizes, config.rotary_dims, prefix, keep)
            for column, its_sizes in zip(columns, sizes, strict=True)
        ]
        text, video = self._embed(columns, sizes, prefix)
        video, layers = self._through_blocks(text, video, condition, scenes, prefix)
        rows = modulation_rows(self.modulation, condition, video)
        packed = apply_linear(self.final, modulated(video, rows))
        outputs = [
            _unpatched(x, its_sizes[-1], config.patch).to(column.latents.dtype)
            for x, its_sizes, column in zip(separated(packed, video), sizes, columns, strict=True)
        ]
        return outputs, new_prefix(layers, columns[0], sizes[0], prefix, keep) if keep else None

    def _embed(
        self, columns: Sequence[Column], sizes: Sequence[Sequence[Size]], prefix: Prefix | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The tokens of text and frames that are not in the prefix."""
        dtype, skipped = self.patch.weight.dtype, 0
        text: list[Tensor] = []
        if prefix is None:
            text = [column.text.to(dtype) for column in columns]
            text = separated(apply_linear(self.context, joined(text)), text)
        else:
            skipped = sum(prefix.tokens[1:])
        cells = [_patches(column, self.config.patch)[:, skipped:].to(dtype) for column in columns]
        video = separated(apply_linear(self.patch, joined(cells)), cells)
        tables = [self._positions(*pair) for pair in zip(sizes, video, strict=True)]
        return text, [
            x if table is None else x + table[skipped:]
            for x, table in zip(video, tables, strict=True)
        ]

    def _through_blocks(
        self,
        text: list[Tensor],
        video: list[Tensor],
        condition: Tensor,
        scenes: Sequence[tuple[Scene, Scene]],
        prefix: Prefix | None,
    ) -> tuple[list[Tensor], list[KV]]:
        """The noisy units' tokens behind the last block, and what each block keeps."""
        layers = []
        for index, block in enumerate(self.blocks):
            last = index == len(self.blocks) - 1
            here = [scene[last] for scene in scenes]
            if prefix is not None:
                here = [scene._replace(past=prefix.layers[index]) for scene in here]
            if isinstance(block, SingleBlock) and text:
                video, text = [torch.cat(pair, 1) for pair in zip(text, video, strict=True)], []
            run: Callable[..., Any] = block
            if index < self.checkpoint_blocks and torch.is_grad_enabled():
                run = partial(checkpoint, block, use_reentrant=False)
            if isinstance(block, JointBlock):
                text, video, kept = run(text, video, condition, here)
            else:
                video, kept = run(video, condition, here)
            layers.append(kept[0])
        return video, layers

    @classmethod
    def from_official(
        cls, source: str | Path | Mapping[str, Tensor], *, config: Any = None
    ) -> "_PyramidModel":
        """Read weights under the official names.

        Args:
            source: a folder with a safetensors or PyTorch file or the index of shards, such a
                file, read by `torch.load` with `weights_only=True`, or a state dict.
            config: what the model is. By default read off the shapes, and off the `config.json` of
                a folder, taking patches as 2 x 2.
        Raises:
            FileNotFoundError: no weights there, or a shard is missing.
            ValueError: a tensor is missing, left over, of another shape or not finite, all named;
                a file is not whole; the weights are of the other network.
            TypeError: `source` holds no dict of tensors.
        """
        state, variant = read(source), cls.__name__
        found = official.sizes(variant, state)
        if config is None:
            config = cls.config_class(**(found | official.settings(variant, source)))
        with torch.device("meta"):
            model = cls(config)
        parts = model._official_parts()
        refuse_misfits(official.shapes_of(parts, variant, config), state)
        if (table := model._table()) is not None:
            official.check_table(state, table)
        own = {name: part.to_own(state) for name, part in parts.items()}
        model.load_state_dict(own, assign=True)
        return model

    def to_official_state_dict(self) -> dict[str, Tensor]:
        """The weights under the official names and in the official shapes, as copies."""
        found = self.official_names(self.state_dict())
        if (table := self._table()) is not None:
            found |= official.table_of(table)
        return found

    def official_names(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of the parameters, such as gradients, under the official names, as copies."""
        found: dict[str, Tensor] = {}
        for name, part in self._official_parts().items():
            found |= part.to_official(own[name])
        return found

    def _official_parts(self) -> dict[str, official.Parts]:
        shapes = {name: value.shape for name, value in self.state_dict().items()}
        return official.layout(type(self).__name__, self.config, shapes)

    def _table(self) -> Tensor | None:
        """(H, W, D) positions of the largest grid, where the official weights hold them."""
        return None

    def _make_blocks(self) -> list[nn.Module]:
        raise NotImplementedError

    def _check_reach(self, sizes: Sequence[Size]) -> None:
        """Refuse more frames or patches than there are positions for."""

    def _positions(self, sizes: Sequence[Size], tokens: Tensor) -> Tensor | None:
        """(frames' tokens, D) to add to the patches, where the positions are not all rotary."""
        return None


class PyramidFlux(_PyramidModel):
    """miniFLUX: joint blocks, then single blocks; rotary positions in time and space."""

    config_class = PyramidFluxConfig
    config: PyramidFluxConfig

    def _make_blocks(self) -> list[nn.Module]:
        config, size = self.config, (self.config.dim, self.config.heads, 1e-6)
        joint = [JointBlock(*size) for _ in range(config.joint_blocks)]
        return [*joint, *(SingleBlock(*size) for _ in range(config.single_blocks))]


class PyramidMMDiT(_PyramidModel):
    """The MMDiT: joint blocks; rotary positions in time, a sinusoidal table in space."""

    config_class = PyramidMMDiTConfig
    config: PyramidMMDiTConfig

    def _make_blocks(self) -> list[nn.Module]:
        config, size = self.config, (self.config.dim, self.config.heads, 1e-5)
        joint: list[nn.Module] = [JointBlock(*size) for _ in range(config.joint_blocks - 1)]
        return [*joint, JointBlock(*size, last=True)]

    def _check_reach(self, sizes: Sequence[Size]) -> None:
        config = self.config
        if (frames := sum(size[0] for size in sizes)) > config.frames:
            raise ValueError(
                f"history and latents must have {config.frames} frames at most, got {frames}"
            )
        for _, rows, columns in sizes:
            if max(rows, columns) > config.positions:
                raise ValueError(
                    f"clips must have {config.positions} x {config.positions} patches at most, got "
                    f"{rows} x {columns}"
                )

    def _positions(self, sizes: Sequence[Size], tokens: Tensor) -> Tensor:
        config = self.config
        parts = []
        for frames, *size in sizes:
            lines = []
            for full, cells in zip(sizes[-1][1:], size, strict=True):
                full = full if config.interpolate_history else cells
                table = self._line(full, tokens.device)
                lines.append(F.interpolate(table.T[None], cells, mode="linear")[0].T)
            parts.append(_crossed(*lines).flatten(0, 1).repeat(frames, 1))
        return torch.cat(parts).to(tokens.dtype)

    def _table(self) -> Tensor:
        line = self._line(self.config.positions, torch.device("cpu"))
        return _crossed(line, line)

    def _line(self, cells: int, device: torch.device) -> Tensor:
        """(cells, D / 2) sinusoids of the middle of the largest grid's side."""
        config = self.config
        first = (config.positions - cells) // 2
        at = torch.arange(first, first + cells, dtype=torch.float64, device=device)
        return sincos_table(at * config.trained_positions / config.positions, config.dim // 2)


def _crossed(rows: Tensor, columns: Tensor) -> Tensor:
    """(H, D / 2) and (W, D / 2) to (H, W, D), the columns' half first."""
    wide = columns.expand(len(rows), -1, -1), rows[:, None].expand(-1, len(columns), -1)
    return torch.cat(wide, -1)


def _patches(column: Column, patch: int) -> Tensor:
    """The tokens of history and noisy unit, (B, N, cells)."""
    pattern = "b c t (h p) (w q) -> b (t h w) (p q c)"
    clips = [rearrange(c, pattern, p=patch, q=patch) for c in (*column.history, column.latents)]
    return clips[0] if len(clips) == 1 else torch.cat(clips, 1)


def _unpatched(tokens: Tensor, size: Size, patch: int) -> Tensor:
    pattern = "b (t h w) (p q c) -> b c t (h p) (w q)"
    return rearrange(tokens, pattern, t=size[0], h=size[1], w=size[2], p=patch, q=patch)


def _expect_sizes(config: Any) -> None:
    expect_types(config)
    for name, value in vars(config).items():
        most = _MOST_BLOCKS if name.endswith("blocks") else _LIMIT
        if type(value) is int and not 1 <= value <= most:
            raise ValueError(f"{name} must be 1 to {most}, got {value}")
    if config.head_width % 8 or not 16 <= config.head_width <= 256:
        raise ValueError(
            f"head_width must be a multiple of 8 from 16 to 256, got {config.head_width}"
        )
