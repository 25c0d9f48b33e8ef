"""The stages of Pyramid Flow: the registered ops, their gradients, and the public functions."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._shared import philox
from .._shared.checks import expect_device, expect_float, expect_shape
from .._shared.paths import announce
from . import cpu, reference

# x is (B, C, T, H, W). `noise` is (B, C, T, 2 H, 2 W), block noise, or (B, C, T, H, W, 4), normals,
# contiguous; without it `seeds` (B,) are given.
torch.library.define(
    "fastvid::pyramid_renoise",
    "(Tensor x, float alpha, float beta, float gamma, Tensor? noise, Tensor? seeds, SymInt stream)"
    " -> Tensor",
)
torch.library.define("fastvid::pyramid_halve", "(Tensor x, float factor) -> Tensor")
# `ratio` (B,) float32, contiguous. Without `endpoints` start and end come back empty.
torch.library.define(
    "fastvid::stage_endpoints",
    "(Tensor latents, Tensor? lower, Tensor noise, float start_sigma, float end_sigma,"
    " Tensor ratio, bool endpoints) -> (Tensor start, Tensor end, Tensor sample, Tensor target)",
)


@torch.library.impl("fastvid::pyramid_renoise", "CUDA")
def _(x, *rest):
    from .kernel import launch_renoise  # Triton loads at the first launch

    announce("pyramid_renoise", "Triton")
    with torch.cuda.device_of(x):
        return launch_renoise(x, *rest)


@torch.library.impl("fastvid::pyramid_halve", "CUDA")
def _(x, factor):
    from .kernel import launch_halve

    announce("pyramid_halve", "Triton")
    with torch.cuda.device_of(x):
        return launch_halve(x, factor)


@torch.library.impl("fastvid::stage_endpoints", "CUDA")
def _(latents, *rest):
    from .kernel import launch_endpoints

    announce("stage_endpoints", "Triton")
    with torch.cuda.device_of(latents):
        return launch_endpoints(latents, *rest)


@torch.library.impl("fastvid::pyramid_renoise", "CPU")
def _(x, alpha, beta, gamma, noise, *rest):
    compiled = cpu.compiled_serves(x, noise)
    announce("pyramid_renoise", "C++" if compiled else "PyTorch")
    renoise = cpu.compiled_renoise if compiled else cpu.pyramid_renoise
    return renoise(x, alpha, beta, gamma, noise, *rest)


@torch.library.impl("fastvid::pyramid_halve", "CPU")
def _(x, factor):
    compiled = cpu.compiled_serves(x)
    announce("pyramid_halve", "C++" if compiled else "PyTorch")
    return (cpu.compiled_halve if compiled else cpu.pyramid_halve)(x, factor)


@torch.library.impl("fastvid::stage_endpoints", "CPU")
def _(latents, *rest):
    compiled = cpu.compiled_serves(latents)
    announce("stage_endpoints", "C++" if compiled else "PyTorch")
    return (cpu.compiled_endpoints if compiled else cpu.stage_endpoints)(latents, *rest)


@torch.library.register_fake("fastvid::pyramid_renoise")
def _(x, *rest):
    B, C, T, H, W = x.shape
    return x.new_empty(B, C, T, 2 * H, 2 * W)


@torch.library.register_fake("fastvid::pyramid_halve")
def _(x, factor):
    B, C, T, H, W = x.shape
    return x.new_empty(B, C, T, H // 2, W // 2)


@torch.library.register_fake("fastvid::stage_endpoints")
def _(latents, lower, noise, start_sigma, end_sigma, ratio, endpoints):
    ends = [latents.new_empty(latents.shape if endpoints else (0,)) for _ in range(2)]
    return *ends, latents.new_empty(latents.shape), latents.new_empty(latents.shape)


def _save_renoise(ctx, inputs, output):
    _, ctx.alpha, ctx.beta, ctx.gamma, noise, _, _ = inputs
    ctx.noise = None if noise is None else (noise.dtype, noise.dim() == 6)


def _renoise_gradient(ctx, dout):
    """In plain PyTorch: samplers take none."""
    dtype, normals = ctx.noise or (dout.dtype, False)
    wide = dout.to(torch.promote_types(dout.dtype, torch.float32))
    levels = ctx.alpha, ctx.beta, ctx.gamma
    dx, dnoise = reference.pyramid_renoise_backward(wide, *levels, normals)
    return dx.to(dout.dtype), None, None, None, dnoise.to(dtype) if ctx.noise else None, None, None


def _save_factor(ctx, inputs, output):
    ctx.factor = inputs[1]


def _halve_gradient(ctx, dout):
    return reference.pyramid_halve_backward(dout, ctx.factor), None


torch.library.register_autograd(
    "fastvid::pyramid_renoise", _renoise_gradient, setup_context=_save_renoise
)
torch.library.register_autograd(
    "fastvid::pyramid_halve", _halve_gradient, setup_context=_save_factor
)
_pyramid_renoise = torch.ops.fastvid.pyramid_renoise.default
_pyramid_halve = torch.ops.fastvid.pyramid_halve.default
_stage_endpoints = torch.ops.fastvid.stage_endpoints.default


def pyramid_renoise(
    x: Tensor,
    alpha: float,
    beta: float,
    *,
    gamma: float = 1 / 3,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """The jump to the next stage in one pass: `alpha * upsample(x) + beta * block noise`.

    Upsampling is nearest, twice per frame. Block noise has covariance 1 on the diagonal and -gamma
    between the four numbers of a 2 x 2 block, none between blocks; at gamma = 1/3 the four sum to
    zero. Its root is written out, so that every gamma in (0, 1/3] is exact in every dtype.

    Args:
        x: (B, C, T, H, W) or, one frame, (B, C, H, W), the end of the stage before, any float
            dtype. Views of channels, frames or an expanded batch are read where they lie.
        alpha, beta: factors of the upsampled latents and of the noise, see `diffusion.pyramid`.
        noise: of any float dtype; either the block noise, with the shape of the result, or four
            independent normals per block, (B, C, T, H, W, 4) or (B, C, H, W, 4), row by row: the
            draws of a Cholesky sampler.
        seed: instead of `noise`. An int or int64 of shape () or (1,): sample b draws with
            `seed + b`; or int64 (B,). The noise of a block depends on its seed, `stream` and place
            alone: neither on the device nor on the batch. On a GPU a tensor is not waited for.
        stream: the number of the draw, such as unit and stage, in [0, 2^32).
    Returns:
        (B, C, T, 2 H, 2 W) or (B, C, 2 H, 2 W), dtype of `x`, contiguous. Differentiable in `x` and
        `noise`.
    Raises:
        TypeError, ValueError: an argument is not as above, or not exactly one of noise and seed.
    Source: Jin et al., arXiv:2410.05954, section 3.2.2 and appendix A.
    """
    sizes = _expect_latents("x", x)
    if not 0 < gamma <= 0.33333335:  # a third that was a float32 is a little more
        raise ValueError(f"gamma must be in (0, 1/3], got {gamma}")
    if (noise is None) == (seed is None):
        came = "neither" if noise is None else "both"
        raise ValueError(f"noise or seed must be given, and not both, got {came}")
    seeds = None
    if noise is not None:
        noise = _expect_noise(noise, x, sizes)
    elif seed is not None:
        seeds = philox.sample_seeds(seed, sizes["B"], x.device)
    philox.expect_stream(stream)
    frames = x if x.dim() == 5 else x.unsqueeze(2)
    out = _pyramid_renoise(frames, alpha, beta, min(gamma, 1 / 3), noise, seeds, stream)
    return out if x.dim() == 5 else out.squeeze(2)


def latent_pyramid(latents: Tensor, stages: int) -> list[Tensor]:
    """Latents at the resolution of every stage, the lowest first: means of 2 x 2, frame by frame.

    Args:
        latents: (B, C, T, H, W) or (B, C, H, W), any float dtype, H and W divisible by
            2^(stages - 1).
        stages: at least 1.
    Returns:
        `stages` tensors, the last of them `latents` itself. Differentiable.
    Raises:
        TypeError, ValueError: an argument is not as above.
    Source: Jin et al., arXiv:2410.05954, section 3.2.
    """
    return _pyramid("latents", latents, stages, 1.0)


def noise_pyramid(noise: Tensor, stages: int) -> list[Tensor]:
    """White noise at the resolution of every stage, the lowest first: twice the means of 2 x 2.

    The mean of four independent normals has standard deviation 1/2, so that each level is standard
    normal again. Arguments, results and errors are those of `latent_pyramid`.
    """
    return _pyramid("noise", noise, stages, 2.0)


class StageEndpoints(NamedTuple):
    """A stage's two ends, a point between them, and the velocity that leads from end to start."""

    start: Tensor
    end: Tensor
    sample: Tensor
    target: Tensor


