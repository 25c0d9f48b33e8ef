"""`noising` and `masked_mse`: the registered ops, their gradients, and the public functions."""

from typing import Literal, get_args

import torch
from torch import Tensor

from .._shared import native, philox
from .._shared.checks import expect_device, expect_float, expect_shape
from .._shared.derivatives import refuse_second
from .._shared.paths import announce
from .._shared.planes import expect_known
from . import cpu, reference

Target = Literal["eps", "v", "flow", "x0"]
Average = Literal["unknown", "all"]
_TARGETS, _AVERAGES = get_args(Target), get_args(Average)

# Levels are (B|1, T|1). Either `noise` or `seeds` (B,) is given. `target` "none" writes no second
# tensor: it comes back empty, as does `eps`, which only a gradient by drawn noise would need.
torch.library.define(
    "fastvid::noising",
    "(Tensor x0, Tensor alpha, Tensor sigma, Tensor? noise, Tensor? seeds, SymInt stream,"
    " Tensor? known, Tensor? known_alpha, Tensor? known_sigma, str target)"
    " -> (Tensor noisy, Tensor target)",
)
# `weight` is one over the divisor of a sample's sum, (B,), kept for the gradient.
torch.library.define(
    "fastvid::masked_mse",
    "(Tensor pred, Tensor target, Tensor? known, str average) -> (Tensor loss, Tensor weight)",
)
torch.library.define(
    "fastvid::masked_mse_backward",
    "(Tensor dloss, Tensor pred, Tensor target, Tensor? known, Tensor weight) -> Tensor",
)


@torch.library.impl("fastvid::noising", "CUDA")
def _(x0, *rest):
    from .kernel import launch_noising  # Triton loads at the first launch

    announce("noising", "Triton")
    with torch.cuda.device_of(x0):
        return launch_noising(x0, *rest)


@torch.library.impl("fastvid::masked_mse", "CUDA")
def _(pred, target, known, average):
    from .kernel import launch_mse

    announce("masked_mse", "Triton")
    with torch.cuda.device_of(pred):
        return launch_mse(pred, target, known, average)


@torch.library.impl("fastvid::masked_mse_backward", "CUDA")
def _(dloss, pred, target, known, weight):
    from .kernel import launch_mse_backward

    announce("masked_mse_backward", "Triton")
    with torch.cuda.device_of(pred):
        return launch_mse_backward(dloss, pred, target, known, weight)


@torch.library.impl("fastvid::noising", "CPU")
def _(x0, alpha, sigma, noise, *rest):
    compiled = native.loaded() and cpu.compiled_serves(x0, noise)
    announce("noising", "C++" if compiled else "PyTorch")
    return (cpu.compiled_noising if compiled else cpu.noising)(x0, alpha, sigma, noise, *rest)


@torch.library.impl("fastvid::masked_mse", "CPU")
def _(pred, target, known, average):
    compiled = native.loaded() and cpu.compiled_serves(pred, target)
    announce("masked_mse", "C++" if compiled else "PyTorch")
    return (cpu.compiled_mse if compiled else cpu.mse)(pred, target, known, average)


@torch.library.impl("fastvid::masked_mse_backward", "CPU")
def _(dloss, pred, target, known, weight):
    compiled = native.loaded() and cpu.compiled_serves(pred, target)
    announce("masked_mse_backward", "C++" if compiled else "PyTorch")
    backward = cpu.compiled_mse_backward if compiled else cpu.mse_backward
    return backward(dloss, pred, target, known, weight)


@torch.library.register_fake("fastvid::noising")
def _(x0, alpha, sigma, noise, seeds, stream, known, known_alpha, known_sigma, target):
    return x0.new_empty(x0.shape), x0.new_empty((0,) if target == "none" else x0.shape)


@torch.library.register_fake("fastvid::masked_mse")
def _(pred, target, known, average):
    sums = cpu.accumulator(pred, target)
    return pred.new_empty(pred.shape[0], dtype=sums), pred.new_empty(pred.shape[0], dtype=sums)


@torch.library.register_fake("fastvid::masked_mse_backward")
def _(dloss, pred, target, known, weight):
    return pred.new_empty(pred.shape)


