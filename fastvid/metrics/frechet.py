"""Frechet distance of Gaussians, and FVD: that distance between I3D features of two sets."""

import hashlib
import io
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .checks import expect_unit_video

Detector = Callable[[Tensor], Tensor]
Variant = Literal["styleganv", "videogpt", "tf"]

SIDE = 224  # pixels, what I3D was trained on
MIN_FRAMES = 10  # what common code asks for; below 9 I3D's last temporal window is empty
# A TorchScript file is code, so only this one, by its git blob id, is ever loaded.
I3D_NAME, I3D_BLOB = "i3d_torchscript.pt", "93daef59c7ae0e9e8f76225521407e60cbafa6aa"
I3D_STATE_NAME = "i3d_pretrained_400.pt"
I3D_STATE_BLOB = "a867b87ac3a9097d200598b1d48a1b890d8ec744"


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians, in float64.

    |mean1 - mean2|^2 + tr(cov1 + cov2 - 2 sqrt(cov1 cov2)). With cov = F F^T from its
    eigenvalues, tr sqrt(cov1 cov2) is the sum of the singular values of F1^T F2, which needs no
    matrix square root and stays exact when a covariance is singular.

    Args:
        mean1, mean2: (D,). cov1, cov2: (D, D), symmetric.
    Raises:
        ValueError: shapes do not agree, or a value is not finite.
    """
    D = mean1.numel()
    parts = {"mean1": mean1, "cov1": cov1, "mean2": mean2, "cov2": cov2}
    for name, part in parts.items():
        shape = (D,) if name.startswith("mean") else (D, D)
        if part.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(part.shape)}")
        if not part.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    m1, s1, m2, s2 = (part.detach().double().cpu() for part in parts.values())
    shared = torch.linalg.svdvals(_factor(s1).mT @ _factor(s2)).sum()
    distance = (m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * shared
    return max(distance.item(), 0.0)


def _factor(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.clamp_min(0).sqrt()


class FVD:
    """Frechet video distance between two sets of clips; always quote it with its N and variant.

    Features are kept for the whole set (N x 400 numbers) and the covariances are taken once, so
    batches may have any size and the last one may be short. For several processes, gather the
    `features` of all of them and `score` once.

    Args:
        detector: path of `i3d_torchscript.pt` (checked by hash before it is loaded), or a callable
            from preprocessed video to (B, D) features. The callable gets float32
            (B, 3, T, H, W) in [0, 255] for "styleganv" and (B, 3, T, 224, 224) in [-1, 1]
            for the others.
        variant: what happens before the network, after rounding to 8 bits:
            "styleganv": the TorchScript file resizes by itself, aspect ratio lost;
            "videogpt": short side to 224, bilinear, then centre crop;
            "tf": 224 x 224 by the original's TF1 bilinear (no half-pixel centres), aspect lost.
        device: where a file detector runs.
        min_frames: shorter clips are refused. I3D itself takes 9, of which VIDIM-Bench makes use.
    Raises:
        FileNotFoundError, ValueError: no such file, another file, an unknown variant.
    Source: Unterthiner et al., arXiv:1812.01717; variants of StyleGAN-V, VideoGPT and the
        original TensorFlow code.
    """

    def __init__(
        self,
        detector: str | Path | Detector,
        *,
        variant: Variant = "styleganv",
        device: str | torch.device = "cpu",
        min_frames: int = MIN_FRAMES,
    ):
        if variant not in PREPARE:
            raise ValueError(f"variant must be one of {', '.join(PREPARE)}, got {variant!r}")
        self.variant: Variant = variant
        self.definition = f"FVD ({variant})"
        self.min_frames = min_frames
        self.detector = detector if callable(detector) else _load(Path(detector), variant, device)
        self.device = None if callable(detector) else torch.device(device)
        self.real: list[Tensor] = []
        self.fake: list[Tensor] = []

    def update(self, *, real: Tensor | None = None, fake: Tensor | None = None) -> None:
        """Add clips (B, 3, T, H, W) in [0, 1], at least `min_frames`, to either set."""
        if real is not None:
            self.real.append(self.features(real))
        if fake is not None:
            self.fake.append(self.features(fake))

    def compute(self) -> dict[str, float | int | str]:
        """`score` of everything added so far; may be called again, also after more updates."""
        if not self.real or not self.fake:
            raise ValueError("FVD needs clips on both sides: call update(real=...) and (fake=...)")
        return self.score(torch.cat(self.real), torch.cat(self.fake))

    @torch.no_grad()
    def features(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [0, 1] -> (B, D) float64 on the CPU.

        Raises:
            TypeError, ValueError: see `expect_unit_video`; fewer than `min_frames`.
        """
        expect_unit_video("video", video)
        B, _, T, _, _ = video.shape
        if self.min_frames > T:
            raise ValueError(f"FVD needs clips of at least {self.min_frames} frames, got {T}")
        levels = (video.to(self.device or video.device, torch.float32) * 255).round()
        # reshape: I3D drops the batch axis of a single clip
        return self.detector(PREPARE[self.variant](levels)).reshape(B, -1).double().cpu()

    def score(self, real: Tensor, fake: Tensor) -> dict[str, float | int | str]:
        """Distance between two feature sets (N, D): `{"fvd", "variant", "n"}`.

        Warns when N <= D: the covariances are singular and the value is far too high.
        Raises:
            ValueError: the sets differ in N or D, or N < 2.
        """
        if real.shape != fake.shape or real.ndim != 2 or len(real) < 2:
            raise ValueError(
                "real and fake features must be (N, D) with the same N >= 2: FVD falls with N, "
                f"got {tuple(real.shape)} and {tuple(fake.shape)}"
            )
        N, D = real.shape
        if N <= D:
            warnings.warn(
                f"FVD of N={N} clips with {D} features: the covariances are singular and the value "
                "is biased high; compare only with values of the same N (2048 is usual)",
                stacklevel=2,
            )
        distance = frechet_distance(real.mean(0), real.T.cov(), fake.mean(0), fake.T.cov())
        return {"fvd": distance, "variant": self.variant, "n": N}


