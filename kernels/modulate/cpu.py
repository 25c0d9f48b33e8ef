"""The ops in PyTorch on the CPU: what float16, float64 and a machine without a compiler get.

The tokens that share a row of modulation are a group, (groups, tokens, D) in all. They are taken
in pieces that stay in the cache through all passes over them. Where a piece lies in one group,
the modulation is the affine part of PyTorch's LayerNorm, forward and backward: one pass.
"""

from itertools import pairwise, repeat

import torch
from torch import Tensor

PIECE = 2**19  # numbers that are taken at once
WORTH_A_CALL = 2**14  # numbers of a group that is taken by itself
NARROW = (torch.float16, torch.bfloat16)
layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


def add(x: Tensor, h: Tensor, gate: Tensor | None, starts: Tensor | None = None) -> Tensor:
    """`x + gate * h` in the dtype of x."""
    if starts is not None and gate is not None:
        return _add_unequal(x, h, gate, starts)
    total = out = x.new_empty(x.shape)
    if gate is None:
        return torch.add(x, h, out=total)
    rows = gate if gate.dim() == 3 else gate.unsqueeze(1)
    if rows.shape[1] not in (1, x.shape[1]):
        groups = rows.shape[1], x.shape[1] // rows.shape[1]
        x, h, out = (t.unflatten(1, groups) for t in (x, h, total))
        rows = rows.unsqueeze(2)
    torch.addcmul(x, rows, h, out=out)
    return total


def _add_unequal(x: Tensor, h: Tensor, gate: Tensor, starts: Tensor) -> Tensor:
    if x.device.type == "cpu":
        total = x.new_empty(x.shape)
        for x_, h_, total_, gate_ in _unequal(starts, (x, h, total), (gate,)):
            torch.addcmul(x_, gate_, h_, out=total_)
        return total
    # Where frames start is not known on the host: a row for every token.
    token = torch.arange(x.shape[1], dtype=starts.dtype, device=x.device)
    ends = starts[:, 1:].contiguous()
    group = torch.searchsorted(ends, token.repeat(len(ends), 1), right=True)
    rows = gate[torch.arange(len(gate), device=x.device)[:, None], group]
    return torch.addcmul(x, rows, h).to(x.dtype)


