"""The ops in PyTorch on the CPU: what float16, float64 and a machine without a compiler get.

The tokens that share a row of modulation are a group, (groups, tokens, D) in all. They are taken
in pieces that stay in the cache through all passes over them, and only a piece is ever widened.
"""

import torch
from torch import Tensor

PIECE = 65536  # numbers that are taken at once


def add(x: Tensor, h: Tensor, gate: Tensor | None) -> Tensor:
    """`x + gate * h` in the dtype of x."""
    total = x.new_empty(x.shape)
    if gate is None:
        return torch.add(x, h, out=total)
    rows = gate if gate.dim() == 3 else gate.unsqueeze(1)
    G = max(rows.shape[1], 1)
    x, h, grouped = (t.unflatten(1, (G, t.shape[1] // G)) for t in (x, h, total))
    torch.addcmul(x, rows.unsqueeze(2), h, out=grouped)
    return total


def add_backward(dsum: Tensor, h: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """dh, dgate."""
    groups = _Groups(h, gate)
    rows = groups.modulation(gate)
    dh, dgate = h.new_empty(groups.shape), torch.zeros_like(rows)
    dsum, h_ = groups.tokens(dsum), groups.tokens(h)
    for piece in groups.pieces():
        wide = dsum[piece].to(rows.dtype)
        torch.mul(wide, rows[piece[0]], out=dh[piece])
        dgate[piece[0]] += (wide * h_[piece]).sum(1, keepdim=True)
    return dh.view(h.shape), groups.summed(dgate, gate)


def forward(x, h, gate, shift, scale, rms, eps, dtype):
    """The sum (None without h), y, mean, rstd. Float32 inside, for float64 float64."""
    total = None
    if h is not None:
        x = total = add(x, h, gate)
    groups = _Groups(x, scale)
    offset, gain = groups.modulation(shift), 1 + groups.modulation(scale)
    y = x.new_empty(groups.shape, dtype=dtype)
    mean, rstd = (gain.new_empty((*groups.shape[:2], 1)) for _ in range(2))
    tokens, D = groups.tokens(x), x.shape[-1:]
    for piece in groups.pieces():
        part, affine = tokens[piece], (gain[piece[0]], offset[piece[0]])
        if rms:
            wide = part.to(gain.dtype)
            rstd[piece] = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
            y[piece] = torch.addcmul(affine[1], wide * rstd[piece], affine[0])
        elif (
            len(part) == 1
        ):  # modulation is the affine part of LayerNorm: rounded once, in one pass
            y[piece], mean[piece], rstd[piece] = torch.native_layer_norm(
                part, D, affine[0].view(D), affine[1].view(D), eps
            )
        else:
            normed, mean[piece], rstd[piece] = torch.native_layer_norm(
                part.to(gain.dtype), D, None, None, eps
            )
            y[piece] = torch.addcmul(affine[1], normed, affine[0])
    rows = x.shape[:2]
    mean = mean.new_empty(0) if rms else mean.view(rows)
    return total, y.view(x.shape), mean, rstd.view(rows)


def backward(dsum, dy, total, h, gate, scale, mean, rstd, rms):
    """dx, dh, dgate, dshift, dscale; dh and dgate are empty without a gate."""
    groups, D = _Groups(total, scale), total.shape[-1:]
    tokens, upstream = groups.tokens(total), groups.tokens(dy)
    gain = 1 + groups.modulation(scale)
    dx = total.new_empty(groups.shape)
    dshift, dscale = torch.zeros_like(gain), torch.zeros_like(gain)
    mean, rstd = (t.reshape(*groups.shape[:2], 1) if t.numel() else t for t in (mean, rstd))
    dh, dgate = total.new_empty(0), total.new_empty(0)
    if dsum is not None:
        dsum = groups.tokens(dsum)
    if gate is not None:
        rows, branch = groups.modulation(gate), groups.tokens(h)
        dh, dgate = h.new_empty(groups.shape), torch.zeros_like(gain)
    for piece in groups.pieces():
        own = piece[0]
        wide, dy_, r = tokens[piece].to(gain.dtype), upstream[piece].to(gain.dtype), rstd[piece]
        if rms:
            normed, g = wide * r, dy_ * gain[own]
            along = (g * normed).mean(-1, keepdim=True)
            dx_ = torch.addcmul(g, normed, along, value=-1).mul_(r)
        else:
            normed = (wide - mean[piece]).mul_(r)
            dx_, _, _ = torch.ops.aten.native_layer_norm_backward(
                dy_ * gain[own], wide, D, mean[piece], r, None, None, [True, False, False]
            )
        dshift[own] += dy_.sum(1, keepdim=True)
        dscale[own] += normed.mul_(dy_).sum(1, keepdim=True)
        if dsum is not None:
            dx_ += dsum[piece]
        dx[piece] = dx_
        if gate is not None:
            torch.mul(dx_, rows[own], out=dh[piece])
            dgate[own] += dx_.mul_(branch[piece]).sum(1, keepdim=True)
    if gate is not None:
        dh, dgate = dh.view(total.shape), groups.summed(dgate, gate)
    dshift, dscale = groups.summed(dshift, scale), groups.summed(dscale, scale)
    return dx.view(total.shape), dh, dgate, dshift, dscale


class _Groups:
    """How (B, N, D) tokens fall into groups of one row of modulation."""

    def __init__(self, x: Tensor, modulation: Tensor):
        self.batch, N, D = x.shape
        self.per_sample = modulation.shape[1] if modulation.dim() == 3 else 1
        self.shape = (self.batch * self.per_sample, N // max(self.per_sample, 1), D)
        self.wide = torch.float64 if x.dtype == torch.float64 else torch.float32

    def tokens(self, rows: Tensor) -> Tensor:
        """(B, N, D) as (groups, tokens, D)."""
        return rows.reshape(self.shape)

    def modulation(self, rows: Tensor) -> Tensor:
        """(B|1, D) or (B|1, T, D) as (groups, 1, D), wide."""
        groups, _, D = self.shape
        rows = rows.to(self.wide).reshape(len(rows), self.per_sample, D)
        return rows.expand(self.batch, -1, -1).reshape(groups, 1, D)

    def summed(self, rows: Tensor, like: Tensor) -> Tensor:
        """The transpose of `modulation`: in the shape and dtype of `like`."""
        if len(like) != self.batch:
            rows = rows.view(self.batch, self.per_sample, self.shape[2]).sum(0)
        return rows.reshape(like.shape).to(like.dtype)

    def pieces(self):
        """Slices of groups and of their tokens: several whole groups, or a part of one."""
        groups, tokens, D = self.shape
        rows = max(PIECE // max(D, 1), 1)
        if groups == 0 or tokens == 0:
            return
        step = max(rows // tokens, 1)
        for first in range(0, groups, step):
            for start in range(0, tokens, rows):
                yield slice(first, first + step), slice(start, start + rows)
