"""Video to latents and back: plain space-to-depth, or an autoencoder from a local folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fastvid.diffusion.pyramid import (
    MINIFLUX_SCALE,
    SD3_SCALE,
    LatentScale,
    denormalize_latents,
    normalize_latents,
)
from fastvid.models.autoencoder import FACTOR, CausalVideoVAE
from fastvid.modules.hub import CONFIG, WEIGHTS
from fastvid.training.config import CodecConfig

STATISTICS = {
    "miniflux": MINIFLUX_SCALE,
    "sd3": SD3_SCALE,
    "none": LatentScale(0.0, 1.0, 0.0, 1.0),
}


class Codec(Protocol):
    """What training, sampling and scoring ask of a codec."""

    channels: int  # of the latents
    factor: int  # pixels per latent cell, along height and width
    time_factor: int  # frames per latent frame after the first, which holds one
    identity: dict[str, Any]  # what a cache of latents must have been made with

    def to(self, device: torch.device | str) -> Codec: ...
    def encode(
        self, video: Tensor, *, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...


class PixelCodec:
    """Every `factor x factor` patch of pixels becomes one cell. `decode` is the exact inverse."""

    time_factor = 1

    def __init__(self, factor: int = 4):
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}")
        self.factor = factor
        self.channels = 3 * factor * factor
        self.identity = {"kind": "pixel", "factor": factor}

    def to(self, device: torch.device | str) -> PixelCodec:
        return self

    def encode(
        self, video: Tensor, *, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, 3 factor^2, T, H / factor, W / factor).

        Nothing is drawn: `generators` is there because other codecs sample.
        """
        _expect_video(video, self.factor)
        return rearrange(
            video, "b c t (h p) (w q) -> b (c p q) t h w", p=self.factor, q=self.factor
        )

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 3, T, factor H, factor W)."""
        _expect_latents(latents, self.channels)
        return rearrange(
            latents, "b (c p q) t h w -> b c t (h p) (w q)", p=self.factor, q=self.factor
        )


class DiffusersCodec:
    """An `AutoencoderKL` of diffusers, frame by frame.

    Args:
        path: local folder with `config.json` and safetensors weights. Nothing is downloaded.
        scale, shift: latents = (posterior - shift) * scale. 0.18215 and 0 belong to the
            autoencoders of Stable Diffusion 1 and 2.
        chunk: frames per call of the autoencoder; bounds memory, changes no result beyond rounding.
        posterior: "sample" draws from the posterior, "mode" takes its mean.
    Raises:
        ValueError: the folder is no autoencoder, or its weights do not fit its config.
        RuntimeError: diffusers is not installed.
    """

    time_factor = 1

    def __init__(
        self,
        path: str | Path,
        scale: float = 0.18215,
        shift: float = 0.0,
        *,
        chunk: int = 16,
        posterior: str = "sample",
    ):
        _expect_posterior(posterior)
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 frame, got {chunk}")
        self.vae = _load_autoencoder(Path(path))
        self.scale, self.shift = scale, shift
        self.chunk, self.posterior = chunk, posterior
        self.channels = self.vae.config.latent_channels
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.identity = {
            "kind": "diffusers",
            "scale": scale,
            "shift": shift,
            "posterior": posterior,
            "weights": _weights_digest(self.vae),
        }

    def to(self, device: torch.device | str) -> DiffusersCodec:
        self.vae.to(device)
        return self

    @torch.no_grad()
    def encode(
        self, video: Tensor, *, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, C, T, H / factor, W / factor).

        `generators` (one per sample, on the CPU) make the posterior draw of a sample independent
        of its place in the batch, of `chunk` and of the device.
        """
        _expect_video(video, self.factor)
        _expect_generators(generators, len(video))
        frames = rearrange(video, "b c t h w -> (b t) c h w").to(self.vae.dtype)
        moments = self._in_chunks(self._moments, frames)
        mean, log_variance = rearrange(
            moments, "(b t) (two c) h w -> two b c t h w", b=len(video), two=2
        )
        if self.posterior == "sample":
            mean = _draw(mean, log_variance, generators)
        return ((mean - self.shift) * self.scale).to(video.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 3, T, factor H, factor W), not clamped."""
        _expect_latents(latents, self.channels)
        frames = rearrange(latents / self.scale + self.shift, "b c t h w -> (b t) c h w")
        video = self._in_chunks(lambda x: self.vae.decode(x).sample, frames.to(self.vae.dtype))
        return rearrange(video, "(b t) c h w -> b c t h w", b=len(latents)).to(latents.dtype)

    def _moments(self, frames: Tensor) -> Tensor:
        posterior = self.vae.encode(frames).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def _in_chunks(self, function: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
        return torch.cat([function(part) for part in frames.split(self.chunk)])


class CausalVideoCodec:
    """A `CausalVideoVAE`: 1 + 8 n frames become 1 + n latent frames, normalised.

    Args:
        path: local folder, ours of `save_pretrained` or with official weights; or an official file
            of weights.
        scale: the statistics that latents are normalised by: of images for a clip's first latent
            frame, of video for the later ones.
        chunk: frames coded at a time, a multiple of 8, or None for as many as memory has room for;
            bounds memory whatever the clip's length, changes no result beyond rounding.
        tile: side of a tile in pixels, a multiple of 32; None takes whole frames. Tiles are blended
            where they overlap: close to the whole frame's result, not equal.
        posterior: "sample" draws from the posterior, "mode" takes its mean.
    Raises:
        ValueError: `path` holds no such autoencoder, or an argument is not as above.
    """

    factor = time_factor = FACTOR

    def __init__(
        self,
        path: str | Path,
        scale: LatentScale = MINIFLUX_SCALE,
        *,
        chunk: int | None = 16,
        tile: int | None = None,
        posterior: str = "sample",
    ):
        _expect_posterior(posterior)
        if chunk is not None and (chunk < FACTOR or chunk % FACTOR):
            raise ValueError(f"chunk must be a positive multiple of {FACTOR} frames, got {chunk}")
        if tile is not None and (tile < 32 or tile % 32):
            raise ValueError(f"tile must be a multiple of 32 pixels, got {tile}")
        self.vae = _load_causal_vae(Path(path))
        self.scale, self.chunk, self.tile, self.posterior = scale, chunk, tile, posterior
        self.channels = self.vae.config.channels
        self.identity = {
            "kind": "causal-video",
            **scale._asdict(),
            "tile": tile,
            "posterior": posterior,
            "weights": _weights_digest(self.vae),
        }

    def to(self, device: torch.device | str) -> CausalVideoCodec:
        self.vae.to(device)
        return self

    @torch.no_grad()
    def encode(
        self, video: Tensor, *, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """(B, 3, 1 + 8n, H, W) in [-1, 1] -> (B, C, 1 + n, H / 8, W / 8).

        `generators` as `DiffusersCodec.encode` takes them.
        """
        _expect_video(video, self.factor)
        _expect_generators(generators, len(video))
        latents, log_variance = self.vae.encode(video, frames=self.chunk, tile=self.tile)
        if self.posterior == "sample":
            latents = _draw(latents, log_variance, generators)
        return normalize_latents(latents.to(video.dtype), self.scale)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, 1 + n, h, w) -> (B, 3, 1 + 8n, 8h, 8w), not clamped."""
        _expect_latents(latents, self.channels)
        found = denormalize_latents(latents, self.scale)
        video = self.vae.decode(found, frames=self.chunk and self.chunk // FACTOR, tile=self.tile)
        return video.to(latents.dtype)


def build_codec(config: CodecConfig) -> Codec:
    """The codec that a config names."""
    if config.kind == "pixel":
        return PixelCodec(config.factor)
    if config.kind == "causal-video":
        return CausalVideoCodec(
            config.path,
            STATISTICS[config.statistics],
            chunk=config.chunk or None,
            tile=config.tile or None,
            posterior=config.posterior,
        )
    return DiffusersCodec(
        config.path, config.scale, config.shift, chunk=config.chunk, posterior=config.posterior
    )


def shrink(video: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """(B, 3, T, H, W) at another size, antialiased."""
    frames = rearrange(video, "b c t h w -> (b t) c h w")
    frames = F.interpolate(frames, size, mode=mode, antialias=True)
    return rearrange(frames, "(b t) c h w -> b c t h w", b=len(video))


def _load_autoencoder(path: Path) -> Any:
    if not (path / "config.json").is_file():
        raise ValueError(
            f"codec path must be a local AutoencoderKL folder with config.json: {path}"
        )
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise RuntimeError("this codec needs diffusers: pip install 'fastvid[models]'") from error
    try:
        vae, report = AutoencoderKL.from_pretrained(
            path, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except OSError as error:
        raise ValueError(f"{path} holds no safetensors weights of an AutoencoderKL") from error
    # diffusers only warns about these, and a half-random autoencoder trains without complaint.
    wrong = report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]
    if wrong:
        raise ValueError(f"weights in {path} do not fit its config.json, for example {wrong[0]}")
    return vae.eval().requires_grad_(False)


def _load_causal_vae(path: Path) -> CausalVideoVAE:
    if not path.exists():
        raise ValueError(f"codec path must be the local folder of a CausalVideoVAE: {path}")
    ours = (path / CONFIG).is_file() and (path / WEIGHTS).is_file()
    load = CausalVideoVAE.from_pretrained if ours else CausalVideoVAE.from_official
    try:
        vae = load(path)
    except (FileNotFoundError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no CausalVideoVAE: {error}") from error
    return vae.eval().requires_grad_(False)


def _draw(
    mean: Tensor, log_variance: Tensor, generators: Sequence[torch.Generator] | None
) -> Tensor:
    """One draw of a posterior; with generators, one per sample, on the CPU."""
    if generators is None:
        noise = torch.randn_like(mean)
    else:
        noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
    return mean + (0.5 * log_variance).exp() * noise.to(mean)


def _weights_digest(vae: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _expect_posterior(posterior: str) -> None:
    if posterior not in ("sample", "mode"):
        raise ValueError(f"posterior must be 'sample' or 'mode', got {posterior!r}")


def _expect_generators(generators: Sequence[torch.Generator] | None, samples: int) -> None:
    if generators is not None and len(generators) != samples:
        raise ValueError(f"generators must be one per sample, B={samples}, got {len(generators)}")


def _expect_video(video: Tensor, factor: int) -> None:
    if video.ndim != 5 or video.shape[1] != 3 or video.shape[3] % factor or video.shape[4] % factor:
        raise ValueError(
            f"video must be (B, 3, T, H, W), H and W multiples of {factor}, "
            f"got {tuple(video.shape)}"
        )


def _expect_latents(latents: Tensor, channels: int) -> None:
    if latents.ndim != 5 or latents.shape[1] != channels:
        raise ValueError(f"latents must be (B, {channels}, T, H, W), got {tuple(latents.shape)}")
