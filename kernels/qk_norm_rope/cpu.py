"""PyTorch on the CPU, tokens by pieces that stay in the cache: for float16, float64 and a machine
without a compiler."""

import torch
from torch import Tensor

PIECE = 1 << 18  # numbers of q or k


def forward(q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, index, dims, interleaved, *norm):
    """q and k, contiguous. Float32 inside, for float64 float64."""
    turn = _Turn(q, cos, sin, index, dims, interleaved)
    found = []
    for x, weight, bias in ((q, q_weight, q_bias), (k, k_weight, k_bias)):
        y = x.new_empty(x.shape)
        weight, bias = _wide(weight, x), _wide(bias, x)
        for piece in _pieces(x):
            rows = _affine(x[piece], weight, bias, *norm)
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
    dx, gain, shift = x.new_empty(x.shape), _wide(weight, x), _wide(bias, x)
    sums = [_wide(x.new_zeros(t.shape if t is not None else 0), x) for t in (weight, bias)]
    for piece in _pieces(x):
        g = turn(_copy(dy[piece]), piece, back=True)
        g = g.flatten(1) if across_heads else g
        if norm == "layer":
            wide, width = _rows(x[piece], across_heads), g.shape[-1:]
            _, mean, rstd = torch.native_layer_norm(wide, width, None, None, eps)
            g, *rows = torch.ops.aten.native_layer_norm_backward(
                g, wide, width, mean, rstd, gain, shift, [True, gain is not None, shift is not None]
            )
            for total, row in zip(sums, rows, strict=True):
                if total.numel():
                    total += row
        elif norm == "rms":
            normed, rstd = _rms_normed(_rows(x[piece], across_heads), eps)
            over = tuple(range(g.dim() - 1))
            if shift is not None:
                sums[1] += g.sum(over)
            if gain is not None:
                sums[0] += (g * normed).sum(over)
                g = g.mul_(gain)
            along = (g * normed).mean(-1, keepdim=True)
            g = g.addcmul_(normed, along, value=-1).mul_(rstd)
        dx[piece] = g.view(dx[piece].shape)
    dtypes = (x.dtype if t is None else t.dtype for t in (weight, bias))
    return dx, *(total.to(dtype) for total, dtype in zip(sums, dtypes, strict=True))


def _affine(x, weight, bias, norm, across_heads, eps):
    """(tokens, heads, E) normalised, with weight and bias; wide, contiguous, to overwrite."""
    if norm is None:
        return _copy(x)
    rows = _rows(x, across_heads)
    if norm == "layer":
        return torch.native_layer_norm(rows, rows.shape[-1:], weight, bias, eps)[0]
    y, _ = _rms_normed(rows, eps)
    y = y if weight is None else y.mul_(weight)
    return y if bias is None else y.add_(bias)


def _rms_normed(rows, eps):
    rstd = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_()
    rstd = rstd.div_(rows.shape[-1]).add_(eps).rsqrt_()
    return (rows * rstd).contiguous(), rstd


def _rows(x: Tensor, across_heads: bool) -> Tensor:
    """Wide, one row per norm."""
    wide = _wide(x, x)
    return wide.flatten(1) if across_heads else wide


class _Turn:
    """Turns pieces of tokens in place."""

    def __init__(self, x: Tensor, cos, sin, index, dims, interleaved):
        self.dims, self.interleaved, self.angles = dims, interleaved, None
        if cos is not None:
            expect_rows(index, len(cos))
            joint = torch.complex(_wide(cos, x), _wide(sin, x))
            tables = joint.split([dim // 2 for dim in dims], dim=1)
            angles = torch.cat([t[index[..., i]] for i, t in enumerate(tables)], dim=-1)
            self.angles = angles.expand(len(x), -1, -1).unsqueeze(2)  # (B, N, 1, pairs)

    def __call__(self, rows: Tensor, piece, back: bool = False) -> Tensor:
        """Turn (tokens, heads, E), contiguous, in place, or `back`."""
        if self.angles is None:
            return rows
        angles = self.angles[piece].conj_physical() if back else self.angles[piece]
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


def expect_rows(index: Tensor, length: int) -> None:
    """Raise ValueError for a row below 0, which indexing would count from the end, or too high."""
    if index.numel():
        lowest, highest = (end.item() for end in index.aminmax())
        if lowest < 0 or highest >= length:
            raise ValueError(f"rotary.rows must be in [0, {length}), got {lowest} to {highest}")


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
