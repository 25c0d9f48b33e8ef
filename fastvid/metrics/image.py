"""Frame metrics without a network: PSNR and SSIM, one stated definition each."""

import torch
from einops import rearrange
from torch import Tensor

from .checks import expect_pair

PSNR_CAP = 100.0  # dB given to equal frames, so that an average stays finite

SSIM_SIGMA = 1.5
SSIM_RADIUS = 5  # 11 taps
SSIM_K1, SSIM_K2 = 0.01, 0.03
SSIM_CHUNK = 1 << 22  # float64 values filtered at once: 32 MB per buffer


def psnr(video: Tensor, target: Tensor) -> Tensor:
    """PSNR in dB of each frame, over its RGB values, peak 1; equal frames get 100 dB.

    Args:
        video, target: (B, 3, T, H, W) in [0, 1].
    Returns:
        (B, T) float64. Their mean is "PSNR per frame", not `pooled_psnr`.
    Raises:
        TypeError, ValueError: see `expect_pair`.
    """
    expect_pair(video, target)
    return _decibels((video.double() - target.double()).square().mean(dim=(1, 3, 4)))


def pooled_psnr(video: Tensor, target: Tensor) -> Tensor:
    """PSNR in dB of each clip from the error pooled over its frames: one bad frame rules it.

    Args, Raises: as `psnr`.
    Returns:
        (B,) float64, capped at 100 dB.
    """
    expect_pair(video, target)
    return _decibels((video.double() - target.double()).square().mean(dim=(1, 2, 3, 4)))


def _decibels(error: Tensor) -> Tensor:
    return -10 * error.clamp_min(10 ** (-PSNR_CAP / 10)).log10()


def ssim(video: Tensor, target: Tensor) -> Tensor:
    """SSIM of each frame: Gaussian 11 taps, sigma 1.5, valid windows, mean over R, G and B.

    K1 = 0.01, K2 = 0.03, data range 1, population covariance, float64 throughout: equal to
    scikit-image's `gaussian_weights=True, sigma=1.5, use_sample_covariance=False`.

    Args:
        video, target: (B, 3, T, H, W) in [0, 1], H and W at least 11.
    Returns:
        (B, T) float64.
    Raises:
        TypeError, ValueError: see `expect_pair`; frames smaller than one window.
    Source: Wang et al., IEEE TIP 13(4), 2004.
    """
    expect_pair(video, target)
    B, _, _, H, W = video.shape
    taps = 2 * SSIM_RADIUS + 1
    if min(H, W) < taps:
        raise ValueError(f"ssim needs frames of at least {taps}x{taps}, got {H}x{W}")
    x = rearrange(video, "b c t h w -> (b t) c h w")
    y = rearrange(target, "b c t h w -> (b t) c h w")
    step = max(1, SSIM_CHUNK // (3 * H * W))
    chunks = zip(x.split(step), y.split(step), strict=True)
    scores = [_frame_ssim(a.double(), b.double()) for a, b in chunks]
    return rearrange(torch.cat(scores), "(b t) -> b t", b=B)


def _frame_ssim(x: Tensor, y: Tensor) -> Tensor:
    """(N, 3, H, W) float64 pairs -> (N,)."""
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    mean_x, mean_y = _blur(x), _blur(y)
    product, energy = mean_x * mean_y, mean_x.square() + mean_y.square()
    covariance = _blur(x * y) - product
    variance = _blur(x.square() + y.square()) - energy  # only the sum of the two is needed
    numerator = (2 * product + c1) * (2 * covariance + c2)
    return (numerator / ((energy + c1) * (variance + c2))).mean(dim=(1, 2, 3))


def _blur(x: Tensor) -> Tensor:
    """Gaussian means over valid windows, one axis after the other: (..., H - 10, W - 10)."""
    offsets = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / SSIM_SIGMA).square())
    taps = (weights / weights.sum()).tolist()
    for dim in (-2, -1):
        length = x.shape[dim] - 2 * SSIM_RADIUS
        out = x.narrow(dim, 0, length) * taps[0]
        for k, weight in enumerate(taps[1:], start=1):
            out.add_(x.narrow(dim, k, length), alpha=weight)
        x = out
    return x