def stage_endpoints(
    latents: Tensor,
    lower: Tensor | None,
    noise: Tensor,
    *,
    start_sigma: float,
    end_sigma: float,
    ratio: Tensor,
    endpoints: bool = True,
) -> StageEndpoints:
    """What a stage trains on, in one pass.

    start = start_sigma * noise + (1 - start_sigma) * upsample(lower)
    end = end_sigma * noise + (1 - end_sigma) * latents
    sample = ratio * start + (1 - ratio) * end,  target = start - end

    Args:
        latents: (B, C, T, H, W) clean, at the resolution of the stage, any float dtype.
        lower: (B, C, T, H / 2, W / 2) clean, of the stage below; None in the lowest stage, which
            starts from noise: `start_sigma` is 1 there.
        noise: (B, C, T, H, W) standard normal, at the resolution of the stage. `lower` and `noise`
            have the dtype of `latents`.
        start_sigma, end_sigma: noise levels of the ends, see `diffusion.pyramid`.
        ratio: (B,) or (1,) float32, 1 at the start of the stage and 0 at its end.
        endpoints: False writes neither start nor end, which training does without; they come back
            empty.
    Returns:
        (B, C, T, H, W) each, dtype of `latents`. Data and noise only: there is no gradient.
    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: an argument requires a gradient while gradients are recorded.
    Source: Jin et al., arXiv:2410.05954, equations 9 to 11.
    """
    sizes = expect_shape("latents", latents, "B C T H W")
    expect_float("latents", latents)
    expect_shape("noise", noise, "B C T H W", sizes)
    others = {"noise": noise}
    if lower is not None:
        _expect_even("latents", latents, 2)
        half = {"H/2": sizes["H"] // 2, "W/2": sizes["W"] // 2}
        expect_shape("lower", lower, "B C T H/2 W/2", sizes | half)
        others["lower"] = lower
    elif start_sigma != 1:
        raise ValueError(f"start_sigma must be 1 where lower is None, got {start_sigma}")
    for name, tensor in others.items():
        if tensor.dtype != latents.dtype:
            raise TypeError(
                f"{name} must have the dtype of latents, {latents.dtype}, got {tensor.dtype}"
            )
        expect_device(name, tensor, "latents", latents)
    expect_shape("ratio", ratio, "B|1", sizes)
    if ratio.dtype != torch.float32:
        raise TypeError(f"ratio must be float32, got {ratio.dtype}")
    expect_device("ratio", ratio, "latents", latents)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (latents, lower, noise, ratio)
    ):
        raise RuntimeError(
            "stage_endpoints has no gradient: call it under torch.no_grad() or detach its arguments"
        )
    ratio = ratio.expand(sizes["B"]).contiguous()
    sigmas = start_sigma, end_sigma
    return StageEndpoints(*_stage_endpoints(latents, lower, noise, *sigmas, ratio, endpoints))


