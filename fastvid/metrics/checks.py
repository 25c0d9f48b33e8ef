"""What every metric asks of its input."""

import torch
from torch import Tensor


def expect_unit_video(name: str, video: Tensor) -> None:
    """Refuse anything but float (B, 3, T, H, W) in [0, 1]; a wrong range is a wrong score.

    Raises:
        TypeError: not a floating tensor (8-bit video must be divided by 255).
        ValueError: another shape, an empty one, a value outside [0, 1], or NaN.
    """
    if not isinstance(video, Tensor) or not video.is_floating_point():
        came = video.dtype if isinstance(video, Tensor) else type(video).__name__
        raise TypeError(f"{name} must be a float tensor in [0, 1] (8-bit video / 255), got {came}")
    if video.ndim != 5 or video.shape[1] != 3 or 0 in video.shape:
        raise ValueError(f"{name} must be (B, 3, T, H, W), got {tuple(video.shape)}")
    low, high = torch.aminmax(video.detach())
    if low.isnan():
        raise ValueError(f"{name} must lie in [0, 1], got NaN in it: what made it is broken")
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"{name} must lie in [0, 1], got values in [{low.item():.4g}, {high.item():.4g}]; "
            "map video in [-1, 1] by (video + 1) / 2 first"
        )


def expect_pair(video: Tensor, target: Tensor) -> None:
    """Refuse a pair that is not two unit videos of one shape on one device."""
    expect_unit_video("video", video)
    expect_unit_video("target", target)
    if video.shape != target.shape or video.device != target.device:
        raise ValueError(
            "video and target must have one shape and device, got "
            f"{tuple(video.shape)} on {video.device} and {tuple(target.shape)} on {target.device}"
        )
