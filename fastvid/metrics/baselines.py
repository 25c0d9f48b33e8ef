"""The trivial rivals: what copying and blending the given frames already reach."""

import torch
from torch import Tensor


def copy_nearest(video: Tensor, known: Tensor) -> Tensor:
    """Fill each unknown pixel from the nearest known moment of the same pixel (ties: earlier).

    With only first frames given this is "copy last". A pixel that is never known takes the mean
    colour of the clip's known pixels.

    Args:
        video: (B, C, T, H, W), any range; unknown pixels are not read.
        known: bool (B, T), or (B, T, h, w) on a grid whose cells divide H and W. True = given.
    Returns:
        (B, C, T, H, W), dtype of `video`; known pixels are bit-exact.
    Raises:
        TypeError: `known` is not bool.
        ValueError: shapes do not agree, or a clip without a single known cell.
    """
    before, after, known = _neighbours(video, known)
    now = _frames(known)
    take_after = (before < 0) | ((after < known.shape[1]) & (after - now < now - before))
    return _compose(video, known, _gather(video, torch.where(take_after, after, before)))


def linear_blend(video: Tensor, known: Tensor) -> Tensor:
    """Fill each unknown pixel linearly in time between its known moments; copy beyond them.

    Args, Returns, Raises: as `copy_nearest`.
    """
    before, after, known = _neighbours(video, known)
    start = torch.where(before < 0, after, before)
    stop = torch.where(after == known.shape[1], before, after)
    weight = (_frames(known) - start) / (stop - start).clamp_min(1)
    first, last = _gather(video, start), _gather(video, stop)
    return _compose(video, known, torch.lerp(first, last, expand_known(weight, video).to(video)))


def expand_known(known: Tensor, video: Tensor) -> Tensor:
    """(B, T) or (B, T, h, w) cells -> (B, 1, T, H, W), each cell repeated over its pixels."""
    _, _, _, H, W = video.shape
    if known.ndim == 2:
        return known[:, None, :, None, None].expand(-1, 1, -1, H, W)
    rows, columns = H // known.shape[2], W // known.shape[3]
    return known.repeat_interleave(rows, 2).repeat_interleave(columns, 3)[:, None]


def expect_known(known: Tensor, video: Tensor) -> None:
    """Refuse `known` that is not bool (B, T) or (B, T, h, w) on a grid of `video`'s pixels."""
    if known.dtype != torch.bool:
        raise TypeError(f"known must be bool (True = given, clean), got {known.dtype}")
    B, _, T, H, W = video.shape
    fits = known.shape[:2] == (B, T) and known.ndim in (2, 4) and known.numel() > 0
    if not fits or (known.ndim == 4 and (H % known.shape[2] or W % known.shape[3])):
        raise ValueError(
            f"known must be (B, T) or (B, T, h, w) with B={B} T={T}, h dividing {H} and "
            f"w dividing {W}, got {tuple(known.shape)}"
        )


def _neighbours(video: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Last known frame at or before, first at or after: (B, T, h, w), -1 and T where none."""
    if video.ndim != 5:
        raise ValueError(f"video must be (B, C, T, H, W), got {tuple(video.shape)}")
    expect_known(known, video)
    if not known.flatten(1).any(dim=1).all():
        raise ValueError("known must give at least one cell of every clip, got a clip with none")
    cells = known if known.ndim == 4 else known[:, :, None, None]
    T = cells.shape[1]
    frames = _frames(cells)
    before = torch.where(cells, frames, -1).cummax(dim=1).values
    after = torch.where(cells, frames, T).flip(1).cummin(dim=1).values.flip(1)
    return before, after, cells


def _frames(cells: Tensor) -> Tensor:
    return torch.arange(cells.shape[1], device=cells.device)[:, None, None]


def _gather(video: Tensor, index: Tensor) -> Tensor:
    """Frame `index` (B, T, h, w) of every pixel; indices outside the clip are clamped."""
    index = expand_known(index, video).clamp(0, video.shape[2] - 1)
    return video.gather(2, index.expand_as(video))


def _compose(video: Tensor, cells: Tensor, filled: Tensor) -> Tensor:
    """Known pixels as they are; never-known pixels in the clip's mean known colour."""
    known = expand_known(cells, video)
    ever = known.any(dim=2, keepdim=True)
    if not ever.all():
        given = torch.where(known, video, 0)
        colour = given.sum(dim=(2, 3, 4), keepdim=True) / known.sum(dim=(2, 3, 4), keepdim=True)
        filled = torch.where(ever, filled, colour)
    return torch.where(known, video, filled)