def add_backward(
    dsum: Tensor, h: Tensor, gate: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dh, dgate."""
    if starts is not None:
        dh, dgate = h.new_empty(h.shape), _wide_zeros(gate, h)
        for dsum_, h_, dh_, gate_, dgate_ in _unequal(starts, (dsum, h, dh), (gate, dgate)):
            found = add_backward(dsum_, h_, gate_.to(dgate.dtype), None)
            dh_.copy_(found[0])
            dgate_ += found[1]
        return dh, dgate.to(gate.dtype)
    groups = _Groups(h, gate)
    dh, dgate = h.new_empty(groups.shape), groups.zeros()
    inputs = groups.tokens(dsum), groups.tokens(h), groups.modulation(gate, gate.dtype)
    for dsum_, h_, gate_, dh_, dgate_ in groups.pieces(False, *inputs, dh, dgate):
        torch.mul(dsum_, gate_, out=dh_)
        dgate_ += (dsum_.to(dgate.dtype) * h_).sum(1, keepdim=True)
    return dh.view(h.shape), groups.summed(dgate, gate)


def forward(x, h, gate, shift, scale, starts, rms, eps, dtype):
    """The sum (None without h), y, mean, rstd. Float32 inside, for float64 float64."""
    total = None
    if h is not None:
        x = total = add(x, h, gate, starts)
    if starts is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        y, rstd = x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:2], dtype=wide)
        mean = None if rms else torch.empty_like(rstd)
        for x_, y_, mean_, rstd_, shift_, scale_ in _unequal(
            starts, (x, y, mean, rstd), (shift, scale)
        ):
            found = forward(x_, None, None, shift_, scale_, None, rms, eps, dtype)[1:]
            for whole, part in zip((y_, mean_, rstd_), found, strict=True):
                if whole is not None:
                    whole.copy_(part)
        return total, y, x.new_empty(0, dtype=wide) if mean is None else mean, rstd
    groups = _Groups(x, scale)
    tokens, D = groups.tokens(x), x.shape[-1:]
    gain, offset = 1 + groups.modulation(scale), groups.modulation(shift)
    y = x.new_empty(groups.shape, dtype=dtype)
    mean, rstd = (gain.new_empty((*groups.shape[:2], 1)) for _ in range(2))
    by_itself = not rms and x.dtype in (gain.dtype, dtype)
    for x_, gain_, offset_, y_, mean_, rstd_ in groups.pieces(
        by_itself, tokens, gain, offset, y, mean, rstd
    ):
        if rms:
            wide = x_.to(gain.dtype)
            torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps, out=rstd_)
            found = torch.addcmul(offset_, wide * rstd_, gain_)
        elif len(x_) == 1 and by_itself:
            found, *stats = torch.native_layer_norm(x_, D, gain_.view(D), offset_.view(D), eps)
        else:
            normed, *stats = torch.native_layer_norm(x_.to(gain.dtype), D, None, None, eps)
            found = torch.addcmul(offset_, normed, gain_)
        y_.copy_(found)
        if not rms:
            mean_.copy_(stats[0])
            rstd_.copy_(stats[1])
    rows = x.shape[:2]
    mean = mean.new_empty(0) if rms else mean.view(rows)
    return total, y.view(x.shape), mean, rstd.view(rows)


def backward(dsum, dy, total, h, gate, scale, starts, mean, rstd, rms):
    """dx, dh, dgate, dshift, dscale; dh and dgate are empty without a gate."""
    if starts is not None:
        return _backward_unequal(dsum, dy, total, h, gate, scale, starts, mean, rstd, rms)
    groups = _Groups(total, scale)
    gain = 1 + groups.modulation(scale)
    dx, dshift, dscale = total.new_empty(groups.shape), groups.zeros(), groups.zeros()
    dh = rows = dgate = None
    if gate is not None:
        dh, dgate = h.new_empty(groups.shape), groups.zeros()
        rows = groups.modulation(gate, gate.dtype)
    dsum, dy, h = (t if t is None else groups.tokens(t) for t in (dsum, dy, h))
    mean, rstd = (t.reshape(*groups.shape[:2], 1) if t.numel() else None for t in (mean, rstd))
    tokens = dsum, dy, groups.tokens(total), h, mean, rstd, dx, dh
    by_itself = not rms and total.dtype in NARROW
    for (
        dsum_, dy_, total_, h_, mean_, rstd_, dx_, dh_, gain_, rows_, dshift_, dscale_, dgate_
    ) in groups.pieces(by_itself, *tokens, gain, rows, dshift, dscale, dgate):  # fmt: skip
        found, by_shift, by_scale = _through_norm(dy_, total_, gain_, mean_, rstd_)
        dshift_ += by_shift
        dscale_ += by_scale
        if dsum is not None:
            found += dsum_
        dx_.copy_(found)
        if gate is not None:
            torch.mul(found, rows_, out=dh_)
            dgate_ += found.mul_(h_).sum(1, keepdim=True)
    if dh is None or dgate is None:
        dh, dgate = total.new_empty(0), total.new_empty(0)
    else:
        dh, dgate = dh.view(total.shape), groups.summed(dgate, gate)
    dshift, dscale = groups.summed(dshift, scale), groups.summed(dscale, scale)
    return dx.view(total.shape), dh, dgate, dshift, dscale


def _backward_unequal(dsum, dy, total, h, gate, scale, starts, mean, rstd, rms):
    """`backward`, group by group."""
    dx, dh, dgate = total.new_empty(total.shape), None, None
    dshift, dscale = _wide_zeros(scale, total), _wide_zeros(scale, total)
    if gate is not None:
        dh, dgate = h.new_empty(h.shape), _wide_zeros(gate, total)
    tokens = dsum, dy, total, h, None if rms else mean, rstd, dx, dh
    rows = gate, scale, dgate, dshift, dscale
    for views in _unequal(starts, tokens, rows):
        dsum_, dy_, total_, h_, mean_, rstd_, dx_, dh_, gate_, scale_, *sums = views
        gate_, scale_ = (t if t is None else t.to(dshift.dtype) for t in (gate_, scale_))
        mean_ = mean if mean_ is None else mean_
        found = backward(dsum_, dy_, total_, h_, gate_, scale_, None, mean_, rstd_, rms)
        dx_.copy_(found[0])
        if dh_ is not None:
            dh_.copy_(found[1])
        for whole, part in zip(sums, found[2:], strict=True):
            if whole is not None:
                whole += part
    dshift, dscale = dshift.to(scale.dtype), dscale.to(scale.dtype)
    if dh is None or dgate is None:
        return dx, total.new_empty(0), total.new_empty(0), dshift, dscale
    return dx, dh, dgate.to(gate.dtype), dshift, dscale


def _unequal(starts: Tensor, tokens, rows):
    """Of every group that has tokens, views: (1, tokens, ...) and a row (1, D); None stays None."""
    for b in range(next(len(t) for t in tokens if t is not None)):
        ends = starts[b % len(starts)].tolist()
        for g, (first, last) in enumerate(pairwise(ends)):
            if first < last:
                yield (
                    *(t if t is None else t[b : b + 1, first:last] for t in tokens),
                    *(t if t is None else t[b % len(t), g].unsqueeze(0) for t in rows),
                )


def _wide_zeros(rows: Tensor, x: Tensor) -> Tensor:
    """Sums of the shape of `rows`: float32, or float64 for float64."""
    return rows.new_zeros(rows.shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _through_norm(dy, x, gain, mean, rstd):
    """dx, dshift, dscale of a piece, wide; without a mean, of RMSNorm."""
    D, alone, narrow = x.shape[-1:], len(x) == 1, x.dtype in NARROW
    x, dy = x.to(gain.dtype), dy.to(gain.dtype)
    if mean is not None and alone and narrow:
        weight = gain.view(D)
        dx, dscale, dshift = layer_norm_backward(dy, x, D, mean, rstd, weight, weight, [True] * 3)
        return dx, dshift, dscale
    # LayerNorm adds one row after the other: too coarse beside float32 tokens, `sum` is not.
    if mean is None:
        normed, g = x * rstd, dy * gain
        along = (g * normed).mean(-1, keepdim=True)
        dx = torch.addcmul(g, normed, along, value=-1).mul_(rstd)
    else:
        normed = (x - mean).mul_(rstd)
        g, weight = (dy, gain.view(D)) if alone else (dy * gain, None)
        dx, _, _ = layer_norm_backward(g, x, D, mean, rstd, weight, None, [True, False, False])
    return dx, dy.sum(1, keepdim=True), normed.mul_(dy).sum(1, keepdim=True)


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

    def modulation(self, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(B|1, D) or (B|1, T, D) as (groups, 1, D), wide unless a dtype is given."""
        groups, _, D = self.shape
        rows = rows.to(dtype or self.wide).reshape(len(rows), self.per_sample, D)
        return rows.expand(self.batch, -1, -1).reshape(groups, 1, D)

    def zeros(self) -> Tensor:
        """Wide sums for a row per group."""
        return torch.zeros(self.shape[0], 1, self.shape[2], dtype=self.wide)

    def summed(self, rows: Tensor, like: Tensor) -> Tensor:
        """The transpose of `modulation`: in the shape and dtype of `like`."""
        if len(like) != self.batch:
            rows = rows.view(self.batch, self.per_sample, self.shape[2]).sum(0)
        return rows.reshape(like.shape).to(like.dtype)

    def pieces(self, by_itself: bool, *tensors: Tensor | None):
        """Tuples of views: of several whole groups, or of a part of one.

        Args:
            by_itself: no piece holds several groups if they are worth a call each.
            tensors: (groups, tokens, ...) or (groups, 1, ...); None stays None.
        """
        groups, tokens, D = self.shape
        if groups == 0 or tokens == 0:
            return
        rows = max(PIECE // max(D, 1), 1)
        single = by_itself and tokens * D >= WORTH_A_CALL
        step = 1 if single else max(rows // tokens, 1)
        split = (repeat(None) if t is None else t.split(step) for t in tensors)
        for parts in zip(*split, strict=False):
            if tokens <= rows:
                yield parts
                continue
            split = (repeat(t) if t is None or t.shape[1] == 1 else t.split(rows, 1) for t in parts)
            yield from zip(*split, strict=False)
