"""`asymmetric_attention`: the registered op, its gradient, and the public function."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .._shared.checks import expect_device, expect_float, expect_shape
from .._shared.derivatives import refuse_second
from .._shared.paths import announce
from . import cpu

# So many keys are enough for PyTorch's own attention on a GPU, where the call is one on views and
# needs no gradient (its backward is not deterministic). A prediction, not measured.
VENDOR_KEYS = 128

torch.library.define(
    "fastvid::asymmetric_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? known, float scale, bool clip)"
    " -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "fastvid::asymmetric_attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? known,"
    " float scale, bool clip) -> (Tensor dq, Tensor dk, Tensor dv)",
)


@torch.library.impl("fastvid::asymmetric_attention", "CUDA")
def _(q, k, v, known, scale, clip):
    from .kernel import launch_forward  # Triton loads at the first launch

    announce("asymmetric_attention", "Triton")
    with torch.cuda.device_of(q):
        return launch_forward(q, k, v, known, scale, clip)


@torch.library.impl("fastvid::asymmetric_attention_backward", "CUDA")
def _(dout, q, k, v, out, lse, known, scale, clip):
    from .kernel import launch_backward

    announce("asymmetric_attention_backward", "Triton")
    with torch.cuda.device_of(q):
        return launch_backward(dout, q, k, v, out, lse, known, scale, clip)


@torch.library.impl("fastvid::asymmetric_attention", "CPU")
def _(q, k, v, known, scale, clip):
    announce("asymmetric_attention", "SDPA on views")
    return cpu.forward(q, k, v, known, scale, clip)


@torch.library.impl("fastvid::asymmetric_attention_backward", "CPU")
def _(dout, q, k, v, out, lse, known, scale, clip):
    announce("asymmetric_attention_backward", "SDPA on views")
    return cpu.backward(dout, q, k, v, out, lse, known, scale, clip)


@torch.library.register_fake("fastvid::asymmetric_attention")
def _(q, k, v, known, scale, clip):
    B, T, N, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, heads, T, N, dtype=cpu.wide(q.dtype))


@torch.library.register_fake("fastvid::asymmetric_attention_backward")
def _(dout, q, k, v, out, lse, known, scale, clip):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, known, ctx.scale, ctx.clip = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, known)


def _gradient(ctx, dout, _dlse):
    grads = _asymmetric_attention_backward(dout, *ctx.saved_tensors, ctx.scale, ctx.clip)
    return *grads, None, None, None


torch.library.register_autograd("fastvid::asymmetric_attention", _gradient, setup_context=_save)
refuse_second("asymmetric_attention")
_asymmetric_attention = torch.ops.fastvid.asymmetric_attention.default
_asymmetric_attention_backward = torch.ops.fastvid.asymmetric_attention_backward.default


def asymmetric_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scope: Literal["frame", "clip"] = "frame",
    known: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Cross-attention of the tokens of a video on those of another, coarser one, in one launch.

    K and V are read where they lie: a batch or frames that share them are stride 0, or simply 1.

    Args:
        q: (B, T, Nq, heads, E) in any strides. E is a multiple of 8 from 16 to 256.
        k, v: (B or 1, T or 1, Nk, heads, E) in any strides, dtype and device of `q`, Nk >= 1. A
            size of 1 where q has more is shared, and its gradient is the sum, without a repeat.
        scope: "frame", the queries of frame t see the keys of frame t; "clip", of all frames.
        known: (B or 1, T) bool, True for frames whose result is not wanted: nothing is computed
            for their queries, the result is 0 and no gradient comes from there.
        scale: of the scores, E ** -0.5 by default.
    Returns:
        (B, T, Nq, heads, E), contiguous, in the dtype of `q`.
    Raises:
        TypeError: an argument is not a tensor, or its dtype is not the one above.
        ValueError: a shape, a device or the scope is not the one above.
        NotImplementedError: E > 256, or a second derivative is asked for.
    Source: the attention across modules of Liu et al., MarDini, arXiv:2410.20280.
    """
    sizes = expect_shape("q", q, "B T Nq heads E")
    expect_float("q", q)
    E = sizes["E"]
    if E % 8 or E < 16:
        raise ValueError(f"q must have a head width E that is a multiple of 8, >= 16, got {E}")
    if E > 256:
        raise NotImplementedError(f"q must have a head width E <= 256, got {E}")
    expect_shape("k", k, "B|1 T|1 Nk heads E", sizes)
    if k.shape[2] < 1:
        raise ValueError(f"k must have Nk >= 1 keys in a frame, got {tuple(k.shape)}")
    if isinstance(v, Tensor) and v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    expect_shape("v", v, "B|1 T|1 Nk heads E", sizes)
    for name, tensor in (("k", k), ("v", v)):
        expect_device(name, tensor, "q", q)
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
    if scope not in ("frame", "clip"):
        raise ValueError(f'scope must be "frame" or "clip", got {scope!r}')
    if known is not None:
        expect_shape("known", known, "B|1 T", sizes)
        if known.dtype != torch.bool:
            raise TypeError(f"known must be bool, True where not wanted, got {known.dtype}")
        expect_device("known", known, "q", q)
        known = known.expand(sizes["B"], sizes["T"])
    scale = E**-0.5 if scale is None else float(scale)
    clip = scope == "clip" or k.shape[1] == 1  # one frame of keys is all frames of keys
    # A compiled graph must not depend on sizes.
    if not torch.compiler.is_compiling() and _vendor_serves(q, k, v, known, clip):
        announce("asymmetric_attention", "SDPA on views")
        return _vendor(q, k, v, scale, clip)
    return _asymmetric_attention(q, k, v, known, scale, clip)[0]


def _vendor_serves(q: Tensor, k: Tensor, v: Tensor, known: Tensor | None, clip: bool) -> bool:
    """Whether PyTorch's own attention takes the call."""
    if not q.is_cuda or q.dtype == torch.float32 or known is not None or not q.numel():
        return False
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False
    keys = k.shape[2] * (k.shape[1] if clip else 1)
    return keys >= VENDOR_KEYS and cpu.one_call([q], k, v, clip)


def _vendor(q: Tensor, k: Tensor, v: Tensor, scale: float, clip: bool) -> Tensor:
    k, v = cpu.keys(k, q, clip), cpu.keys(v, q, clip)
    out = F.scaled_dot_product_attention(cpu.rows(q, clip), k, v, scale=scale)
    return out.transpose(1, 2).reshape(q.shape).contiguous()
