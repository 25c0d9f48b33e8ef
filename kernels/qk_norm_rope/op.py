"""`qk_norm_rope`: the registered op, its gradient, and the public function."""

import torch
from torch import Tensor

from .._shared import native
from .._shared.checks import expect_device, expect_float, expect_shape
from .._shared.derivatives import refuse_second
from .._shared.paths import announce
from . import compiled, cpu
from .rotary import Rotary, expect_rotary

MOST_WIDTH = 8192  # heads * E: a token of q is one tile
NORMS = ("rms", "layer", None)

_RULE = (
    "Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias,"
    " Tensor? cos, Tensor? sin, Tensor? index, int[] dims, bool interleaved, str? norm,"
    " bool across_heads, float eps"
)
torch.library.define("fastvid::qk_norm_rope", f"({_RULE}) -> (Tensor q_out, Tensor k_out)")
# Mean and deviation are cheaper to make again than to keep: the row is at hand anyway.
torch.library.define(
    "fastvid::qk_norm_rope_backward",
    f"(Tensor dq_out, Tensor dk_out, {_RULE}) -> (Tensor dq, Tensor dk, Tensor dq_weight,"
    " Tensor dk_weight, Tensor dq_bias, Tensor dk_bias)",
)


@torch.library.impl("fastvid::qk_norm_rope", "CUDA")
def _(q, k, *rule):
    from .kernel import launch_forward  # Triton loads at the first launch

    announce("qk_norm_rope", "Triton")
    with torch.cuda.device_of(q):
        return launch_forward(q, k, *rule)


@torch.library.impl("fastvid::qk_norm_rope_backward", "CUDA")
def _(dq_out, dk_out, q, k, *rule):
    from .kernel import launch_backward

    announce("qk_norm_rope_backward", "Triton")
    with torch.cuda.device_of(q):
        return launch_backward(dq_out, dk_out, q, k, *rule)


@torch.library.impl("fastvid::qk_norm_rope", "CPU")
def _(q, k, *rule):
    return _cpu_path("qk_norm_rope", q.dtype).forward(q, k, *rule)


@torch.library.impl("fastvid::qk_norm_rope_backward", "CPU")
def _(dq_out, dk_out, q, k, *rule):
    path = _cpu_path("qk_norm_rope_backward", q.dtype)
    return path.backward(dq_out, dk_out, q, k, *rule)


def _cpu_path(op, dtype):
    """The module that computes `op`: the C++ where it is there and knows the dtype."""
    found = native.loaded() and compiled.serves(dtype)
    announce(op, "C++" if found else "PyTorch")
    return compiled if found else cpu


@torch.library.register_fake("fastvid::qk_norm_rope")
def _(q, k, *rule):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.register_fake("fastvid::qk_norm_rope_backward")
def _(dq_out, dk_out, q, k, *rule):
    affine = (q.new_empty(0) if t is None else t.new_empty(t.shape) for t in rule[:4])
    return q.new_empty(q.shape), k.new_empty(k.shape), *affine


def _save(ctx, inputs, output):
    q, k, *affine, cos, sin, index, dims, interleaved, norm, across_heads, eps = inputs
    ctx.rule = dims, interleaved, norm, across_heads, eps
    ctx.normed = norm is not None
    inputs = (q, k) if ctx.normed else ()  # a turn alone does not ask what was turned
    ctx.save_for_backward(*inputs, *affine, cos, sin, index)


def _gradient(ctx, dq_out, dk_out):
    inputs = () if ctx.normed else (dq_out, dk_out)
    saved = (*inputs, *ctx.saved_tensors)
    grads = _qk_norm_rope_backward(dq_out, dk_out, *saved, *ctx.rule)
    asked = (
        grad if tensor is not None else None for grad, tensor in zip(grads, saved[:6], strict=True)
    )
    return *asked, *[None] * 8


torch.library.register_autograd("fastvid::qk_norm_rope", _gradient, setup_context=_save)
refuse_second("qk_norm_rope")
_qk_norm_rope = torch.ops.fastvid.qk_norm_rope.default
_qk_norm_rope_backward = torch.ops.fastvid.qk_norm_rope_backward.default


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    *,
    norm: str | None = "rms",
    across_heads: bool = False,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    eps: float = 1e-6,
    rotary: Rotary | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise q and k and turn them to their positions, in one pass.

    Sums and angles are float32 whatever the dtype, the results are rounded once, and every run
    gives the same bits. For the backward q and k are kept as the views they are, nothing else;
    without a norm not even those.

    Args:
        q, k: (B, N, heads, E) in any strides, such as views of one packed projection; of one
            dtype. E a multiple of 8 from 16 to 256, heads * E <= 8192.
        norm: "rms", "layer" or None.
        across_heads: one norm over all heads * E numbers of a token instead of one per head.
        q_weight, k_weight, q_bias, k_bias: (E,), or across heads (heads * E,), behind the norm;
            any float dtype. None is a weight of 1 or a bias of 0.
        eps: added to the variance (or mean square).
        rotary: positions of the tokens on one to three axes (`Rotary.of`); text that is not to be
            turned stands at position 0. Without it nothing is turned. No gradient for its tables.
    Returns:
        q and k, (B, N, heads, E), contiguous, in the dtype of `q`.
    Raises:
        TypeError: an argument is not a tensor, or its dtype is not the one above.
        ValueError: a shape, a device or the norm is not the one above, or a weight or bias comes
            without a norm.
        NotImplementedError: heads * E > 8192, E is not a multiple of 8 from 16 to 256, or a second
            derivative is asked for.
    Source: Su et al., arXiv:2104.09864 (rotary positions); Zhang & Sennrich, arXiv:1910.07467
        (RMSNorm); Dehghani et al., arXiv:2302.05442 (norm of q and k).
    """
    sizes = expect_shape("q", q, "B N heads E")
    heads, E = sizes["heads"], sizes["E"]
    expect_float("q", q)
    expect_shape("k", k, "B N heads E", sizes)
    if k.dtype != q.dtype:
        raise TypeError(f"k must have the dtype of q, {q.dtype}, got {k.dtype}")
    expect_device("k", k, "q", q)
    if E % 8 or not 16 <= E <= 256:
        raise NotImplementedError(f"q must have E in 16, 24, ..., 256, got E={E}")
    if heads * E > MOST_WIDTH:
        raise NotImplementedError(f"q must have heads * E <= {MOST_WIDTH}, got {heads} * {E}")
    if norm not in NORMS:
        raise ValueError(f'norm must be "rms", "layer" or None, got {norm!r}')
    sizes["width"] = heads * E
    affine = {"q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias}
    for name, row in affine.items():
        if row is not None:
            expect_shape(name, row, "width" if across_heads else "E", sizes)
            if norm is None:
                raise ValueError(f"{name} must be None without a norm, got {tuple(row.shape)}")
            expect_float(name, row)
            expect_device(name, row, "q", q)
    turn: tuple = (None, None, None, (), True)
    if rotary is not None:
        expect_rotary(rotary, sizes)
        expect_device("rotary.rows", rotary.rows, "q", q)
        turn = tuple(rotary)
    return _qk_norm_rope(q, k, *affine.values(), *turn, norm, across_heads, float(eps))
