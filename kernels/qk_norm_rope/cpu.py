"""The CPU path through PyTorch: tokens by pieces that stay in the cache."""

import torch
from torch import Tensor

PIECE = 65536  # numbers of q or k


def forward(q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, index, dims, interleaved, *norm):
    """q and k, contiguous. Float32 inside, for float64 float64."""
    turn = _Turn(q, cos, sin, index, dims, interleaved)
    found = []
    for x, weight, bias in ((q, q_weight, q_bias), (k, k_weight, k_bias)):
        y = x.new_empty(x.shape)
        weight, bias = _wide(weight, x), _wide(bias, x)
        for piece in _pieces(x):
            rows, _ = _normalized(x[piece], *norm)
            if weight is not None:
                rows = rows.mul_(weight)
            if bias is not None:
                rows = rows.add_(bias)
            y[piece] = turn(rows.view(y[piece].shape), piece)
        found.append(y)
    return tuple(found)


def backward(
    dq_out, dk_out, q, k, q_weight, k_weight, q_bias, k_bias,
    cos, sin, index, dims, interleaved, *norm,
):  # fmt: skip
    """dq, dk, dq_weight, dk_weight, dq_bias, dk_bias; empty where there is no such argument."""
    turn = _Turn(q, cos, sin, index, dims, interleaved)
    grads = (
        _gradients(turn, dq_out, q, q_weight, q_bias, *norm),
        _gradients(turn, dk_out, k, k_weight, k_bias, *norm),
    )
    return tuple(grad for pair in zip(*grads, strict=True) for grad in pair)


def _gradients(turn, dy, x, weight, bias, norm, across_heads, eps):
    """Of x, weight and bias."""
    dx, gain = x.new_empty(x.shape), _wide(weight, x)
    sums = [_wide(x.new_zeros(t.shape if t is not None else 0), x) for t in (weight, bias)]
    for piece in _pieces(x):
        g = turn(_copy(dy[piece]), piece, back=True)
        g = g.flatten(1) if across_heads else g
        rows = tuple(range(g.dim() - 1))
        if bias is not None:
            sums[1] += g.sum(rows)
        if norm is not None:
            normed, rstd = _normalized(x[piece], norm, across_heads, eps)
            if gain is not None:
                sums[0] += (g * normed).sum(rows)
                g = g.mul_(gain)
            along = (g * normed).mean(-1, keepdim=True)
            mean = g.mean(-1, keepdim=True) if norm == "layer" else None
            g = g.addcmul_(normed, along, value=-1)
            g = (g if mean is None else g.sub_(mean)).mul_(rstd)
        dx[piece] = g.view(dx[piece].shape)
    dtypes = (x.dtype if t is None else t.dtype for t in (weight, bias))
    return dx, *(total.to(dtype) for total, dtype in zip(sums, dtypes, strict=True))


def _normalized(x, norm, across_heads, eps):
    """(tokens, heads, E), or across heads (tokens, heads * E), wide, to overwrite; and rstd."""
    if norm is None:
        return _copy(x), None
    wide = _wide(x, x)
    wide = wide.flatten(1) if across_heads else wide
    if norm == "layer":
        y, _, rstd = torch.native_layer_norm(wide, wide.shape[-1:], None, None, eps)
        return y, rstd
    rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    rstd = rstd.div_(wide.shape[-1]).add_(eps).rsqrt_()
    return (wide * rstd).contiguous(), rstd


class _Turn:
    """Turns pieces of tokens in place."""

    def __init__(self, x: Tensor, cos, sin, index, dims, interleaved):
        self.dims, self.interleaved, self.table = dims, interleaved, None
        if cos is not None:
            self.table = torch.complex(_wide(cos, x), _wide(sin, x))
            self.index = index.expand(len(x), -1, -1)

    def __call__(self, rows: Tensor, piece, back: bool = False) -> Tensor:
        """Turn (tokens, heads, E), contiguous, in place, or `back`."""
        if self.table is None:
            return rows
        index = self.index[piece]
        pieces = self.table.split([dim // 2 for dim in self.dims], dim=1)
        angles = torch.cat([t[index[:, axis]] for axis, t in enumerate(pieces)], dim=1)
        angles = (angles.conj_physical() if back else angles).unsqueeze(1)  # (tokens, 1, pairs)
        if self.interleaved:
            turned = rows[..., : sum(self.dims)].unflatten(-1, (-1, 2))
            torch.view_as_complex(turned).mul_(angles)
            return rows
        channel = 0
        for dim in self.dims:
            part = angles[..., channel // 2 : (channel + dim) // 2]
            a, b = rows[..., channel : channel + dim].chunk(2, -1)
            first = a * part.real - b * part.imag
            b.mul_(part.real).addcmul_(a, part.imag)
            a.copy_(first)
            channel += dim
        return rows


def _wide(tensor: Tensor | None, like: Tensor):
    return None if tensor is None else tensor.to(_dtype(like))


def _copy(x: Tensor) -> Tensor:
    return x.to(_dtype(x), copy=True, memory_format=torch.contiguous_format)


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _pieces(x: Tensor):
    """Of each sample, slices of its tokens."""
    B, N, heads, E = x.shape
    step = max(PIECE // max(heads * E, 1), 1)
    for b in range(B):
        for first in range(0, N, step):
            yield b, slice(first, first + step)
