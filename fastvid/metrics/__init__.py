"""Scores of video in [0, 1]: per frame (psnr, ssim, LPIPS) and of a set of clips (FVD)."""

from .baselines import copy_nearest, linear_blend
from .frechet import FVD, frechet_distance
from .image import pooled_psnr, psnr, ssim
from .lpips import LPIPS

__all__ = [
    "FVD",
    "LPIPS",
    "copy_nearest",
    "frechet_distance",
    "linear_blend",
    "pooled_psnr",
    "psnr",
    "ssim",
]
