"""What `guided_step` means: plain PyTorch on any device, best run in float64."""

import torch
from torch import Tensor

from .._shared.planes import known_cells

COLUMNS = 5  # of a table: x0_of_x, x0_of_prediction, of_x0, of_x, of_noise


def guide(branches: Tensor, scales: list[float]) -> Tensor:
    """One prediction of branches (G, B, ...): each difference between neighbours times its scale.

    `scales` (G - 1) go from branch to branch: the last is that of the whole condition.
    """
    guided = branches[0]
    for scale, before, after in zip(scales, branches, branches[1:], strict=False):
        guided = guided + scale * (after - before)
    return guided


def guided_step(
    x: Tensor,
    prediction: Tensor,
    coefficients: Tensor,
    scales: list[float],
    clip: float | None = None,
    known: Tensor | None = None,
    clean: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """The next state; `coefficients` (5,) are a row of the table, the rest as in `op.py`."""
    x0_of_x, x0_of_prediction, of_x0, of_x, of_noise = coefficients
    predicted = guide(prediction.unflatten(0, (len(scales) + 1, x.shape[0])), scales)
    x0 = x0_of_x * x + x0_of_prediction * predicted
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    following = of_x0 * x0 + of_x * x
    if noise is not None:
        following = following + torch.where(of_noise == 0, 0, of_noise * noise)
    if known is None or clean is None:
        return following
    return torch.where(known_cells(known), clean, following)