def _pyramid(name: str, tensor: Tensor, stages: int, factor: float) -> list[Tensor]:
    _expect_latents(name, tensor)
    if stages < 1:
        raise ValueError(f"stages must be at least 1, got {stages}")
    _expect_even(name, tensor, 2 ** (stages - 1))
    levels = [tensor]
    for _ in range(stages - 1):
        level = levels[0] if tensor.dim() == 5 else levels[0].unsqueeze(2)
        halved = _pyramid_halve(level, factor)
        levels.insert(0, halved if tensor.dim() == 5 else halved.squeeze(2))
    return levels


def _expect_latents(name: str, tensor: Tensor) -> dict[str, int]:
    frame = isinstance(tensor, Tensor) and tensor.dim() == 4
    sizes = expect_shape(name, tensor, "B C H W" if frame else "B C T H W")
    expect_float(name, tensor)
    return sizes


def _expect_even(name: str, tensor: Tensor, divisor: int) -> None:
    H, W = tensor.shape[-2:]
    if H % divisor or W % divisor:
        raise ValueError(f"{name} must have H and W divisible by {divisor}, got H={H} W={W}")


def _expect_noise(noise: Tensor, x: Tensor, sizes: dict[str, int]) -> Tensor:
    """The noise as the op takes it."""
    frame = x.dim() == 4
    axes = "B C" if frame else "B C T"
    double = {"2H": 2 * sizes["H"], "2W": 2 * sizes["W"]}
    if isinstance(noise, Tensor) and noise.dim() == x.dim() + 1:
        expect_shape("noise", noise, f"{axes} H W 4", sizes)
    else:
        expect_shape("noise", noise, f"{axes} 2H 2W", sizes | double)
    expect_float("noise", noise)
    expect_device("noise", noise, "x", x)
    return (noise.unsqueeze(2) if frame else noise).contiguous()