def _save_noising(ctx, inputs, output):
    _, alpha, sigma, noise, _, _, known, known_alpha, known_sigma, ctx.target = inputs
    ctx.noise_dtype = None if noise is None else noise.dtype
    ctx.save_for_backward(alpha, sigma, known, known_alpha, known_sigma)


def _noising_gradient(ctx, dnoisy, dtarget):
    """In plain PyTorch: latents are data nearly always, and data has no gradient."""
    if ctx.target == "none":
        dtarget = torch.zeros_like(dnoisy)
    target = "eps" if ctx.target == "none" else ctx.target
    wide = torch.promote_types(dnoisy.dtype, torch.float32)
    alpha, sigma, known, known_alpha, known_sigma = ctx.saved_tensors
    dx0, dnoise = reference.noising_backward(
        dnoisy.to(wide),
        dtarget.to(wide),
        alpha,
        sigma,
        known,
        known_alpha,
        known_sigma,
        target=target,
    )
    given = None if ctx.noise_dtype is None else dnoise.to(ctx.noise_dtype)
    return dx0.to(dnoisy.dtype), None, None, given, *(None,) * 6


def _save_mse(ctx, inputs, output):
    pred, target, known, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(pred, target, known, output[1])


def _mse_gradient(ctx, dloss, _dweight):
    saved = ctx.saved_tensors  # once: a checkpointed block hands them out a single time
    dpred = _masked_mse_backward(dloss, *saved)
    dtarget = (-dpred).to(saved[1].dtype) if ctx.needs_input_grad[1] else None
    return dpred, dtarget, None, None


torch.library.register_autograd("fastvid::noising", _noising_gradient, setup_context=_save_noising)
torch.library.register_autograd("fastvid::masked_mse", _mse_gradient, setup_context=_save_mse)
refuse_second("masked_mse")
_noising = torch.ops.fastvid.noising.default
_masked_mse = torch.ops.fastvid.masked_mse.default
_masked_mse_backward = torch.ops.fastvid.masked_mse_backward.default


def noising(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    stream: int = 0,
    known: Tensor | None = None,
    known_level: tuple[Tensor, Tensor] | None = None,
    target: Target = "v",
) -> tuple[Tensor, Tensor]:
    """The forward process and its target in one pass: `noisy = alpha * x0 + sigma * eps`.

    Known cells stay clean, bit for bit, or get a level of their own. Either the noise is given, or
    it is drawn in the kernel by number: the same seed and stream give the same noise on any device,
    and a sample's does not depend on its batch.

    Args:
        x0: (B, C, T, H, W) clean latents. Views of channels, frames or an expanded batch are read
            where they lie; a copy is made only where an (H, W) plane is scattered.
        alpha, sigma: float32 (or float64), factors of data and noise, both (B,) or (1,), or per
            frame (B or 1, T). For flow matching `1 - sigma` and `sigma`.
        noise: (B, C, T, H, W) standard normal, dtype of `x0`.
        seed: instead of `noise`. An int or int64 of shape () or (1,): sample b draws with
            `seed + b`; or int64 (B,). On a GPU a tensor is not waited for.
        stream: the number of the draw, such as the training step, in [0, 2^32).
        known: bool (B or 1, T) or (B or 1, T, H, W), True = given. None: nothing is.
        known_level: (alpha, sigma) of known cells, shaped as those above. None: clean, (1, 0).
        target: `"eps"`, `"v"` = alpha * eps - sigma * x0, `"flow"` = eps - x0, or `"x0"`, at the
            level of each cell.
    Returns:
        noisy, target: (B, C, T, H, W), dtype of `x0`. Both are contiguous, but a target that was
        given, `x0` or `noise`, is that tensor itself. Differentiable in `x0` and `noise`.
    Raises:
        TypeError, ValueError: an argument is not as above, or not exactly one of noise and seed.
    Source: Ho et al., arXiv:2006.11239; Salimans & Ho, arXiv:2202.00512 (v); Lipman et al.,
        arXiv:2210.02747 (flow); known cells: Lu et al., arXiv:2305.13311.
    """
    sizes = expect_shape("x0", x0, "B C T H W")
    expect_float("x0", x0)
    if target not in _TARGETS:
        raise ValueError(f"target must be eps, v, flow or x0, got {target!r}")
    if (noise is None) == (seed is None):
        came = "neither" if noise is None else "both"
        raise ValueError(f"noise or seed must be given, and not both, got {came}")
    seeds = None
    if noise is not None:
        expect_shape("noise", noise, "B C T H W", sizes)
        if noise.dtype != x0.dtype:
            raise TypeError(f"noise must have the dtype of x0, {x0.dtype}, got {noise.dtype}")
        expect_device("noise", noise, "x0", x0)
    elif seed is not None:
        seeds = philox.sample_seeds(seed, sizes["B"], x0.device)
    philox.expect_stream(stream)
    alpha, sigma = _levels("alpha", alpha, "sigma", sigma, x0, sizes)
    known_alpha = known_sigma = None
    if known is not None:
        expect_known(known, "x0", x0)
    if known_level is not None:
        if known is None:
            raise ValueError("known must be given with known_level, got None")
        if not isinstance(known_level, tuple | list) or len(known_level) != 2:
            raise TypeError(
                f"known_level must be a pair (alpha, sigma), got {type(known_level).__name__}"
            )
        names = "known_level[0]", "known_level[1]"
        known_alpha, known_sigma = _levels(
            names[0], known_level[0], names[1], known_level[1], x0, sizes
        )
    given = target == "x0" or (target == "eps" and noise is not None)
    noisy, made = _noising(
        x0, alpha, sigma, noise, seeds, stream, known, known_alpha, known_sigma,
        "none" if given else target,
    )  # fmt: skip
    if not given:
        return noisy, made
    return noisy, x0 if target == "x0" or noise is None else noise


