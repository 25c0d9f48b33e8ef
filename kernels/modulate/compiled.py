"""The C++ kernels on the CPU: which dtypes they know, and what they are handed."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .._shared.views import rows_together

KNOWN = (torch.float32, torch.bfloat16)


def serves(stream: torch.dtype, branch: Iterable[torch.dtype], *rows: Tensor | None) -> bool:
    """Whether the C++ knows these dtypes: of the stream, of all that is in and behind a branch
    (one for all), and of each modulation."""
    branch, modulation = set(branch), {each.dtype for each in rows if each is not None}
    return len(branch) == 1 and {stream, *branch, *modulation} <= set(KNOWN)


def add_backward(dsum, h, gate, starts):
    """dh, dgate."""
    dsum, h, rows = _all_rows_together(dsum, h, gate)
    dh = h.new_empty(h.shape)
    if not dh.numel():
        return dh, gate.new_zeros(gate.shape)
    dgate = gate.new_empty(gate.shape)
    torch.ops.fastvid_cpp.gated_residual_backward(dsum, h, rows, starts, dh, dgate)
    return dh, dgate


def forward(x, h, gate, shift, scale, starts, rms, eps, dtype):
    """The sum (None without h), y, mean, rstd."""
    x, h, gate, shift, scale = _all_rows_together(x, h, gate, shift, scale)
    total = None if h is None else x.new_empty(x.shape)
    y = x.new_empty(x.shape, dtype=dtype)
    rstd = x.new_empty(x.shape[:2], dtype=torch.float32)
    mean = rstd.new_empty(0) if rms else torch.empty_like(rstd)
    if y.numel():
        torch.ops.fastvid_cpp.norm_modulate(
            x, h, gate, shift, scale, starts, rms, eps, total, y, mean, rstd
        )
    return total, y, mean, rstd


def backward(dsum, dy, total, h, gate, scale, starts, mean, rstd, rms):
    """dx, dh, dgate, dshift, dscale; dh and dgate are empty without a gate."""
    dsum, dy, total, h, gate, scale = _all_rows_together(dsum, dy, total, h, gate, scale)
    make = torch.Tensor.new_empty if total.numel() else torch.Tensor.new_zeros
    dx, dshift, dscale = (make(t, t.shape) for t in (total, scale, scale))
    dh, dgate = (make(total, 0) if t is None else make(t, t.shape) for t in (h, gate))
    if total.numel():
        given = (dh, dgate) if gate is not None else (None, None)
        torch.ops.fastvid_cpp.norm_modulate_backward(
            dsum, dy, total, h, gate, scale, starts, mean, rstd, rms, dx, *given, dshift, dscale
        )
    return dx, dh, dgate, dshift, dscale


def _all_rows_together(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else rows_together(t) for t in tensors]
