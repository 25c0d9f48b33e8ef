"""PyTorch's fused attention on views: the CPU path of `asymmetric_attention`.

A block is a range of samples and frames that one call serves: frames side by side as a batch or,
where all see the same keys (`clip`), their queries in a row. One block is everything, unless frames
are known or the strides do not allow it.
"""

import torch
from torch import Tensor

from .._shared.views import merges, rows_together

Block = tuple[slice, slice]  # samples, frames

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(q, k, v, known, scale, clip):
    """out (B, T, Nq, heads, E) and lse (B, heads, T, Nq)."""
    q, k, v = (rows_together(x) for x in (q, k, v))
    if _copying_keys_pays(q, k, known, clip):
        k, v = (x.expand(len(q), *x.shape[1:]).contiguous() for x in (k, v))
    blocks = _blocks([q], k, v, known, clip)
    if known is None and len(blocks) == 1:
        out, lse = _forward_block(q, k, v, blocks[0], scale, clip)
        return out.contiguous(), lse.contiguous()
    B, T, N, heads, _ = q.shape
    out = q.new_zeros(q.shape)
    lse = q.new_full((B, heads, T, N), -torch.inf, dtype=wide(q.dtype))
    for samples, frames in blocks:
        part = _forward_block(q, k, v, (samples, frames), scale, clip)
        out[samples, frames], lse[samples, :, frames] = part
    return out, lse


def backward(dout, q, k, v, out, lse, known, scale, clip):
    """dq, dk and dv; sums over calls and samples are `wide` and rounded once."""
    dout, q, k, v = (rows_together(x) for x in (dout, q, k, v))
    shape = k.shape
    if _copying_keys_pays(q, k, known, clip):
        k, v = (x.expand(len(q), *x.shape[1:]).contiguous() for x in (k, v))
    blocks = _blocks([dout, q, out], k, v, known, clip)
    if known is None and len(blocks) == 1:
        grads = _backward_block(dout, q, k, v, out, lse, blocks[0], scale, clip)
        grads = grads[0], *(_over_samples(grad, shape) for grad in grads[1:])
        return tuple(grad.to(q.dtype).contiguous() for grad in grads)
    dq = q.new_zeros(q.shape)
    dk, dv = (x.new_zeros(x.shape, dtype=wide(q.dtype)) for x in (k, v))
    for block in blocks:
        part = _backward_block(dout, q, k, v, out, lse, block, scale, clip)
        dq[block] = part[0]
        for whole, grad in zip((dk, dv), part[1:], strict=True):
            whole[_seen(whole, block, clip)] += grad
    return dq, *(_over_samples(grad, shape).to(q.dtype) for grad in (dk, dv))


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _over_samples(grad: Tensor, shape: torch.Size) -> Tensor:
    """The sum over samples where `shape`, of what they share, has one: float32, not rounded yet."""
    return grad if grad.shape == shape else grad.sum(0, keepdim=True, dtype=wide(grad.dtype))


def rows(x: Tensor, clip: bool) -> Tensor:
    """(samples, frames, tokens, heads, E) as (sequences, heads, tokens, E)."""
    return x.flatten(*((1, 2) if clip else (0, 1))).transpose(1, 2)


def keys(k: Tensor, q: Tensor, clip: bool) -> Tensor:
    """What `rows` is to the queries q: (sequences, heads, keys, E)."""
    k = rows(k, clip)
    return k.expand(q.shape[0], *k.shape[1:]) if clip else k


def one_call(queries: list[Tensor], k: Tensor, v: Tensor, clip: bool) -> bool:
    """Whether `rows` and `keys` of everything are views."""
    if clip:
        return all(merges(x, 1) for x in (*queries, k, v))
    return len(k) == len(queries[0]) and all(merges(x, 0) for x in (*queries, k, v))


def _blocks(queries: list[Tensor], k: Tensor, v: Tensor, known, clip: bool) -> list[Block]:
    B, T = queries[0].shape[:2]
    every = slice(None)
    if queries[0].numel() == 0:
        return []  # PyTorch divides by the batch and by the heads
    if known is not None:
        return [(slice(b, b + 1), run) for b in range(B) for run in _runs(known[b].tolist())]
    if one_call(queries, k, v, clip):
        return [(every, every)]
    if clip:
        return [(every, slice(t, t + 1)) for t in range(T)]
    return [(slice(b, b + 1), every) for b in range(B)]


def _copying_keys_pays(q: Tensor, k: Tensor, known, clip: bool) -> bool:
    """Whether one call on a copy of shared keys saves more, the copies of each sample's result."""
    shared = known is None and not clip and k.shape[0] < len(q)
    return shared and 2 * k.shape[2] <= q.shape[2]


def _runs(known: list[bool]) -> list[slice]:
    """Stretches of frames that are not known."""
    edges = [True, *known, True]
    starts = [t for t in range(len(known)) if edges[t] and not edges[t + 1]]
    ends = [t for t in range(1, len(known) + 1) if not edges[t] and edges[t + 1]]
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


def _seen(k: Tensor, block: Block, clip: bool) -> Block:
    """Which keys a block sees."""
    samples, frames = block
    return slice(None) if k.shape[0] == 1 else samples, slice(None) if clip else frames


def _forward_block(q, k, v, block, scale, clip):
    """out (samples, frames, Nq, heads, E) and lse (samples, heads, frames, Nq)."""
    q = q[block]
    k, v = (keys(x[_seen(x, block, clip)], q, clip) for x in (k, v))
    part = [rows(q, clip), k, v]
    if q.dtype == torch.float16:  # which PyTorch multiplies slowly on a CPU
        part = [x.float() for x in part]
    out, lse = _attend(*part, scale=scale)
    samples, frames = q.shape[:2]
    if clip:
        lse = lse.unflatten(2, (frames, -1))
    else:
        lse = lse.unflatten(0, (samples, frames)).transpose(1, 2)
    return out.transpose(1, 2).reshape(q.shape).to(q.dtype), lse


def _backward_block(dout, q, k, v, out, lse, block, scale, clip):
    """dq, dk and dv of the block, in the shapes of what it takes of q, k and v."""
    dout, q, out, lse = dout[block], q[block], out[block], lse[block[0], :, block[1]]
    k, v = (x[_seen(x, block, clip)] for x in (k, v))
    lse = lse.flatten(2) if clip else lse.transpose(1, 2).flatten(0, 1)
    part = [rows(x, clip) for x in (dout, q)]
    part += [keys(k, q, clip), keys(v, q, clip), rows(out, clip)]
    if _better_wide(q.dtype, part[2].shape[2]):
        part = [x.float() for x in part]
    dq, *dkv = _attend_backward(*part, lse.contiguous(), 0.0, False, scale=scale)
    dk, dv = (
        _over_samples(grad.transpose(1, 2).unflatten(1, x.shape[1:3]), x.shape)
        if clip
        else grad.transpose(1, 2).reshape(x.shape)
        for grad, x in zip(dkv, (k, v), strict=True)
    )
    return dq.transpose(1, 2).reshape(q.shape), dk, dv


def _better_wide(dtype: torch.dtype, keys: int) -> bool:
    """Whether the backward of PyTorch is faster in float32, conversions included."""
    return dtype == torch.float16 or (dtype == torch.bfloat16 and keys <= 128)
