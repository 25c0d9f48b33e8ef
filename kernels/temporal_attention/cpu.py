"""The CPU paths of `temporal_attention`: PyTorch's fused attention, and the compiled kernel."""

import torch
from torch import Tensor

from .._shared.views import rows_together
from .reference import rotate, temporal_attention_backward, visible

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def forward(q, k, v, known, cos, sin, scale, back, forward):
    """One call, in which every (position, head) is a head, on views where strides allow it."""
    bias = _bias(q, known, back, forward)
    turned_q, turned_k = _turned(q, cos, sin), _turned(k, cos, sin)
    out, _ = _attend(*map(_heads, (turned_q, turned_k, v)), attn_mask=bias, scale=scale)
    out = out.transpose(1, 2).reshape(q.shape).contiguous()
    # The very bits of v, whatever the other frames hold.
    return out if known is None else torch.where(known[:, :, None, None, None], v, out)


def backward(dout, q, k, v, known, cos, sin, scale, back, forward):
    """dq, dk, dv, by the written gradient in float32 (float64 for float64).

    Measured faster than the backward of the fused attention, which would also need the result and
    its log-sum-exp, and closer: known frames get exactly nothing in dq and dk.
    """
    rotary = None if cos is None else (cos, sin)
    grads = temporal_attention_backward(
        *(_wide(x) for x in (dout, q, k, v)),
        known=known, window=(back, forward), rotary=rotary, scale=scale,
    )  # fmt: skip
    return tuple(grad.to(q.dtype).contiguous() for grad in grads)


def _heads(x: Tensor) -> Tensor:
    """(B, T, N, heads, E) as (B, N * heads, T, E)."""
    return rows_together(x).flatten(2, 3).transpose(1, 2)


def _turned(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    if cos is None or sin is None:
        return x
    return rotate(_wide(x), (cos, sin)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _bias(q: Tensor, known: Tensor | None, back: int, forward: int) -> Tensor | None:
    """(B|1, 1, T, T): 0 where visible, -inf elsewhere; None if all is visible."""
    frames = q.shape[1]
    if known is None and min(back, forward) >= frames - 1:
        return None
    seen = visible(frames, known, (back, forward), q.device)
    return q.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf).unsqueeze(1)


def compiled_serves(dtype: torch.dtype) -> bool:
    """Whether the C++ kernel knows this dtype."""
    return dtype in (torch.float32, torch.bfloat16)


def compiled_forward(q, k, v, known, cos, sin, scale, back, forward):
    """The C++ kernel."""
    q, k, v = map(rows_together, (q, k, v))
    out = q.new_empty(q.shape)
    rule = known, _table(cos), _table(sin), scale, back, forward
    torch.ops.fastvid_cpp.temporal_attention(q, k, v, *rule, out)
    return out


def compiled_backward(dout, q, k, v, known, cos, sin, scale, back, forward):
    """The C++ kernel."""
    dout, q, k, v = map(rows_together, (dout, q, k, v))
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    rule = known, _table(cos), _table(sin), scale, back, forward
    torch.ops.fastvid_cpp.temporal_attention_backward(dout, q, k, v, *rule, dq, dk, dv)
    return dq, dk, dv


def _table(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.to(torch.float32).contiguous()
