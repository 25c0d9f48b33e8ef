"""The registered ops of the room, their gradients, and the public functions."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._shared import native
from .._shared.checks import expect_device, expect_float, expect_shape
from .._shared.derivatives import refuse_second
from .._shared.paths import announce
from .._shared.visibility import FrameLayout
from . import compiled, cpu

torch.library.define(
    "fastvid::norm_modulate",
    "(Tensor x, Tensor shift, Tensor scale, Tensor? starts, bool rms, float eps, ScalarType dtype)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "fastvid::norm_modulate_backward",
    "(Tensor dy, Tensor x, Tensor scale, Tensor? starts, Tensor mean, Tensor rstd, bool rms)"
    " -> (Tensor dx, Tensor dshift, Tensor dscale)",
)
torch.library.define(
    "fastvid::gated_residual", "(Tensor x, Tensor h, Tensor gate, Tensor? starts) -> Tensor"
)
torch.library.define(
    "fastvid::gated_residual_backward",
    "(Tensor dsum, Tensor h, Tensor gate, Tensor? starts) -> (Tensor dh, Tensor dgate)",
)
torch.library.define(
    "fastvid::gated_residual_norm_modulate",
    "(Tensor x, Tensor h, Tensor? gate, Tensor shift, Tensor scale, Tensor? starts, bool rms,"
    " float eps, ScalarType dtype) -> (Tensor total, Tensor y, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "fastvid::gated_residual_norm_modulate_backward",
    "(Tensor dsum, Tensor dy, Tensor total, Tensor? h, Tensor? gate, Tensor scale, Tensor? starts,"
    " Tensor mean, Tensor rstd, bool rms)"
    " -> (Tensor dx, Tensor dh, Tensor dgate, Tensor dshift, Tensor dscale)",
)


# ---- on the GPU


@torch.library.impl("fastvid::norm_modulate", "CUDA")
def _(x, shift, scale, starts, rms, eps, dtype):
    from .kernel import launch_forward  # Triton loads at the first launch

    announce("norm_modulate", "Triton")
    with torch.cuda.device_of(x):
        return launch_forward(x, shift, scale, rms, eps, dtype, starts)


@torch.library.impl("fastvid::norm_modulate_backward", "CUDA")
def _(dy, x, scale, starts, mean, rstd, rms):
    from .kernel import launch_backward

    announce("norm_modulate_backward", "Triton")
    with torch.cuda.device_of(x):
        return launch_backward(dy, x, scale, mean, rstd, rms, starts)


@torch.library.impl("fastvid::gated_residual", "CUDA")
def _(x, h, gate, starts):
    announce("gated_residual", "PyTorch")  # one pass already
    return cpu.add(x, h, gate, starts)


@torch.library.impl("fastvid::gated_residual_backward", "CUDA")
def _(dsum, h, gate, starts):
    from .residual import launch_residual_backward

    announce("gated_residual_backward", "Triton")
    with torch.cuda.device_of(h):
        return launch_residual_backward(dsum, h, gate, starts)


@torch.library.impl("fastvid::gated_residual_norm_modulate", "CUDA")
def _(x, h, gate, shift, scale, starts, rms, eps, dtype):
    from .residual import launch_forward

    announce("gated_residual_norm_modulate", "Triton")
    with torch.cuda.device_of(x):
        return launch_forward(x, h, gate, shift, scale, rms, eps, dtype, starts)


@torch.library.impl("fastvid::gated_residual_norm_modulate_backward", "CUDA")
def _(dsum, dy, total, h, gate, scale, starts, mean, rstd, rms):
    from .residual import launch_backward

    announce("gated_residual_norm_modulate_backward", "Triton")
    with torch.cuda.device_of(total):
        return launch_backward(dsum, dy, total, h, gate, scale, mean, rstd, rms, starts)


# ---- on the CPU


@torch.library.impl("fastvid::norm_modulate", "CPU")
def _(x, shift, scale, starts, rms, eps, dtype):
    path = _cpu_path("norm_modulate", x.dtype, {dtype}, shift)
    return path.forward(x, None, None, shift, scale, starts, rms, eps, dtype)[1:]


@torch.library.impl("fastvid::norm_modulate_backward", "CPU")
def _(dy, x, scale, starts, mean, rstd, rms):
    path = _cpu_path("norm_modulate_backward", x.dtype, {dy.dtype}, scale)
    found = path.backward(None, dy, x, None, None, scale, starts, mean, rstd, rms)
    return found[0], *found[3:]


@torch.library.impl("fastvid::gated_residual", "CPU")
def _(x, h, gate, starts):
    announce("gated_residual", "PyTorch")
    return cpu.add(x, h, gate, starts)


@torch.library.impl("fastvid::gated_residual_backward", "CPU")
def _(dsum, h, gate, starts):
    path = _cpu_path("gated_residual_backward", dsum.dtype, {h.dtype}, gate)
    return path.add_backward(dsum, h, gate, starts)


@torch.library.impl("fastvid::gated_residual_norm_modulate", "CPU")
def _(x, h, gate, shift, scale, starts, rms, eps, dtype):
    path = _cpu_path("gated_residual_norm_modulate", x.dtype, {h.dtype, dtype}, gate, shift)
    return path.forward(x, h, gate, shift, scale, starts, rms, eps, dtype)


@torch.library.impl("fastvid::gated_residual_norm_modulate_backward", "CPU")
def _(dsum, dy, total, h, gate, scale, starts, mean, rstd, rms):
    branch = {dy.dtype} if h is None else {dy.dtype, h.dtype}
    path = _cpu_path("gated_residual_norm_modulate_backward", total.dtype, branch, gate, scale)
    return path.backward(dsum, dy, total, h, gate, scale, starts, mean, rstd, rms)


def _cpu_path(op, *dtypes):
    """The module that computes `op`: the C++ where it is there and knows all dtypes."""
    found = native.loaded() and compiled.serves(*dtypes)
    announce(op, "C++" if found else "PyTorch")
    return compiled if found else cpu


# ---- what comes out, without computing it


@torch.library.register_fake("fastvid::norm_modulate")
def _(x, shift, scale, starts, rms, eps, dtype):
    rows = x.shape[:2]
    stats = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty((0,) if rms else rows, dtype=stats),
        x.new_empty(rows, dtype=stats),
    )


@torch.library.register_fake("fastvid::norm_modulate_backward")
def _(dy, x, scale, starts, mean, rstd, rms):
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


@torch.library.register_fake("fastvid::gated_residual")
def _(x, h, gate, starts):
    return x.new_empty(x.shape)


@torch.library.register_fake("fastvid::gated_residual_backward")
def _(dsum, h, gate, starts):
    return h.new_empty(h.shape), gate.new_empty(gate.shape)


@torch.library.register_fake("fastvid::gated_residual_norm_modulate")
def _(x, h, gate, shift, scale, starts, rms, eps, dtype):
    return x.new_empty(x.shape), *_norm_modulate(x, shift, scale, starts, rms, eps, dtype)


@torch.library.register_fake("fastvid::gated_residual_norm_modulate_backward")
def _(dsum, dy, total, h, gate, scale, starts, mean, rstd, rms):
    dh, dgate = (total.new_empty(0) if t is None else t.new_empty(t.shape) for t in (h, gate))
    dscale = scale.new_empty(scale.shape)
    return total.new_empty(total.shape), dh, dgate, dscale, torch.empty_like(dscale)


# ---- gradients


def _save_norm(ctx, inputs, output):
    x, _, scale, starts, ctx.rms, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, scale, starts, mean, rstd)


def _norm_gradient(ctx, dy, _dmean, _drstd):
    return *_norm_modulate_backward(dy, *ctx.saved_tensors, ctx.rms), *[None] * 4


def _save_residual(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _residual_gradient(ctx, dsum):
    return dsum, *_gated_residual_backward(dsum, *ctx.saved_tensors), None


def _save_both(ctx, inputs, output):
    _, h, gate, _, scale, starts, ctx.rms, _, _ = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.h_dtype = h.dtype
    # h is wanted for the gradient of the gate only.
    ctx.save_for_backward(total, None if gate is None else h, gate, scale, starts, mean, rstd)


def _both_gradient(ctx, dsum, dy, _dmean, _drstd):
    saved = ctx.saved_tensors  # once: a checkpointed block hands them out a single time
    dx, dh, dgate, dshift, dscale = _both_backward(dsum, dy, *saved, ctx.rms)
    if saved[2] is None:
        dh, dgate = dx.to(ctx.h_dtype), None
    return dx, dh, dgate, dshift, dscale, *[None] * 4


for _op, _gradient, _save in (
    ("norm_modulate", _norm_gradient, _save_norm),
    ("gated_residual", _residual_gradient, _save_residual),
    ("gated_residual_norm_modulate", _both_gradient, _save_both),
):
    torch.library.register_autograd(f"fastvid::{_op}", _gradient, setup_context=_save)
    refuse_second(_op)

_norm_modulate = torch.ops.fastvid.norm_modulate.default
_norm_modulate_backward = torch.ops.fastvid.norm_modulate_backward.default
_gated_residual = torch.ops.fastvid.gated_residual.default
_gated_residual_backward = torch.ops.fastvid.gated_residual_backward.default
_both = torch.ops.fastvid.gated_residual_norm_modulate.default
_both_backward = torch.ops.fastvid.gated_residual_norm_modulate_backward.default


# ---- the public functions


def norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    frames: FrameLayout | None = None,
    rms: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Normalise tokens, then scale and shift them: `norm(x) * (1 + scale) + shift`.

    The norm has no weights of its own. Sums are float32 whatever the dtypes, the result is
    rounded once, and the gradients are the same bits in every run.

    Args:
        x: (B, N, D) tokens in any strides; copied first only if the last one is not 1. D <= 8192.
        shift, scale: one row of D per sample, (B, D); per frame, (B, T, D) where each of the T
            frames owns N / T neighbouring tokens; or per token, (B, N, D). B may be 1: one
            modulation for the whole batch. Same shape and dtype as each other, any float dtype.
        frames: how many tokens each of the T frames of (B, T, D) rows owns, where they are not
            equal; tokens behind the last frame are normalised only.
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
    _expect_modulation(_expect_tokens(x), x, shift, scale, frames)
    starts, shift, scale = _groups(frames, x, shift, scale)
    return _norm_modulate(x, shift, scale, starts, rms, eps, _result_dtype(x))[0]


def gated_residual(
    x: Tensor, h: Tensor, gate: Tensor, *, frames: FrameLayout | None = None
) -> Tensor:
    """Add a branch through its gate: `x + gate * h`, rounded once.

    Args:
        x: (B, N, D), the residual stream, in any strides. D <= 8192.
        h: (B, N, D), what the branch made of it, in any float dtype and strides.
        gate: one row of D per sample, (B, D), frame, (B, T, D), or token, (B, N, D), as the
            modulation of `norm_modulate`. B may be 1. Any float dtype.
        frames: as in `norm_modulate`; tokens behind the last frame stay as they are.
    Returns:
        (B, N, D), contiguous, in the dtype of `x`.
    Raises:
        TypeError: an argument is not a tensor, or its dtype is not served.
        ValueError: a shape or device is not the one above.
        NotImplementedError: D > 8192, or a second derivative is asked for.
    Source: Peebles & Xie, arXiv:2212.09748, adaLN-Zero block.
    """
    sizes = _expect_tokens(x)
    _expect_branch(sizes, x, h)
    _expect_rows("gate", sizes, x, gate, frames)
    starts, gate = _groups(frames, x, gate)
    derived = torch.is_grad_enabled() and any(t.requires_grad for t in (x, h, gate))
    if not derived and not torch.compiler.is_compiling():
        # One call of PyTorch everywhere: the dispatch of an op would double its time at 1 MB.
        announce("gated_residual", "PyTorch")
        return cpu.add(x, h, gate, starts)
    return _gated_residual(x, h, gate, starts)


def gated_residual_norm_modulate(
    x: Tensor,
    h: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    *,
    frames: FrameLayout | None = None,
    rms: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Add a branch through its gate and normalise and modulate the sum for the next one.

    `total = x + gate * h` and `norm(total) * (1 + scale) + shift` in one pass over x and h; the
    gradients of all five in one pass too. The second result is, bit for bit, `norm_modulate` of
    the first on the same path.

    Args:
        x: (B, N, D), the residual stream, in any strides. D <= 8192.
        h: (B, N, D), what the branch made of it, in any float dtype and strides.
        gate: one row of D per sample, (B, D), frame, (B, T, D), or token, (B, N, D): as `shift`,
            but that either may have a batch of 1. Any float dtype. None adds `h` as it is.
        shift, scale, frames, rms, eps: as in `norm_modulate`; `frames` is of the gate too.
    Returns:
        The sum (B, N, D), contiguous, in the dtype of `x`, and the modulated norm (B, N, D),
        contiguous, in the dtype of `x` or inside `torch.autocast` in the autocast dtype.
    Raises:
        TypeError: an argument is not a tensor, or its dtype is not served.
        ValueError: a shape or device is not the one above.
        NotImplementedError: D > 8192, or a second derivative is asked for.
    Source: Peebles & Xie, arXiv:2212.09748, adaLN-Zero block.
    """
    sizes = _expect_tokens(x)
    _expect_branch(sizes, x, h)
    _expect_modulation(sizes, x, shift, scale, frames)
    if gate is not None:
        _expect_rows("gate", sizes, x, gate, frames)
        if gate.shape[1:] != shift.shape[1:]:
            raise ValueError(
                f"gate must have the rows of shift, {tuple(shift.shape)} but for its batch,"
                f" got {tuple(gate.shape)}"
            )
    starts, gate, shift, scale = _groups(frames, x, gate, shift, scale)
    return _both(x, h, gate, shift, scale, starts, rms, eps, _result_dtype(x))[:2]


