"""The CPU paths of `guided_step`: passes of PyTorch, and the compiled kernel."""

import torch
from torch import Tensor

from .._shared import philox
from .._shared.planes import known_cells
from .compiled import call_step


def guided_step(
    x: Tensor,
    prediction: Tensor,
    table: Tensor,
    step: Tensor,
    scales: list[float],
    clip: float | None,
    known: Tensor | None,
    clean: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    stream: int,
    out: Tensor,
) -> None:
    """Write the next state to `out`, which may be any of the others."""
    row = _row(table, step)
    x0_of_x, x0_of_prediction, of_x0, of_x, of_noise = table[row].tolist()
    wide = torch.promote_types(x.dtype, torch.float32)
    state = x.to(wide)
    predicted, *others = prediction.to(wide).unflatten(0, (len(scales) + 1, x.shape[0]))
    before = predicted
    for scale, after in zip(scales, others, strict=True):
        predicted = predicted + scale * (after - before)
        before = after
    if clip is None:  # without x0, which may be large and cancel
        following = torch.mul(state, of_x + of_x0 * x0_of_x)
        following.add_(predicted, alpha=of_x0 * x0_of_prediction)
    else:
        x0 = torch.mul(state, x0_of_x).add_(predicted, alpha=x0_of_prediction).clamp_(-clip, clip)
        following = x0.mul_(of_x0).add_(state, alpha=of_x)
    if of_noise and seeds is not None:
        count = x.shape[1:].numel()
        noise = philox.normal(seeds, count, stream + row & 2**32 - 1).view(x.shape)
    if of_noise and noise is not None:
        following.add_(noise.to(wide), alpha=of_noise)
    following = following.to(x.dtype)
    if known is not None and clean is not None:
        following = torch.where(known_cells(known), clean, following)
    out.copy_(following)


def compiled_step(
    x, prediction, table, step, scales, clip, known, clean, noise, seeds, stream, out
) -> None:
    """The C++ kernel; `out` may be any of the others."""
    row = _row(table, step)
    call_step(
        torch.ops.fastvid_cpp.guided_step, x, prediction, table, row, scales, clip, known, clean,
        noise, seeds, stream + row & 2**32 - 1, out,
    )  # fmt: skip


def _row(table: Tensor, step: Tensor) -> int:
    row = int(step)
    rows = table.shape[0]  # len() of a tensor takes ten times as long
    if not 0 <= row < rows:
        raise ValueError(f"step must be in [0, {rows}), a row of table, got {row}")
    return row