def _levels(
    name: str, alpha: Tensor, other: str, sigma: Tensor, x0: Tensor, sizes: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """Two levels as (B|1, T|1), contiguous; `sizes` are those of `x0`."""
    for each, level in ((name, alpha), (other, sigma)):
        per_frame = isinstance(level, Tensor) and level.dim() == 2
        expect_shape(each, level, "B|1 T" if per_frame else "B|1", sizes)
        if level.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{each} must be float32 or float64, got {level.dtype}")
        expect_device(each, level, "x0", x0)
    if alpha.shape != sigma.shape or alpha.dtype != sigma.dtype:
        raise ValueError(
            f"{name} and {other} must agree in shape and dtype, got {tuple(alpha.shape)}"
            f" {alpha.dtype} and {tuple(sigma.shape)} {sigma.dtype}"
        )
    if alpha.dim() == 1:
        return alpha.contiguous().unsqueeze(1), sigma.contiguous().unsqueeze(1)
    return alpha.contiguous(), sigma.contiguous()


def masked_mse(
    pred: Tensor, target: Tensor, known: Tensor | None = None, *, average: Average = "unknown"
) -> Tensor:
    """Mean square of `pred - target` over what is to be generated, one number per sample.

    One pass forward and one backward; sums are taken in a fixed order, the same bits in every run
    (float32, in C++ over pieces in float32 and over these in float64). Known cells are never looked
    at and get a gradient of 0.

    Args:
        pred: (B, C, T, H, W), such as the first C channels of a model's output, a view.
        target: (B, C, T, H, W), any float dtype.
        known: bool (B or 1, T) or (B or 1, T, H, W), True = given. None: nothing is.
        average: `"unknown"`: the mean over unknown cells (MarDini). `"all"`: their squares are
            summed and divided by the count of all cells, so the loss follows their share (VDT).
    Returns:
        (B,) float32 (float64 for float64); `.mean()` is the loss of the batch. NaN for a sample in
        which everything is known, never a loss of 0. Differentiable once, in `pred` and `target`.
    Raises:
        TypeError, ValueError: an argument is not as above.
        NotImplementedError: a second derivative is asked for.
    Source: Lu et al., arXiv:2305.13311 ("all"); Liu et al., arXiv:2410.20280 ("unknown").
    """
    sizes = expect_shape("pred", pred, "B C T H W")
    expect_shape("target", target, "B C T H W", sizes)
    expect_float("pred", pred)
    expect_float("target", target)
    expect_device("target", target, "pred", pred)
    if average not in _AVERAGES:
        raise ValueError(f"average must be unknown or all, got {average!r}")
    if known is not None:
        expect_known(known, "pred", pred)
    return _masked_mse(pred, target, known, average)[0]