def _expect_tokens(x: Tensor) -> dict[str, int]:
    sizes = expect_shape("x", x, "B N D")
    if sizes["D"] > 8192:
        raise NotImplementedError(f"x must have D <= 8192, got D={sizes['D']}")
    expect_float("x", x)
    return sizes


def _expect_branch(sizes: dict[str, int], x: Tensor, h: Tensor) -> None:
    expect_shape("h", h, "B N D", sizes)
    expect_float("h", h)
    expect_device("h", h, "x", x)


def _groups(frames: FrameLayout | None, x: Tensor, *rows: Tensor | None) -> Any:
    """The first token of each frame (B|1, T + 2), and the rows with one of zeros behind them, for
    the tokens of no frame; without `frames` None and the rows."""
    if frames is None:
        return None, *rows
    starts = pad(frames.offsets, (0, 1), value=torch.iinfo(torch.int32).max).clamp(max=x.shape[1])
    return starts, *(row if row is None else pad(row, (0, 0, 0, 1)) for row in rows)


def _expect_frames(sizes: dict[str, int], x: Tensor, frames: FrameLayout) -> None:
    if not isinstance(frames, FrameLayout):
        raise TypeError(f"frames must be a FrameLayout, got {type(frames).__name__}")
    expect_shape("frames.lengths", frames.lengths, "B|1 T", sizes)
    expect_device("frames", frames.lengths, "x", x)
    owned = None if torch.compiler.is_compiling() else frames.tokens
    if owned is not None and owned > sizes["N"]:
        raise ValueError(f"frames must own at most N={sizes['N']} tokens, got {owned}")


