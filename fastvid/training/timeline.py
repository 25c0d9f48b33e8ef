"""Frames of a video and of its latents.

A codec may join frames: its first latent frame holds the first frame alone, each later one `factor`
frames. `factor` 1 joins none.
"""

from __future__ import annotations

import torch
from torch import Tensor


def latent_frames(frames: int, factor: int, name: str = "frames") -> int:
    """Latent frames of a video of `frames`.

    Raises:
        ValueError: `name` is no whole number of them.
    """
    if (frames - 1) % factor:
        raise ValueError(f"{name} must be 1 + {factor} n for this codec, got {frames}")
    return 1 + (frames - 1) // factor


def video_frames(latents: int, factor: int) -> int:
    """Frames that the first `latents` latent frames hold."""
    return 1 + factor * (latents - 1) if latents else 0


def known_in_video(known: Tensor, factor: int) -> Tensor:
    """What is known of latents, (B, T) or (B, T, h, w), as what is known of each video frame."""
    if factor == 1:
        return known
    return torch.cat([known[:, :1], known[:, 1:].repeat_interleave(factor, 1)], 1)
