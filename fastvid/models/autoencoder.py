"""CausalVideoVAE: the autoencoder of Pyramid Flow, 8 x 8 pixels and 8 frames to a latent cell.

No frame sees a later one, so a clip may be coded in windows, and a single image is a clip of one
frame: T = 1 + 8 n frames become 1 + n latent frames.

Source: Jin et al., arXiv:2410.05954, appendix B; after Yu et al., MAGVIT-v2, arXiv:2310.05737.
Written from the published description.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fastvid.models import autoencoder_official as official
from fastvid.modules.checkpoints import read
from fastvid.modules.hub import HubModel, load_strictly

# Between two windows: the frames that a convolution will read again. None codes a whole clip.
Memory: TypeAlias = dict[nn.Module, Tensor] | None

FACTOR = 8  # pixels per cell along height and width, and frames after the first per latent frame
_OVERLAP = 4  # a quarter of a tile lies under the next
_LIVE = 7  # tensors of the widest kind that are alive at once; a test measures them


@dataclass(frozen=True, kw_only=True)
class CausalVideoVAEConfig:
    """What the autoencoder is made of; the published size by default."""

    channels: int = 16  # of the latents
    widths: tuple[int, int, int, int] = (128, 256, 512, 512)  # from full resolution to an eighth
    encoder_layers: tuple[int, int, int, int] = (2, 2, 2, 2)  # in the order of `widths`
    decoder_layers: tuple[int, int, int, int] = (3, 3, 3, 3)  # in the opposite order
    groups: int = 32  # of every norm

    def __post_init__(self):
        for name in ("widths", "encoder_layers", "decoder_layers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON knows only lists
            value = getattr(self, name)
            if len(value) != 4 or any(type(each) is not int or each < 1 for each in value):
                raise ValueError(f"{name} must be 4 positive integers, got {value}")
        for name, value in (("channels", self.channels), ("groups", self.groups)):
            if type(value) is not int or not 1 <= value <= 65536:
                raise ValueError(f"{name} must be an integer from 1 to 65536, got {value!r}")
        if any(width % self.groups for width in self.widths):
            raise ValueError(f"widths must be multiples of groups={self.groups}, got {self.widths}")
        if max(self.widths) > 65536 or max(*self.encoder_layers, *self.decoder_layers) > 1024:
            raise ValueError(f"no autoencoder is that large: {self}")


class Posterior(NamedTuple):
    """A normal distribution per latent value; both (B, C, t, h, w)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw; `generator` is on the device of the tensors."""
        like = {"dtype": self.mean.dtype, "device": self.mean.device}
        noise = torch.randn(self.mean.shape, generator=generator, **like)  # type: ignore[call-overload]
        return self.mean + (0.5 * self.log_variance).exp() * noise


class CausalConv3d(nn.Conv3d):
    """A convolution that sees its own frame and those before; before the first there are zeros."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, *, time: int = 1, space: int = 1):
        super().__init__(inputs, outputs, size, (time, space, space), (0, size // 2, size // 2))

    def forward(self, x: Tensor, memory: Memory = None) -> Tensor:
        before = self.kernel_size[0] - 1
        if before == 0:
            return super().forward(x)
        if memory is not None and self in memory:
            x = torch.cat([memory[self], x], 2)
        else:
            x = F.pad(x, (0, 0, 0, 0, before, 0))
        if memory is not None:  # a stride of 2 leaves one frame behind, a stride of 1 two
            memory[self] = x[:, :, x.shape[2] - (before + 1 - self.stride[0]) :].clone()
        return super().forward(x)


class FrameNorm(nn.GroupNorm):
    """GroupNorm of every frame by itself. (B, C, T, H, W) to the same."""

    def __init__(self, groups: int, width: int):
        super().__init__(groups, width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        frames = super().forward(x.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class ResidualBlock(nn.Module):
    """Two convolutions, each behind a norm, and the way past them."""

    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.norm1 = FrameNorm(groups, inputs)
        self.conv1 = CausalConv3d(inputs, outputs)
        self.norm2 = FrameNorm(groups, outputs)
        self.conv2 = CausalConv3d(outputs, outputs)
        self.shortcut = CausalConv3d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        branch = self.conv1(F.silu(self.norm1(x)), memory)
        branch = self.conv2(F.silu(self.norm2(branch)), memory)
        return (x if self.shortcut is None else self.shortcut(x)) + branch


class FrameAttention(nn.Module):
    """Attention inside each frame, with one head."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = FrameNorm(groups, width)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, _, _, H, _ = x.shape
        tokens = rearrange(self.norm(x), "b c t h w -> (b t) 1 (h w) c")
        q, k, v = (layer(tokens) for layer in (self.q, self.k, self.v))
        out = self.proj(F.scaled_dot_product_attention(q, k, v))
        return x + rearrange(out, "(b t) 1 (h w) c -> b c t h w", b=B, h=H)


class Middle(nn.Module):
    """Behind the encoder's levels, before the decoder's."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.block1 = ResidualBlock(width, width, groups)
        self.attention = FrameAttention(width, groups)
        self.block2 = ResidualBlock(width, width, groups)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        return self.block2(self.attention(self.block1(x, memory)), memory)


class Level(nn.Module):
    """Residual blocks of one resolution, then the step to the next: half the size, or twice."""

    def __init__(self, inputs: int, width: int, layers: int, groups: int, step: str):
        super().__init__()
        sizes = [inputs] + [width] * layers
        self.blocks = nn.ModuleList(ResidualBlock(*size, groups) for size in pairwise(sizes))
        self.space: CausalConv3d | None = None
        if step == "halve":
            self.space = CausalConv3d(width, width, space=2)
            self.time = CausalConv3d(width, width, time=2)
        elif step == "double":
            self.space = CausalConv3d(width, 4 * width)
            self.time = CausalConv3d(width, 2 * width)
        self.step = step

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        for block in self.blocks:
            x = block(x, memory)
        if self.space is None:
            return x
        if self.step == "halve":
            return self.time(self.space(x, memory), memory)
        x = rearrange(self.space(x, memory), "b (c p q) t h w -> b c t (h p) (w q)", p=2, q=2)
        starts = memory is None or self.time not in memory
        x = rearrange(self.time(x, memory), "b (c p) t h w -> b c (t p) h w", p=2)
        return x[:, :, 1:] if starts else x  # the first frame stands for itself alone


class Encoder(nn.Module):
    """(B, 3, 1 + 8n, H, W) to the moments (B, 2C, 1 + n, H / 8, W / 8)."""

    def __init__(self, config: CausalVideoVAEConfig):
        super().__init__()
        widths, groups = config.widths, config.groups
        self.first = CausalConv3d(3, widths[0])
        sizes = zip((widths[0], *widths), widths, config.encoder_layers, strict=False)
        self.levels = nn.ModuleList(
            Level(*size, groups, "halve" if index < 3 else "") for index, size in enumerate(sizes)
        )
        self.middle = Middle(widths[-1], groups)
        self.norm = FrameNorm(groups, widths[-1])
        self.last = CausalConv3d(widths[-1], 2 * config.channels)

    def forward(self, x: Tensor, memory: Memory = None) -> Tensor:
        x = self.first(x, memory)
        for level in self.levels:
            x = level(x, memory)
        x = self.middle(x, memory)
        return self.last(F.silu(self.norm(x)), memory)


class Decoder(nn.Module):
    """Latents (B, C, 1 + n, h, w) to (B, 3, 1 + 8n, 8h, 8w)."""

    def __init__(self, config: CausalVideoVAEConfig):
        super().__init__()
        widths, groups = config.widths[::-1], config.groups
        self.first = CausalConv3d(config.channels, widths[0])
        self.middle = Middle(widths[0], groups)
        sizes = zip((widths[0], *widths), widths, config.decoder_layers, strict=False)
        self.levels = nn.ModuleList(
            Level(*size, groups, "double" if index < 3 else "") for index, size in enumerate(sizes)
        )
        self.norm = FrameNorm(groups, widths[-1])
        self.last = CausalConv3d(widths[-1], 3)

    def forward(self, x: Tensor, memory: Memory = None) -> Tensor:
        x = self.middle(self.first(x, memory), memory)
        for level in self.levels:
            x = level(x, memory)
        return self.last(F.silu(self.norm(x)), memory)


class CausalVideoVAE(HubModel):
    """Video to latents and back, whole, in windows of time, in tiles of space, or both.

    Windows change nothing but the memory that is needed. Tiles are blended where they overlap:
    each is normed by itself, so the result is close to the whole frame's, not equal.
    """

    config_class = CausalVideoVAEConfig
    config: CausalVideoVAEConfig

    def __init__(self, config: CausalVideoVAEConfig | None = None):
        super().__init__()
        self.config = config = config or CausalVideoVAEConfig()
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.moments = CausalConv3d(2 * config.channels, 2 * config.channels, 1)
        self.latents = CausalConv3d(config.channels, config.channels, 1)

    def forward(self, video: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Encode, draw from the posterior, decode: what training compares with `video`."""
        latents = self.encode(video, frames=video.shape[2]).sample(generator)
        return self.decode(latents, frames=latents.shape[2])

    def encode(
        self, video: Tensor, *, frames: int | None = None, tile: int | None = None
    ) -> Posterior:
        """
        Args:
            video: (B, 3, T, H, W) in [-1, 1], T one more than a multiple of 8, H and W multiples
                of 8.
            frames: of a window, a multiple of 8; the first has one more. By default as many as
                `window` finds memory for.
            tile: side of a tile in pixels, a multiple of 32. By default a frame is one piece.
        Returns:
            The posterior of latents (B, C, 1 + (T - 1) / 8, H / 8, W / 8), in the weights' dtype.
        Raises:
            ValueError, TypeError: an argument is not as above.
        """
        _check_tile(tile)
        _expect(video, "video", 3)
        T, *sides = video.shape[2:]
        if T % FACTOR != 1:
            raise ValueError(f"video must have 1 + 8 n frames, got {T}")
        if any(side < FACTOR or side % FACTOR for side in sides):
            raise ValueError(f"H and W of video must be multiples of {FACTOR}, got {tuple(sides)}")
        if frames is None:
            frames = FACTOR * self.window(video.shape, tile)
        elif frames < 1 or (frames % FACTOR and frames != T):
            raise ValueError(f"frames must be a positive multiple of {FACTOR}, got {frames}")

        def code(piece: Tensor) -> Tensor:
            moments = _in_windows(self.encoder, piece, frames)
            return self.moments(moments)

        x = video.to(self.moments.weight.dtype)
        found = _in_tiles(code, x, tile, out=lambda size: size // FACTOR)
        return Posterior(*found.chunk(2, 1))

    def decode(
        self, latents: Tensor, *, frames: int | None = None, tile: int | None = None
    ) -> Tensor:
        """
        Args:
            latents: (B, C, t, h, w).
            frames: latent frames of a window; the first has one more. By default as many as
                `window` finds memory for.
            tile: side of a tile in pixels, a multiple of 32. By default a frame is one piece.
        Returns:
            (B, 3, 1 + 8 (t - 1), 8h, 8w), not clamped, in the weights' dtype.
        Raises:
            ValueError, TypeError: an argument is not as above.
        """
        _check_tile(tile)
        _expect(latents, "latents", self.config.channels)
        if min(latents.shape[2:]) < 1:
            raise ValueError(f"latents must not be empty, got {tuple(latents.shape)}")
        if frames is None:
            B, _, t, h, w = latents.shape
            frames = self.window((B, 3, 1 + FACTOR * (t - 1), FACTOR * h, FACTOR * w), tile)
        elif frames < 1:
            raise ValueError(f"frames must be positive, got {frames}")

        def code(piece: Tensor) -> Tensor:
            return _in_windows(self.decoder, self.latents(piece), frames)

        x = latents.to(self.latents.weight.dtype)
        return _in_tiles(code, x, tile and tile // FACTOR, out=lambda size: size * FACTOR)

    def window(
        self, video: tuple[int, ...] | torch.Size, tile: int | None = None, free: int | None = None
    ) -> int:
        """Latent frames per window that fit in `free` bytes, at least 1, at most the clip's.

        Args:
            video: (B, 3, T, H, W), the shape on the pixels' side.
            free: by default three quarters of what the device has left.
        """
        B, _, T, H, W = video
        pixels = B * min(H, tile or H) * min(W, tile or W)
        weight = self.moments.weight
        free = int(0.75 * _free_bytes(weight.device)) if free is None else free
        # A window's largest tensors are those of the two finest levels, 8 frames each; the first
        # window has one latent frame more.
        width = max(2 * self.config.widths[0], self.config.widths[1])
        frame = FACTOR * pixels * width * weight.itemsize * _LIVE
        latent_frames = 1 + (T - 1) // FACTOR
        return max(1, min(latent_frames, free // frame - 1))

    @classmethod
    def from_official(
        cls,
        source: str | Path | Mapping[str, Tensor],
        *,
        config: CausalVideoVAEConfig | None = None,
    ) -> "CausalVideoVAE":
        """Read weights under the official names.

        Args:
            source: a folder with a safetensors or PyTorch file or the index of shards, such a
                file, read by `torch.load` with `weights_only=True`, or a state dict.
            config: what the model is. By default read off the shapes, with 32 groups a norm.
        Raises:
            FileNotFoundError: no weights there, or a shard is missing.
            ValueError: a tensor is missing, left over, of another shape or not finite, all named;
                a file is not whole.
            TypeError: `source` holds no dict of tensors.
        """
        state = read(source)
        if config is None:
            config = CausalVideoVAEConfig(**official.sizes(state))
        with torch.device("meta"):
            model = cls(config)
        own = {official.own_name(name): value for name, value in state.items()}
        load_strictly(model, own)
        return model

    def to_official_state_dict(self) -> dict[str, Tensor]:
        """The weights under the official names, as copies."""
        return {official.official_name(k): v.clone() for k, v in self.state_dict().items()}


def _in_windows(code: Callable[[Tensor, Memory], Tensor], x: Tensor, frames: int) -> Tensor:
    """`code` of a clip, `frames` at a time, one more at first."""
    if x.shape[2] <= frames + 1:
        return code(x, None)
    memory: Memory = {}
    rest = x.shape[2] - frames - 1
    sizes = [frames + 1, *[frames] * (rest // frames), *([rest % frames] if rest % frames else [])]
    return torch.cat([code(part, memory) for part in x.split(sizes, 2)], 2)


def _in_tiles(
    code: Callable[[Tensor], Tensor], x: Tensor, tile: int | None, out: Callable[[int], int]
) -> Tensor:
    """`code` of overlapping tiles, each blended into those above and to the left of it."""
    H, W = x.shape[3:]
    if tile is None or (tile >= H and tile >= W):
        return code(x)
    step = tile - tile // _OVERLAP
    extent, kept = out(tile) // _OVERLAP, out(step)
    above: list[Tensor] = []
    bands = []
    for top in range(0, H, step):
        row: list[Tensor] = []
        for index, left in enumerate(range(0, W, step)):
            piece = code(x[..., top : top + tile, left : left + tile])
            if top:
                piece = _blended(above[index], piece, extent, 3)
            if left:
                piece = _blended(row[-1], piece, extent, 4)
            row.append(piece)
        bands.append(torch.cat([piece[..., :kept, :kept] for piece in row], 4))
        above = row
    return torch.cat(bands, 3)


def _blended(before: Tensor, piece: Tensor, extent: int, axis: int) -> Tensor:
    """`piece` with its first cells faded in over the last ones of `before`."""
    extent = min(extent, before.shape[axis], piece.shape[axis])
    start, rest = piece.split([extent, piece.shape[axis] - extent], axis)
    end = before.narrow(axis, before.shape[axis] - extent, extent)
    weight = torch.arange(extent, dtype=piece.dtype, device=piece.device) / extent
    weight = weight.view(-1, *[1] * (4 - axis))
    return torch.cat([torch.lerp(end, start, weight), rest], axis)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        # What the allocator has cached is free as well.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # a system that does not say
        return 1 << 30


def _check_tile(tile: Any) -> None:
    if tile is not None and (type(tile) is not int or tile < 32 or tile % 32):
        raise ValueError(f"tile must be a multiple of 32 pixels, got {tile!r}")


def _expect(x: Any, name: str, channels: int) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {found}")
    if x.ndim != 5 or x.shape[1] != channels:
        raise ValueError(f"{name} must be (B, {channels}, T, H, W), got {tuple(x.shape)}")
