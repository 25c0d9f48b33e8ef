"""`temporal_attention`: the registered op, its gradient, and the public function."""

import torch
from torch import Tensor

from .._shared import native
from .._shared.checks import expect_device, expect_float, expect_shape
from .._shared.derivatives import refuse_second
from .._shared.paths import announce
from . import cpu

MOST_FRAMES = 64  # a sequence and all its scores are one tile

_RULE = "Tensor? known, Tensor? cos, Tensor? sin, float scale, int back, int forward"
torch.library.define(
    "fastvid::temporal_attention", f"(Tensor q, Tensor k, Tensor v, {_RULE}) -> Tensor"
)
# Scores are cheaper to make again than to keep, so that nothing but q, k and v is saved.
torch.library.define(
    "fastvid::temporal_attention_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, {_RULE}) -> (Tensor dq, Tensor dk, Tensor dv)",
)


@torch.library.impl("fastvid::temporal_attention", "CUDA")
def _(q, k, v, *rule):
    from .kernel import launch_forward  # Triton loads at the first launch

    announce("temporal_attention", "Triton")
    with torch.cuda.device_of(q):
        return launch_forward(q, k, v, *rule)


@torch.library.impl("fastvid::temporal_attention_backward", "CUDA")
def _(dout, q, k, v, *rule):
    from .kernel import launch_backward

    announce("temporal_attention_backward", "Triton")
    with torch.cuda.device_of(q):
        return launch_backward(dout, q, k, v, *rule)


@torch.library.impl("fastvid::temporal_attention", "CPU")
def _(q, k, v, *rule):
    if q.numel() == 0:
        return q.new_empty(q.shape)
    compiled = native.loaded() and cpu.compiled_serves(q.dtype)
    announce("temporal_attention", "C++" if compiled else "PyTorch")
    return (cpu.compiled_forward if compiled else cpu.forward)(q, k, v, *rule)


@torch.library.impl("fastvid::temporal_attention_backward", "CPU")
def _(dout, q, k, v, *rule):
    if q.numel() == 0:
        return tuple(q.new_empty(q.shape) for _ in range(3))
    compiled = native.loaded() and cpu.compiled_serves(q.dtype)
    announce("temporal_attention_backward", "C++" if compiled else "PyTorch")
    return (cpu.compiled_backward if compiled else cpu.backward)(dout, q, k, v, *rule)


@torch.library.register_fake("fastvid::temporal_attention")
def _(q, k, v, *rule):
    return q.new_empty(q.shape)


@torch.library.register_fake("fastvid::temporal_attention_backward")
def _(dout, q, k, v, *rule):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.back, ctx.forward = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, dout):
    saved = ctx.saved_tensors
    grads = _temporal_attention_backward(dout, *saved, ctx.scale, ctx.back, ctx.forward)
    return *grads, None, None, None, None, None, None


torch.library.register_autograd("fastvid::temporal_attention", _gradient, setup_context=_save)
refuse_second("temporal_attention")
_temporal_attention = torch.ops.fastvid.temporal_attention.default
_temporal_attention_backward = torch.ops.fastvid.temporal_attention_backward.default


def temporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    known: Tensor | None = None,
    window: tuple[int, int] | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention along T: every token attends to the tokens at its own position in all frames.

    Scores and sums are float32 whatever the dtype, and every run gives the same bits. For the
    backward q, k and v are kept, nothing else.

    Args:
        q, k, v: (B, T, N, heads, E) in any strides, such as views of one packed projection; of one
            dtype. T <= 64; E a multiple of 8 up to 256.
        known: (B or 1, T) bool, True for frames that see only themselves: there the result is
            their own v. The others see every frame, known ones too.
        window: `(back, forward)`: a frame sees so many frames before and after it. All by default.
        rotary: `(cos, sin)`, each (T or more, E / 2) of any float dtype: row t turns the pairs
            (0, 1), (2, 3), ... of q and k in frame t. The tables get no gradient.
        scale: of the scores, E ** -0.5 by default.
    Returns:
        (B, T, N, heads, E), contiguous, in the dtype of `q`.
    Raises:
        TypeError: an argument is not a tensor, or its dtype is not the one above.
        ValueError: a shape, a device or the window is not the one above.
        NotImplementedError: T > 64, E is not a multiple of 8 up to 256, or a second derivative is
            asked for.
    Source: temporal attention of Lu et al., arXiv:2305.13311, and Liu et al., arXiv:2410.20280;
        rotary positions of Su et al., arXiv:2104.09864.
    """
    sizes = expect_shape("q", q, "B T N heads E")
    T, E = sizes["T"], sizes["E"]
    expect_float("q", q)
    for name, tensor in (("k", k), ("v", v)):
        expect_shape(name, tensor, "B T N heads E", sizes)
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
        expect_device(name, tensor, "q", q)
    if T > MOST_FRAMES:
        raise NotImplementedError(f"q must have T <= {MOST_FRAMES} frames, got T={T}")
    if E % 8 or not 8 <= E <= 256:
        raise NotImplementedError(f"q must have E in 8, 16, ..., 256, got E={E}")
    if known is not None:
        expect_shape("known", known, "B|1 T", sizes)
        if known.dtype != torch.bool:
            raise TypeError(f"known must be bool, True where given, got {known.dtype}")
        expect_device("known", known, "q", q)
    back, forward = (MOST_FRAMES, MOST_FRAMES) if window is None else window
    if back < 0 or forward < 0:
        raise ValueError(f"window must be (back, forward) frames, at least 0, got {window}")
    back, forward = (torch.sym_min(far, MOST_FRAMES) for far in (back, forward))
    cos = sin = None
    if rotary is not None:
        cos, sin = rotary
        _expect_table("cos", cos, q)
        _expect_table("sin", sin, q)
    scale = E**-0.5 if scale is None else float(scale)
    return _temporal_attention(q, k, v, known, cos, sin, scale, back, forward)


def _expect_table(name: str, table: Tensor, q: Tensor) -> None:
    T, E = q.shape[1], q.shape[4]
    expect_shape(name, table, f"rows {E // 2}")
    if table.shape[0] < T:
        raise ValueError(f"{name} must have a row for each of T={T} frames, got {len(table)}")
    expect_float(name, table)
    expect_device(name, table, "q", q)
