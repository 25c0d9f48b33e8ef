"""The CPU paths of the pyramid's ops: passes of PyTorch, and the compiled kernels."""

import functools

import torch
from torch import Tensor

from .._shared import native, philox
from .._shared.planes import planes
from . import reference


def factors(alpha: float, beta: float, gamma: float) -> list[float]:
    """alpha, and beta times the root of the block's covariance: diagonal (4), below it (3)."""
    diagonal, below = reference.cholesky(gamma)
    return [alpha, *(beta * d for d in diagonal), *(beta * b for b in below)]


def pyramid_renoise(x, alpha, beta, gamma, noise, seeds, stream):
    """The next stage's start, in the dtype of x."""
    B, C, T, H, W = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    data = x.to(wide)
    out = torch.empty(B, C, T, H, 2, W, 2, dtype=wide)
    if noise is not None and noise.dim() == 5:
        torch.mul(noise.to(wide).view(out.shape), beta, out=out)
        out.add_(data[:, :, :, :, None, :, None], alpha=alpha)
        return out.view(B, C, T, 2 * H, 2 * W).to(x.dtype)
    if noise is None:
        noise = philox.normal(seeds, 4 * C * T * H * W, stream).view(B, C, T, H, W, 4)
    _, *root = factors(alpha, beta, gamma)
    mean = data * alpha  # of the number to come, given those before it
    for k, normal in enumerate(noise.to(wide).unbind(-1)):
        torch.add(mean, normal, alpha=root[k], out=out[:, :, :, :, k // 2, :, k % 2])
        if k < 3:
            mean.add_(normal, alpha=root[4 + k])
    return out.view(B, C, T, 2 * H, 2 * W).to(x.dtype)


def pyramid_halve(x, factor):
    """`factor` times the mean of every 2 x 2 block."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = torch.add(x[..., 0::2, :].to(wide), x[..., 1::2, :])
    return (rows[..., 0::2] + rows[..., 1::2]).mul_(factor / 4).to(x.dtype).contiguous()


def stage_endpoints(latents, lower, noise, start_sigma, end_sigma, ratio, endpoints):
    """Start and end (empty unless wanted), sample and target."""
    wide = torch.promote_types(latents.dtype, torch.float32)
    ratio = ratio.to(wide).view(-1, 1, 1, 1, 1)
    eps = noise.to(wide).contiguous()
    end = torch.mul(eps, end_sigma).add_(latents, alpha=1 - end_sigma)
    start = torch.mul(eps, start_sigma)
    if lower is not None:
        B, C, T, H, W = lower.shape
        blocks = start.view(B, C, T, H, 2, W, 2)
        blocks.add_(lower[:, :, :, :, None, :, None], alpha=1 - start_sigma)
    target = start - end
    made = (start, end) if endpoints else (latents.new_empty(0), latents.new_empty(0))
    sample = torch.addcmul(end, ratio, target)
    return tuple(t.to(latents.dtype) for t in (*made, sample, target))


def compiled_serves(*tensors: Tensor | None) -> bool:
    """Whether the C++ kernels are there and know the dtypes."""
    return native.loaded() and all(
        t is None or t.dtype in (torch.float32, torch.bfloat16) for t in tensors
    )


def compiled_renoise(x, alpha, beta, gamma, noise, seeds, stream):
    """The C++ kernel."""
    B, C, T, H, W = x.shape
    out = x.new_empty(B, C, T, 2 * H, 2 * W)
    if out.numel():
        row = _row(alpha, beta, gamma)
        torch.ops.fastvid_cpp.pyramid_renoise(planes(x), row, noise, seeds, stream, out)
    return out


@functools.lru_cache(maxsize=64)  # a schedule has a few jumps, each taken once per unit
def _row(alpha: float, beta: float, gamma: float) -> Tensor:
    """The factors as the C++ kernel takes them; making them costs as much as a small call."""
    return torch.tensor([*factors(alpha, beta, gamma), beta], dtype=torch.float32)


def compiled_halve(x, factor):
    """The C++ kernel."""
    B, C, T, H, W = x.shape
    out = x.new_empty(B, C, T, H // 2, W // 2)
    if out.numel():
        torch.ops.fastvid_cpp.pyramid_halve(planes(x), factor / 4, out)
    return out


def compiled_endpoints(latents, lower, noise, start_sigma, end_sigma, ratio, endpoints):
    """The C++ kernel."""
    shapes = [latents.shape if endpoints else (0,)] * 2 + [latents.shape] * 2
    made = [latents.new_empty(shape) for shape in shapes]
    if latents.numel():
        torch.ops.fastvid_cpp.stage_endpoints(
            planes(latents), lower if lower is None else planes(lower), planes(noise),
            start_sigma, end_sigma, ratio, endpoints, *made,
        )  # fmt: skip
    return tuple(made)
