"""What the ops of the pyramid mean: plain PyTorch on any device, best run in float64."""

import math

import torch
from einops import rearrange
from torch import Tensor


def upsample(x: Tensor) -> Tensor:
    """(..., H, W) to (..., 2 H, 2 W), nearest."""
    return x.repeat_interleave(2, -2).repeat_interleave(2, -1)


def block_sums(x: Tensor) -> Tensor:
    """(..., 2 H, 2 W) to (..., H, W): the sum of every 2 x 2 block."""
    rows = x[..., 0::2, :] + x[..., 1::2, :]
    return rows[..., 0::2] + rows[..., 1::2]


def pyramid_halve(x: Tensor, factor: float) -> Tensor:
    """`factor` times the mean of every 2 x 2 block."""
    return factor / 4 * block_sums(x)


def pyramid_halve_backward(dout: Tensor, factor: float) -> Tensor:
    """The gradient of x."""
    return factor / 4 * upsample(dout)


def cholesky(gamma: float) -> tuple[list[float], list[float]]:
    """The root L of the covariance of a block, 1 on its diagonal and -gamma off it.

    Below the diagonal a column of L holds one number: returned are the diagonal (4) and those
    numbers (3). Number j given the ones before it has variance (1 + g)(1 - j g) / (1 - (j - 1) g),
    written out so that at g = 1/3, where the four sum to zero, the last is zero and not the root
    of a rounding.
    """
    diagonal = []
    for j in range(4):
        known = 1 if j == 0 else (1 + gamma) * (1 - j * gamma) / (1 - (j - 1) * gamma)
        diagonal.append(math.sqrt(max(known, 0.0)))
    below = [-gamma / (1 - j * gamma) * diagonal[j] for j in range(3)]
    return diagonal, below


def block_root(gamma: float, like: Tensor) -> Tensor:
    """L of `cholesky` as (4, 4), in the dtype of `like`."""
    diagonal, below = cholesky(gamma)
    rows = [[*below[:k], diagonal[k], *[0.0] * (3 - k)] for k in range(4)]
    return torch.tensor(rows, dtype=like.dtype, device=like.device)


def block_noise(normals: Tensor, gamma: float) -> Tensor:
    """(..., H, W, 4) independent normals to (..., 2 H, 2 W), correlated inside 2 x 2 blocks."""
    blocks = normals @ block_root(gamma, normals).T
    return rearrange(blocks, "... h w (p q) -> ... (h p) (w q)", p=2)


def pyramid_renoise(x: Tensor, alpha: float, beta: float, gamma: float, noise: Tensor) -> Tensor:
    """`noise` has the axes of the result, or one more and four normals per block."""
    if noise.dim() > x.dim():
        noise = block_noise(noise, gamma)
    return alpha * upsample(x) + beta * noise


def pyramid_renoise_backward(
    dout: Tensor, alpha: float, beta: float, gamma: float, normals: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the noise, which is four normals per block or the block noise."""
    dx, dnoise = alpha * block_sums(dout), beta * dout
    if normals:
        blocks = rearrange(dnoise, "... (h p) (w q) -> ... h w (p q)", p=2, q=2)
        dnoise = blocks @ block_root(gamma, blocks)
    return dx, dnoise


def stage_endpoints(
    latents: Tensor,
    lower: Tensor | None,
    noise: Tensor,
    start_sigma: float,
    end_sigma: float,
    ratio: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Start, end, the point between them, target; without `lower` the stage starts from noise."""
    start = start_sigma * noise
    if lower is not None:
        start = start + (1 - start_sigma) * upsample(lower)
    end = end_sigma * noise + (1 - end_sigma) * latents
    ratio = ratio.reshape(-1, 1, 1, 1, 1).to(noise.dtype)
    return start, end, ratio * start + (1 - ratio) * end, start - end
