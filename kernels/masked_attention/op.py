"""`masked_attention`: the registered op, its gradient, and the public function."""

from typing import Literal, overload

import torch
from torch import Tensor

from .._shared.checks import expect_device, expect_float, expect_shape
from .._shared.derivatives import refuse_second
from .._shared.paths import announce
from .._shared.visibility import Visibility
from . import grouped, vendor
from .plan import Plan, plans_of

torch.library.define(
    "fastvid::masked_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor rows, Tensor row_spans, Tensor columns,"
    " Tensor column_spans, float scale) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "fastvid::masked_attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor rows,"
    " Tensor row_spans, Tensor columns, Tensor column_spans, float scale)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
)


@torch.library.impl("fastvid::masked_attention", "CUDA")
def _(q, k, v, rows, row_spans, columns, column_spans, scale):
    from .kernel import launch_forward  # Triton loads at the first launch

    announce("masked_attention", "Triton")
    with torch.cuda.device_of(q):
        return launch_forward(q, k, v, rows, row_spans, scale)


@torch.library.impl("fastvid::masked_attention_backward", "CUDA")
def _(dout, q, k, v, out, lse, rows, row_spans, columns, column_spans, scale):
    from .kernel import launch_backward

    announce("masked_attention_backward", "Triton")
    with torch.cuda.device_of(q):
        return launch_backward(
            dout, q, k, v, out, lse, rows, row_spans, columns, column_spans, scale
        )


@torch.library.impl("fastvid::masked_attention", "CPU")
def _(q, k, v, rows, row_spans, columns, column_spans, scale):
    announce("masked_attention", "SDPA per group of frames")
    return grouped.forward(q, k, v, _plans(rows, row_spans, q, k), scale)


@torch.library.impl("fastvid::masked_attention_backward", "CPU")
def _(dout, q, k, v, out, lse, rows, row_spans, columns, column_spans, scale):
    announce("masked_attention_backward", "SDPA per group of frames")
    return grouped.backward(dout, q, k, v, out, lse, _plans(rows, row_spans, q, k), scale)


def _plans(rows: Tensor, row_spans: Tensor, q: Tensor, k: Tensor) -> tuple[Plan, ...]:
    return plans_of(rows, row_spans, q.shape[1], k.shape[1], grouped.FULL_RATE_ROWS)


@torch.library.register_fake("fastvid::masked_attention")
def _(q, k, v, rows, row_spans, columns, column_spans, scale):
    B, N, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(B, heads, N, dtype=wide)


@torch.library.register_fake("fastvid::masked_attention_backward")
def _(dout, q, k, v, out, lse, rows, row_spans, columns, column_spans, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors[:3], out, lse, *tensors[3:])


def _gradient(ctx, dout, _dlse):
    grads = _masked_attention_backward(dout, *ctx.saved_tensors, ctx.scale)
    return *grads, None, None, None, None, None


torch.library.register_autograd("fastvid::masked_attention", _gradient, setup_context=_save)
refuse_second("masked_attention")
_masked_attention = torch.ops.fastvid.masked_attention.default
_masked_attention_backward = torch.ops.fastvid.masked_attention_backward.default


@overload
def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *, scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *, scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention whose cost follows what is visible: `softmax(scale q kᵀ) v` over visible pairs.

    Args:
        q: (B, N, heads, E) in any strides, for instance a view of a packed qkv projection. E is a
            multiple of 8 from 16 to 256.
        k, v: (B, M, heads, E), dtype and device of `q`. A batch that shares its keys is `expand`ed.
        visibility: who sees whom; its layouts sum to N and M, its batch is B or 1.
        scale: of the scores; E ** -0.5 unless given.
        return_lse: also return the natural log of each row's sum of exponentials, float32
            (B, heads, N), which has no gradient.
    Returns:
        (B, N, heads, E), contiguous, dtype of `q`. A row that sees nothing is 0 (lse -inf) and
        gives no gradient. A self-only row is the `v` of its own token.
    Raises:
        TypeError: not a tensor or a Visibility, or a dtype that is not served.
        ValueError: a shape, dtype, device or layout that does not fit.
        NotImplementedError: E > 256, or a second derivative is asked for.
    """
    sizes = expect_shape("q", q, "B N heads E")
    sizes = expect_shape("k", k, "B M heads E", sizes)
    expect_shape("v", v, "B M heads E", sizes)
    expect_float("q", q)
    for name, tensor in (("k", k), ("v", v)):
        expect_device(name, tensor, "q", q)
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
    E = sizes["E"]
    if E % 8 or E < 16:
        raise ValueError(f"q must have a head width E that is a multiple of 8, >= 16, got {E}")
    if E > 256:
        raise NotImplementedError(f"q must have a head width E <= 256, got {E}")
    if not isinstance(visibility, Visibility):
        raise TypeError(f"visibility must be a Visibility, got {type(visibility).__name__}")
    expect_device("visibility", visibility.rows, "q", q)
    if visibility.batch not in (1, sizes["B"]):
        raise ValueError(f"visibility must have batch 1 or B={sizes['B']}, got {visibility.batch}")
    for side, layout, tokens in (
        ("queries", visibility.queries, sizes["N"]),
        ("keys", visibility.keys, sizes["M"]),
    ):
        if layout.tokens not in (None, tokens):
            raise ValueError(
                f"visibility.{side} must sum to {tokens} tokens, got {layout.tokens} in {layout}"
            )
    scale = E**-0.5 if scale is None else scale
    # A compiled graph must not depend on what the host happens to know.
    if not (return_lse or torch.compiler.is_compiling()):
        wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
        plans = vendor.plans_for(q, k, visibility, wants_gradient)
        if plans is not None:
            announce("masked_attention", "SDPA, one call per group of frames")
            return vendor.attend(q, k, v, plans, scale)
    tables = visibility.rows, visibility.row_spans, visibility.columns, visibility.column_spans
    out, lse = _masked_attention(q, k, v, *tables, scale)
    return (out, lse) if return_lse else out
