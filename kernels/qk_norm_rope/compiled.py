"""The C++ kernels on the CPU: which dtypes they know, and what they are handed."""

import torch
from torch import Tensor

from .._shared.views import rows_together
from .cpu import expect_rows

KNOWN = (torch.float32, torch.bfloat16)
NORMS = (None, "rms", "layer")  # as the C++ counts them


def serves(dtype: torch.dtype) -> bool:
    """Whether the C++ knows q and k of this dtype; weights, biases and tables may have any."""
    return dtype in KNOWN


def forward(q, k, q_weight, k_weight, q_bias, k_bias, *rule):
    """q and k, contiguous."""
    affine = (_wide(row) for row in (q_weight, k_weight, q_bias, k_bias))
    return _forward(q, k, affine, rule, back=False)


def backward(dq_out, dk_out, q, k, q_weight, k_weight, q_bias, k_bias, *rule):
    """dq, dk, dq_weight, dk_weight, dq_bias, dk_bias; empty where there is no such argument."""
    affine = q_weight, k_weight, q_bias, k_bias
    *_, norm, _, _ = rule
    if norm is None:  # a turn back
        return *_forward(dq_out, dk_out, affine, rule, back=True), *(q.new_empty(0) for _ in affine)
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    sums = [row if row is None else row.new_zeros(row.shape, dtype=torch.float32) for row in affine]
    tables = _tables(*rule)
    if q.numel():
        torch.ops.fastvid_cpp.qk_norm_rope_backward(
            *map(rows_together, (dq_out, dk_out, q, k)), _wide(q_weight), _wide(k_weight),
            *tables, dq, dk, *sums,
        )  # fmt: skip
    dtypes = (q.dtype if row is None else row.dtype for row in affine)
    found = (q.new_empty(0) if total is None else total for total in sums)
    return dq, dk, *(row.to(dtype) for row, dtype in zip(found, dtypes, strict=True))


def _forward(q, k, affine, rule, back):
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    tables = _tables(*rule)
    if q.numel():
        torch.ops.fastvid_cpp.qk_norm_rope(
            rows_together(q), rows_together(k), *affine, *tables, back, q_out, k_out
        )
    return q_out, k_out


def _tables(cos, sin, index, dims, interleaved, norm, across_heads, eps):
    """The arguments of the C++ behind the weights and biases."""
    if cos is not None:
        expect_rows(index, len(cos))
        cos, sin, index = _wide(cos), _wide(sin), index.contiguous()
    return cos, sin, index, dims, interleaved, NORMS.index(norm), across_heads, eps


def _wide(row: Tensor | None) -> Tensor | None:
    return None if row is None else row.float().contiguous()
