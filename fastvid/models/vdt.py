"""VDT: a video diffusion transformer with alternating temporal and spatial attention.

Source: Lu et al., "VDT: General-purpose Video Diffusion Transformers via Mask Modeling",
arXiv:2305.13311. Blocks attend over time, then over space, then apply the MLP; the timestep
modulates the last two. Written from the published description.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvid.models.vdt_official import layout, sizes
from fastvid.modules.attention import SpatialAttention, TemporalAttention
from fastvid.modules.checkpoints import read
from fastvid.modules.embeddings import (
    TimestepEmbedding,
    resize_grid,
    resize_line,
    sincos_grid,
    sincos_table,
)
from fastvid.modules.hub import HubModel, expect_types, refuse_misfits
from fastvid.modules.linear import apply_linear
from fastvid.modules.mlp import MLP
from fastvid.modules.modulation import gated_residual, modulated, normed

# Far beyond any model: a config that comes in a file is refused before anything is made.
_LIMITS = {
    "channels": 4096,
    "height": 4096,
    "width": 4096,
    "frames": 65536,
    "patch": 256,
    "dim": 65536,
    "depth": 1024,
    "heads": 4096,
    "num_classes": 10_000_000,
}


@dataclass(frozen=True, kw_only=True)
class VDTConfig:
    """What a VDT is made of. `height`, `width` and `frames` are the maxima, in latent cells."""

    channels: int = 4
    height: int = 16
    width: int = 16
    frames: int = 16
    patch: int = 2
    dim: int = 1152
    depth: int = 28
    heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1
    class_dropout: float = 0.1  # > 0 adds the row of the dropped label to the label table
    drop_labels: bool = True  # in training, as the official code does even with a single class
    learned_variance: bool = True
    mode: Literal["video", "image"] = "video"

    def __post_init__(self):
        expect_types(self)
        for name, limit in _LIMITS.items():
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be positive, got {value}")
            if value > limit:
                raise ValueError(f"{name} must be at most {limit}, got {value}")
        if not 1 / self.dim <= self.mlp_ratio <= 256:
            raise ValueError(f"mlp_ratio must be in [1 / dim, 256], got {self.mlp_ratio}")
        for name, divisor in (("height", self.patch), ("width", self.patch), ("dim", self.heads)):
            if (value := getattr(self, name)) % divisor:
                raise ValueError(f"{name} must be a multiple of {divisor}, got {value}")
        if self.dim % 4:
            raise ValueError(f"dim must be a multiple of 4 (position tables), got {self.dim}")
        if not 0 <= self.class_dropout < 1:
            raise ValueError(f"class_dropout must be in [0, 1), got {self.class_dropout}")
        if self.mode not in ("video", "image"):
            raise ValueError(f'mode must be "video" or "image", got {self.mode!r}')
        if self.mode == "image" and self.frames != 1:
            raise ValueError(f'mode="image" has frames=1, got frames={self.frames}')

    @property
    def out_channels(self) -> int:
        """Of the prediction: noise, and variance where that is learned."""
        return self.channels * (2 if self.learned_variance else 1)


VDT_S = VDTConfig(dim=384, depth=12, heads=6)  # S/2, 41.4 M parameters
VDT_L = VDTConfig(dim=1152, depth=28, heads=16)  # L/2, 859.8 M


class Block(nn.Module):
    """Temporal attention, spatial attention, MLP, each added to the stream (B, T, N, D)."""

    def __init__(self, config: VDTConfig):
        super().__init__()
        D, heads = config.dim, config.heads
        self.temporal: TemporalAttention | None = None
        if config.mode == "video":
            self.temporal_norm = nn.LayerNorm(D)
            self.temporal = TemporalAttention(D, heads)
        self.spatial = SpatialAttention(D, heads)
        self.mlp = MLP(D, int(D * config.mlp_ratio))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """`modulation` (B or 1, 6, D): shift, scale and gate of the spatial branch, of the MLP."""
        # Without a backward one copy is updated: the caller's x, which hooks may hold, is not.
        in_place = not torch.is_grad_enabled()
        x = x.clone() if in_place else x
        if self.temporal is not None:
            branch = self.temporal(normed(x, self.temporal_norm))
            x = gated_residual(x, branch, in_place=in_place)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.unbind(1)
        branch = self.spatial(modulated(x, shift, scale))
        x = gated_residual(x, branch, gate, in_place=in_place)
        branch = self.mlp(modulated(x, mlp_shift, mlp_scale))
        return gated_residual(x, branch, mlp_gate, in_place=in_place)


class VDT(HubModel):
    """Predict noise (and variance) of video latents, for any T, H, W up to the config's maxima.

    Smaller clips use the first rows of the position tables. Larger ones need longer tables:
    `VDT.from_official(model.to_official_state_dict(), frames=..., heads=...)`.
    """

    config_class = VDTConfig
    config: VDTConfig
    position: Tensor  # (H / patch, W / patch, D)
    time: Tensor  # (T, D), in video mode

    def __init__(self, config: VDTConfig):
        super().__init__()
        self.config = config
        self.checkpoint_blocks = 0  # the first so many blocks are recomputed in the backward
        D, p = config.dim, config.patch
        self.patch = nn.Linear(config.channels * p * p, D)
        self.timestep = TimestepEmbedding(D)
        self.label = nn.Embedding(config.num_classes + (config.class_dropout > 0), D)
        self.modulation = nn.Linear(D, (6 * config.depth + 2) * D)  # all blocks, then the final
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final = nn.Linear(D, p * p * config.out_channels)
        self.register_buffer("position", sincos_grid(config.height // p, config.width // p, D))
        if config.mode == "video":
            self.register_buffer("time", sincos_table(config.frames, D))
        self.reset_parameters()
        self.register_state_dict_pre_hook(_refuse_folded)

    def reset_parameters(self) -> None:
        """Xavier for all but the label and timestep tables; every branch gate starts at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for weight in (self.label.weight, self.timestep.fc1.weight, self.timestep.fc2.weight):
            nn.init.normal_(weight, std=0.02)
        for weight in (self.modulation.weight, self.final.weight):
            nn.init.zeros_(weight)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        *,
        known: Tensor | None = None,
        condition_frames: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """One denoising step.

        Args:
            latents: (B, C, T, H, W), known cells already clean.
            timestep: (B,) integers, or (1,) when all samples share it (then the modulation is
                computed once).
            known: (B, T) or (B, T, H, W) bool, True where given. Only checked: the published
                model is not told which cells are clean; the sampler or the loss mixes them in.
            condition_frames: (B, C, Tc, H, W) clean frames put before `latents` on the time axis
                (the paper's token concatenation); their predictions are dropped.
            labels: (B,) or (1,) integers, class 0 by default; `num_classes` is "no label".
        Returns:
            (B, C, T, H, W), or (B, 2C, T, H, W) with learned variance: noise, then the variance's
            place between its bounds. Dtype of `latents`.
        Raises:
            ValueError: a shape is not the one above or exceeds the config.
            TypeError: `known` is not bool, `timestep` or `labels` not integers.
        """
        self._check(latents, timestep, known, condition_frames)
        given = 0
        if condition_frames is not None:
            given = condition_frames.shape[2]
            latents = torch.cat([condition_frames, latents], dim=2)

        p, dtype = self.config.patch, self.patch.weight.dtype
        x = rearrange(latents, "b c t (h p) (w q) -> b t (h w) (c p q)", p=p, q=p)
        x = self.patch(x.to(dtype)) + self._positions(latents)
        condition = F.silu(self.timestep(timestep) + self._label(len(latents), labels))
        modulation = self.modulation(condition).unflatten(-1, (-1, self.config.dim))
        *parts, last = modulation.split([6] * len(self.blocks) + [2], dim=1)
        for index, (block, part) in enumerate(zip(self.blocks, parts, strict=True)):
            if index < self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, part, use_reentrant=False)
            else:
                x = block(x, part)
        x = apply_linear(self.final, modulated(x, *last.unbind(1)))
        height = latents.shape[3] // p
        x = rearrange(x, "b t (h w) (p q c) -> b c t (h p) (w q)", h=height, p=p, q=p)
        return (x[:, :, given:] if given else x).to(latents.dtype)

    def _positions(self, latents: Tensor) -> Tensor:
        T, H, W = (latents.shape[2], *(side // self.config.patch for side in latents.shape[3:]))
        # Gathered: a compiled graph would be made anew for slices of the whole table.
        rows, columns, frames = (torch.arange(n, device=latents.device) for n in (H, W, T))
        grid = self.position[rows[:, None], columns].flatten(0, 1)
        return grid if self.config.mode == "image" else grid + self.time[frames, None]

    def _label(self, batch: int, labels: Tensor | None) -> Tensor:
        config = self.config
        if labels is None:
            labels = torch.zeros(1, dtype=torch.long, device=self.label.weight.device)
        else:
            _expect_integers("labels", labels, batch)
            rows = self.label.num_embeddings
            # Only a compiled graph and a GPU, which would have to wait, go unchecked.
            checked = labels.device.type == "cpu" and not torch.compiler.is_compiling()
            if checked and not ((labels >= 0) & (labels < rows)).all():
                raise ValueError(f"labels must be 0 to {rows - 1}, got {labels.tolist()}")
        if self.training and config.drop_labels and config.class_dropout > 0:
            dropped = torch.rand(batch, device=labels.device) < config.class_dropout
            labels = torch.where(dropped, config.num_classes, labels)
        return self.label(labels)

    def _check(
        self,
        latents: Tensor,
        timestep: Tensor,
        known: Tensor | None,
        condition_frames: Tensor | None,
    ) -> None:
        config = self.config
        _expect_floats("latents", latents)
        if latents.ndim != 5 or latents.shape[1] != config.channels:
            expected = f"(B, {config.channels}, T, H, W)"
            raise ValueError(f"latents must be {expected}, got {tuple(latents.shape)}")
        B, C, T, H, W = latents.shape
        total = T
        if condition_frames is not None:
            _expect_floats("condition_frames", condition_frames)
            shape = tuple(condition_frames.shape)
            if len(shape) != 5 or (*shape[:2], *shape[3:]) != (B, C, H, W):
                expected = f"({B}, {C}, Tc, {H}, {W}), as latents are"
                raise ValueError(f"condition_frames must be {expected}, got {shape}")
            total += shape[2]
        if T < 1 or total > config.frames:
            raise ValueError(
                f"latents, with condition_frames, must have 1 to {config.frames} frames, got "
                f"{total}; load the weights with from_official(..., frames={total}) for more"
            )
        for name, size, limit in (("H", H, config.height), ("W", W, config.width)):
            if size % config.patch or not 0 < size <= limit:
                raise ValueError(
                    f"{name} of latents must be a multiple of {config.patch}, at most {limit}, "
                    f"got {size}"
                )
        _expect_integers("timestep", timestep, B)
        if known is not None:
            if not isinstance(known, Tensor) or known.dtype != torch.bool:
                raise TypeError(f"known must be bool, True where given, got {_kind(known)}")
            if known.shape not in ((B, T), (B, T, H, W), (1, T), (1, T, H, W)):
                expected = f"({B}, {T}) or ({B}, {T}, {H}, {W})"
                raise ValueError(f"known must be {expected}, got {tuple(known.shape)}")

    def fold(self) -> "VDT":
        """Merge `temporal_fc` into the projection before it, in place. For inference only.

        The result is the same up to rounding. It saves D^3 products per block in a call on many
        tokens, D^2 per token in one on few, and the memory of `temporal_fc`. The weights can no
        longer be saved, nor resized by `from_official`. Folding again changes nothing.
        """
        for attention in self._temporal():
            attention.fold()
        return self

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        _refuse_folded(self)
        return super().save_pretrained(save_directory, **kwargs)

    def _temporal(self) -> list[TemporalAttention]:
        return [module for module in self.modules() if isinstance(module, TemporalAttention)]

    @classmethod
    def from_official(
        cls,
        source: str | Path | Mapping[str, Tensor],
        *,
        config: VDTConfig | None = None,
        heads: int | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        time_interpolation: bool = False,
    ) -> "VDT":
        """Read weights under the official names.

        Args:
            source: state dict, or the path of one: `.safetensors`, else read by `torch.load` with
                `weights_only=True`.
            config: what the model is. By default read off the shapes, taking the grid as square
                and one row of the label table as the dropped label.
            heads: attention heads, needed where the width is none of the published ones.
            frames, height, width: new maxima. Positions are resized bicubically, as the official
                loader does; times are computed anew unless `time_interpolation` stretches them.
        Raises:
            ValueError: a tensor is missing, left over, of another shape or not finite, all named;
                the file is not whole; the sizes asked for make no sense.
            TypeError: `source` is no dict of tensors.
        """
        state = read(source)
        if config is None:
            config = VDTConfig(**sizes(state, heads))
        elif heads not in (None, config.heads):
            raise ValueError(f"heads={heads} contradicts config.heads={config.heads}")
        if config.mode == "image" and frames not in (None, 1):
            raise ValueError(
                f"frames={frames} needs the weights of a video model, these are of an image model: "
                f"VDT.from_image(VDT.from_official(...), frames={frames}) starts a video model"
            )
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in cls(config).state_dict().items()}
        parts_of = layout(config, shapes)
        refuse_misfits({k: v for parts in parts_of.values() for k, v in parts.items()}, state)
        own = {
            name: torch.cat([state[part].flatten() for part in parts]).view(shapes[name])
            for name, parts in parts_of.items()
        }
        target = replace(
            config,
            frames=config.frames if frames is None else frames,
            height=config.height if height is None else height,
            width=config.width if width is None else width,
        )
        rows, columns = target.height // target.patch, target.width // target.patch
        if own["position"].shape[:2] != (rows, columns):
            table = own["position"]
            own["position"] = resize_grid(table.float(), rows, columns).to(table.dtype).contiguous()
        if target.frames != config.frames:
            table = own["time"]
            times = (
                resize_line(table.float(), target.frames)
                if time_interpolation
                else sincos_table(target.frames, config.dim)
            )
            own["time"] = times.to(table.device, table.dtype).contiguous()
        with torch.device("meta"):
            model = cls(target)
        model.load_state_dict(own, assign=True)
        return model

    @classmethod
    def from_image(cls, image: "VDT", *, frames: int = 16) -> "VDT":
        """A video model on the spatial weights of an image model; the temporal branch is new.

        This is the paper's second training stage: images first, then video.
        """
        if image.config.mode != "image":
            raise ValueError(f'image must have mode="image", got {image.config.mode!r}')
        video = cls(replace(image.config, mode="video", frames=frames))
        video.load_state_dict(video.state_dict() | image.state_dict())
        return video

    def to_official_state_dict(self) -> dict[str, Tensor]:
        """The weights under the official names and in the official shapes, as copies."""
        own, official = self.state_dict(), {}
        shapes = {name: value.shape for name, value in own.items()}
        for name, parts in layout(self.config, shapes).items():
            pieces = own[name].flatten().split([math.prod(shape) for shape in parts.values()])
            for (part, shape), piece in zip(parts.items(), pieces, strict=True):
                official[part] = piece.reshape(shape).clone()
        return official


def _expect_floats(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {_kind(value)}")


def _expect_integers(name: str, value: Any, batch: int) -> None:
    if (
        not isinstance(value, Tensor)
        or value.dtype == torch.bool
        or value.is_floating_point()
        or value.is_complex()
    ):
        raise TypeError(f"{name} must be integers, as a tensor, got {_kind(value)}")
    if value.shape not in ((batch,), (1,)):
        raise ValueError(f"{name} must be ({batch},) or (1,), got {tuple(value.shape)}")


def _kind(value: Any) -> Any:
    return value.dtype if isinstance(value, Tensor) else type(value).__name__


def _refuse_folded(model: VDT, prefix: str = "", keep_vars: bool = False) -> None:
    """Also the hook of `state_dict`; torch.export, which keeps the live tensors, may look."""
    if not keep_vars and any(attention.fc is None for attention in model._temporal()):
        raise RuntimeError("a folded model has lost temporal_fc: save it before fold()")
