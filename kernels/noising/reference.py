"""What `noising` and `masked_mse` mean: plain PyTorch on any device, best run in float64."""

import torch
from torch import Tensor

from .._shared.planes import known_cells

# Factors of (eps, x0) in a target, from the level (alpha, sigma) of a cell.
TARGETS = {
    "eps": lambda alpha, sigma: (1.0, 0.0),
    "v": lambda alpha, sigma: (alpha, -sigma),
    "flow": lambda alpha, sigma: (1.0, -1.0),
}


def levels(alpha, sigma, known, known_alpha, known_sigma, like) -> tuple[Tensor, Tensor]:
    """alpha and sigma of every cell, (B|1, 1, T|1, H|1, W|1), in the dtype of `like`."""
    alpha, sigma = (level[:, None, :, None, None].to(like.dtype) for level in (alpha, sigma))
    if known is None:
        return alpha, sigma
    cells = known_cells(known)
    if known_alpha is None:
        return alpha.where(~cells, 1.0), sigma.where(~cells, 0.0)
    own_alpha, own_sigma = (
        level[:, None, :, None, None].to(like.dtype) for level in (known_alpha, known_sigma)
    )
    return torch.where(cells, own_alpha, alpha), torch.where(cells, own_sigma, sigma)


def noising(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor,
    known: Tensor | None = None,
    known_alpha: Tensor | None = None,
    known_sigma: Tensor | None = None,
    target: str = "v",
) -> tuple[Tensor, Tensor]:
    """Noisy latents and target; levels are (B|1, T|1), the rest as in `op.noising`."""
    alpha, sigma = levels(alpha, sigma, known, known_alpha, known_sigma, x0)
    of_noise, of_x0 = TARGETS[target](alpha, sigma)
    return alpha * x0 + sigma * noise, of_noise * noise + of_x0 * x0


def noising_backward(
    dnoisy: Tensor,
    dtarget: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    known: Tensor | None = None,
    known_alpha: Tensor | None = None,
    known_sigma: Tensor | None = None,
    target: str = "v",
) -> tuple[Tensor, Tensor]:
    """Gradients of x0 and noise, written out: `noising` is linear in both."""
    alpha, sigma = levels(alpha, sigma, known, known_alpha, known_sigma, dnoisy)
    of_noise, of_x0 = TARGETS[target](alpha, sigma)
    return alpha * dnoisy + of_x0 * dtarget, sigma * dnoisy + of_noise * dtarget


def unknown_share(known: Tensor | None, like: Tensor, average: str) -> tuple[Tensor | None, Tensor]:
    """1 at unknown cells, (B|1, 1, T, H|1, W|1), and the divisor of a sample's sum, (B|1,)."""
    size = like.shape[1:].numel()
    if known is None:
        return None, like.new_full((1,), size)
    unknown = (~known_cells(known)).to(like.dtype)
    count = unknown.flatten(1).sum(1) * (size // max(unknown.shape[1:].numel(), 1))
    divisor = count if average == "unknown" else torch.where(count > 0, size, 0.0)
    return unknown, divisor.to(like.dtype)


def masked_mse(
    pred: Tensor, target: Tensor, known: Tensor | None = None, average: str = "unknown"
) -> Tensor:
    """Sum of squares over unknown cells over the divisor, (B,); NaN where nothing is unknown."""
    unknown, divisor = unknown_share(known, pred, average)
    squares = (pred - target).square()
    return (squares if unknown is None else squares * unknown).flatten(1).sum(1) / divisor


def masked_mse_backward(
    dloss: Tensor,
    pred: Tensor,
    target: Tensor,
    known: Tensor | None = None,
    average: str = "unknown",
) -> Tensor:
    """Gradient of pred; that of the target is its negative."""
    unknown, divisor = unknown_share(known, pred, average)
    slope = (2 * dloss / divisor).reshape(-1, 1, 1, 1, 1) * (pred - target)
    return slope if unknown is None else torch.where(unknown > 0, slope, 0.0)