def _signed(levels: Tensor) -> Tensor:
    return levels / 127.5 - 1


def _resize_and_crop(levels: Tensor) -> Tensor:
    """Short side to 224, centre crop to 224 x 224, [-1, 1]."""
    B, _, _, H, W = levels.shape
    short = min(H, W)
    size = (math.ceil(H * SIDE / short), math.ceil(W * SIDE / short))
    frames = rearrange(levels, "b c t h w -> (b t) c h w")
    frames = F.interpolate(frames, size, mode="bilinear", align_corners=False)
    top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    frames = frames[..., top : top + SIDE, left : left + SIDE]
    return _signed(rearrange(frames, "(b t) c h w -> b c t h w", b=B).contiguous())


def _resize_tf(levels: Tensor) -> Tensor:
    """TF1's `resize_bilinear`: output i reads input i * size / 224, no half-pixel shift."""
    for dim in (-2, -1):
        size = levels.shape[dim]
        at = torch.arange(SIDE, device=levels.device, dtype=torch.float32) * (size / SIDE)
        low = at.long().clamp_max(size - 1)
        weight = at - low if dim == -1 else (at - low)[:, None]
        first = levels.index_select(dim, low)
        levels = first.lerp(levels.index_select(dim, (low + 1).clamp_max(size - 1)), weight)
    return _signed(levels)


PREPARE: dict[str, Callable[[Tensor], Tensor]] = {
    "styleganv": lambda levels: levels,
    "videogpt": _resize_and_crop,
    "tf": _resize_tf,
}


def git_blob_hash(content: bytes) -> str:
    """The id that `git hash-object` prints for a file of this content."""
    header = f"blob {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def _load(path: Path, variant: str, device: str | torch.device) -> Detector:
    if not path.is_file():
        raise FileNotFoundError(
            f"FVD detector: no file at {path}; put StyleGAN-V's {I3D_NAME} (git blob {I3D_BLOB}) "
            "there or pass its path; nothing is downloaded"
        )
    content = path.read_bytes()  # once: what was checked is what is loaded
    blob = git_blob_hash(content)
    if blob == I3D_STATE_BLOB:
        raise ValueError(
            f"FVD detector: {path} is {I3D_STATE_NAME}, weights without their network; "
            f"pass {I3D_NAME}, which has the same network and serves every variant"
        )
    if blob != I3D_BLOB:
        raise ValueError(
            f"FVD detector: {path} is not {I3D_NAME}: git blob {blob}, expected {I3D_BLOB}; it was "
            "not loaded, since TorchScript is code. Load a file you trust and pass it as a callable"
        )
    script = torch.jit.load(io.BytesIO(content), map_location=device).eval()
    whole = variant == "styleganv"
    network = partial(script, rescale=whole, resize=whole, return_features=True)

    def detector(video: Tensor) -> Tensor:
        with torch.jit.fuser("none"):  # the fuser would want NVRTC on a GPU
            return network(video)

    return detector