def _expect_rows(
    name: str, sizes: dict[str, int], x: Tensor, rows: Tensor, frames: FrameLayout | None
) -> None:
    """Check one row of D per sample, frame or token."""
    grouped = (isinstance(rows, Tensor) and rows.dim() == 3) or frames is not None
    sizes = expect_shape(name, rows, "B|1 T D" if grouped else "B|1 D", sizes)
    N, T = sizes["N"], sizes.get("T", 1)
    if frames is not None:
        _expect_frames(sizes, x, frames)
    elif T != N and (T == 0 or N % T):
        raise ValueError(f"{name} must have a number of frames T that divides N={N}, got T={T}")
    expect_float(name, rows)
    expect_device(name, rows, "x", x)


def _expect_modulation(
    sizes: dict[str, int], x: Tensor, shift: Tensor, scale: Tensor, frames: FrameLayout | None
) -> None:
    _expect_rows("shift", sizes, x, shift, frames)
    if shift.dim() == 3:
        sizes = sizes | {"T": shift.shape[1]}
    expect_shape("scale", scale, "B|1 T D" if shift.dim() == 3 else "B|1 D", sizes)
    if scale.shape != shift.shape or scale.dtype != shift.dtype:
        raise ValueError(
            f"shift and scale must agree in shape and dtype, got {tuple(shift.shape)}"
            f" {shift.dtype} and {tuple(scale.shape)} {scale.dtype}"
        )
    expect_device("scale", scale, "x", x)


def _result_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast and x.dtype != torch.float64 else x.dtype
