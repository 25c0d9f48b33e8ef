"""Some frames of a clip: which they are, taking them out and putting them back."""

import torch
from torch import Tensor

# Frames of (B, T, ...): a run of them, or int64 (1, F), the same in all samples, or (B, F).
Places = slice | Tensor


def places(chosen: Tensor) -> Places | None:
    """Where `chosen` (B or 1, T) bool is True, as many frames in each sample; else None.

    None too where that is for a device to know, or depends on data inside a compiled graph.
    """
    if chosen.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    counts = chosen.sum(1)
    if not len(chosen) or (counts != counts[0]).any():
        return None
    index = chosen.nonzero()[:, 1].view(len(chosen), -1)
    if (index != index[0]).any():
        return index
    first = int(index[0, 0]) if index.shape[1] else 0
    run = torch.arange(first, first + index.shape[1])
    return slice(first, first + len(run)) if torch.equal(index[0], run) else index[:1]


def take(x: Tensor, chosen: Places, *, dim: int = 1) -> Tensor:
    """The chosen frames on axis `dim` of (B or 1, ..., T or 1, ...); what all share stays as it is.

    A run of frames is a view.
    """
    if x.shape[dim] == 1:
        return x
    if isinstance(chosen, slice):
        return x.narrow(dim, chosen.start, chosen.stop - chosen.start)
    chosen = chosen.to(x.device)
    if len(chosen) == 1:
        return x.index_select(dim, chosen[0])
    x = x.expand(len(chosen), *x.shape[1:]).movedim(dim, 1)
    return x[_samples(chosen), chosen].movedim(1, dim)


def put(x: Tensor, chosen: Places, frames: int, *, dim: int = 1) -> Tensor:
    """The other way: x as the chosen ones of so many frames, the others 0."""
    out = x.new_zeros(*x.shape[:dim], frames, *x.shape[dim + 1 :])
    if isinstance(chosen, slice):
        out.narrow(dim, chosen.start, chosen.stop - chosen.start).copy_(x)
    elif len(chosen) == 1:
        out.index_copy_(dim, chosen[0].to(x.device), x)
    else:
        chosen = chosen.to(x.device)
        out.movedim(dim, 1)[_samples(chosen), chosen] = x.movedim(dim, 1)
    return out


def _samples(chosen: Tensor) -> Tensor:
    return torch.arange(len(chosen), device=chosen.device)[:, None]
