"""`norm_modulate`: the registered op, its gradient, and the public function."""

import torch
from torch import Tensor

from .._shared import native
from .._shared.checks import expect_device, expect_float, expect_shape
from .._shared.derivatives import refuse_second
from .._shared.paths import announce
from . import cpu

torch.library.define(
    "fastvid::norm_modulate",
    "(Tensor x, Tensor shift, Tensor scale, bool rms, float eps, ScalarType dtype)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "fastvid::norm_modulate_backward",
    "(Tensor dy, Tensor x, Tensor scale, Tensor mean, Tensor rstd, bool rms)"
    " -> (Tensor dx, Tensor dshift, Tensor dscale)",
)


@torch.library.impl("fastvid::norm_modulate", "CUDA")
def _(x, shift, scale, rms, eps, dtype):
    from .kernel import launch_forward  # Triton loads at the first launch

    announce("norm_modulate", "Triton")
    with torch.cuda.device_of(x):
        return launch_forward(x, shift, scale, rms, eps, dtype)


@torch.library.impl("fastvid::norm_modulate_backward", "CUDA")
def _(dy, x, scale, mean, rstd, rms):
    from .kernel import launch_backward

    announce("norm_modulate_backward", "Triton")
    with torch.cuda.device_of(x):
        return launch_backward(dy, x, scale, mean, rstd, rms)


@torch.library.impl("fastvid::norm_modulate", "CPU")
def _(x, shift, scale, rms, eps, dtype):
    compiled = native.loaded() and cpu.compiled_serves(x.dtype, scale.dtype, dtype)
    announce("norm_modulate", "C++" if compiled else "PyTorch")
    forward = cpu.compiled_forward if compiled else cpu.forward
    return forward(x, shift, scale, rms, eps, dtype)


@torch.library.impl("fastvid::norm_modulate_backward", "CPU")
def _(dy, x, scale, mean, rstd, rms):
    compiled = native.loaded() and cpu.compiled_serves(x.dtype, scale.dtype, dy.dtype)
    announce("norm_modulate_backward", "C++" if compiled else "PyTorch")
    backward = cpu.compiled_backward if compiled else cpu.backward
    return backward(dy, x, scale, mean, rstd, rms)


@torch.library.register_fake("fastvid::norm_modulate")
def _(x, shift, scale, rms, eps, dtype):
    rows = x.shape[:2]
    stats = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty((0,) if rms else rows, dtype=stats),
        x.new_empty(rows, dtype=stats),
    )


@torch.library.register_fake("fastvid::norm_modulate_backward")
def _(dy, x, scale, mean, rstd, rms):
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _save(ctx, inputs, output):
    x, _, scale, ctx.rms, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, scale, mean, rstd)


def _gradient(ctx, dy, _dmean, _drstd):
    return *_norm_modulate_backward(dy, *ctx.saved_tensors, ctx.rms), None, None, None


torch.library.register_autograd("fastvid::norm_modulate", _gradient, setup_context=_save)
refuse_second("norm_modulate")
_norm_modulate = torch.ops.fastvid.norm_modulate.default
_norm_modulate_backward = torch.ops.fastvid.norm_modulate_backward.default


def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, *, rms: bool = False, eps: float = 1e-6
) -> Tensor:
    """Normalise tokens, then scale and shift them: `norm(x) * (1 + scale) + shift`.

    The norm has no weights of its own. Sums are float32 whatever the dtypes, the result is
    rounded once, and the gradients are the same bits in every run.

    Args:
        x: (B, N, D) tokens in any strides; copied first only if the last one is not 1. D <= 8192.
        shift, scale: one row of D per sample, (B, D); per frame, (B, T, D) where each of the T
            frames owns N / T neighbouring tokens; or per token, (B, N, D). B may be 1: one
            modulation for the whole batch. Same shape and dtype as each other, any float dtype.
        rms: RMSNorm instead of LayerNorm.
        eps: added to the variance (or mean square).
    Returns:
        (B, N, D), contiguous, in the dtype of `x`; inside `torch.autocast` in the autocast dtype,
        so that the linear layer behind it does not round again.
    Raises:
        TypeError: an argument is not a tensor, or its dtype is not served.
        ValueError: a shape or device is not the one above.
        NotImplementedError: D > 8192, or a second derivative is asked for.
    Source: Peebles & Xie, arXiv:2212.09748, adaLN-Zero block.
    """
    sizes = expect_shape("x", x, "B N D")
    grouped = isinstance(shift, Tensor) and shift.dim() == 3
    layout = "B|1 T D" if grouped else "B|1 D"
    sizes = expect_shape("shift", shift, layout, sizes)
    expect_shape("scale", scale, layout, sizes)
    if scale.shape != shift.shape or scale.dtype != shift.dtype:
        raise ValueError(
            f"shift and scale must agree in shape and dtype, got {tuple(shift.shape)}"
            f" {shift.dtype} and {tuple(scale.shape)} {scale.dtype}"
        )
    N, D, T = sizes["N"], sizes["D"], sizes.get("T", 1)
    if T != N and (T == 0 or N % T):
        raise ValueError(f"shift must have a number of frames T that divides N={N}, got T={T}")
    if D > 8192:
        raise NotImplementedError(f"x must have D <= 8192, got D={D}")
    for name, tensor in (("x", x), ("shift", shift)):
        expect_float(name, tensor)
    expect_device("shift", shift, "x", x)
    expect_device("scale", scale, "x", x)
    return _norm_modulate(x, shift, scale, rms, eps, _result_dtype(x))[0]


def _result_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast and x.dtype != torch.float64 else x.dtype
