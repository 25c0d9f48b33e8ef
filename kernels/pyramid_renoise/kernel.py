"""The Triton kernels of the pyramid's ops, and their launchers.

A program takes a piece of one plane of 2 x 2 blocks (`_shared/planes_kernel.py`): number p of the
small plane is the block at row p // W, column p % W. Its four numbers are two pairs that lie
together in the large plane, and are read and written as pairs.
"""

import triton
import triton.language as tl
from torch import Tensor

from .._shared.philox_kernel import normals
from .._shared.planes import pieces, planes, steps
from .._shared.planes_kernel import place
from .._shared.variants import Variant
from .cpu import factors

DRAWN, NORMALS, BLOCKS = 0, 1, 2  # where the noise of `_renoise` comes from


@triton.jit
def _numbers(block, BLOCK: tl.constexpr):
    """The numbers of a piece, int32: they are divided by W, which is slow in int64."""
    return block.to(tl.int32) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _pairs(p, W):
    """Places of the upper pairs of blocks p in the large plane, (BLOCK, 2); lower ones: + 2 W."""
    return (p // W * (4 * W) + p % W * 2)[:, None] + tl.arange(0, 2)[None, :]


@triton.jit(do_not_specialize=["C", "T", "blocks", "stream"])
def _renoise(
    x_ptr, noise_ptr, seeds_ptr, out_ptr, alpha, beta, d0, d1, d2, d3, l0, l1, l2,
    C, T, HW, W, blocks, x_b, x_c, x_t, stream, SOURCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, c, t, block = place(C, T, blocks)
    p = _numbers(block, BLOCK)
    live = p < HW
    x = tl.load(x_ptr + b * x_b + c * x_c + t * x_t + p, mask=live, other=0.0)
    mean = alpha * x.to(tl.float32)
    large = tl.program_id(0).to(tl.int64) // blocks * (4 * HW)
    upper = large + _pairs(p, W)
    pair = live[:, None]
    if SOURCE == 2:
        top = tl.load(noise_ptr + upper, mask=pair, other=0.0).to(tl.float32)
        bottom = tl.load(noise_ptr + upper + 2 * W, mask=pair, other=0.0).to(tl.float32)
        top = mean[:, None] + beta * top
        bottom = mean[:, None] + beta * bottom
    else:
        if SOURCE == 1:
            lanes = large + p.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
            four = tl.load(noise_ptr + lanes, mask=pair, other=0.0).to(tl.float32)
            even, odd = tl.split(tl.reshape(four, [BLOCK, 2, 2]))
            z0, z2 = tl.split(even)
            z1, z3 = tl.split(odd)
        else:
            index = (c * T + t) * HW + p.to(tl.int64)
            z0, z1, z2, z3 = normals(tl.load(seeds_ptr + b), index, stream)
        y0 = mean + d0 * z0
        mean += l0 * z0  # of the number to come, given those before it
        y1 = mean + d1 * z1
        mean += l1 * z1
        y2 = mean + d2 * z2
        y3 = mean + l2 * z2 + d3 * z3
        top, bottom = tl.join(y0, y1), tl.join(y2, y3)
    tl.store(out_ptr + upper, top.to(x.dtype), mask=pair)
    tl.store(out_ptr + upper + 2 * W, bottom.to(x.dtype), mask=pair)


@triton.jit(do_not_specialize=["C", "T", "blocks"])
def _halve(
    x_ptr, out_ptr, factor, C, T, HW, W, blocks, x_b, x_c, x_t, BLOCK: tl.constexpr
):  # fmt: skip
    b, c, t, block = place(C, T, blocks)
    p = _numbers(block, BLOCK)
    live = p < HW
    upper = x_ptr + b * x_b + c * x_c + t * x_t + _pairs(p, W)
    top = tl.load(upper, mask=live[:, None], other=0.0)
    bottom = tl.load(upper + 2 * W, mask=live[:, None], other=0.0)
    mean = factor * tl.sum(top.to(tl.float32) + bottom.to(tl.float32), axis=1)
    at = tl.program_id(0).to(tl.int64) // blocks * HW + p
    tl.store(out_ptr + at, mean.to(top.dtype), mask=live)


@triton.jit(do_not_specialize=["C", "T", "blocks"])
def _endpoints(
    x_ptr, lower_ptr, noise_ptr, ratio_ptr, start_ptr, end_ptr, sample_ptr, target_ptr,
    start_sigma, end_sigma, C, T, HW, W, blocks, x_b, x_c, x_t, lower_b, lower_c, lower_t,
    noise_b, noise_c, noise_t, LOWER: tl.constexpr, ENDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, c, t, block = place(C, T, blocks)
    p = _numbers(block, BLOCK)
    live = p < HW
    x = tl.load(x_ptr + b * x_b + c * x_c + t * x_t + p, mask=live, other=0.0)
    eps = tl.load(noise_ptr + b * noise_b + c * noise_c + t * noise_t + p, mask=live, other=0.0)
    eps = eps.to(tl.float32)
    start = start_sigma * eps
    if LOWER:
        under = p // W // 2 * (W // 2) + p % W // 2
        at = lower_ptr + b * lower_b + c * lower_c + t * lower_t + under
        start += (1 - start_sigma) * tl.load(at, mask=live, other=0.0).to(tl.float32)
    end = end_sigma * eps + (1 - end_sigma) * x.to(tl.float32)
    velocity = start - end
    at = tl.program_id(0).to(tl.int64) // blocks * HW + p
    tl.store(sample_ptr + at, (end + tl.load(ratio_ptr + b) * velocity).to(x.dtype), mask=live)
    tl.store(target_ptr + at, velocity.to(x.dtype), mask=live)
    if ENDS:
        tl.store(start_ptr + at, start.to(x.dtype), mask=live)
        tl.store(end_ptr + at, end.to(x.dtype), mask=live)


def launch_renoise(
    x: Tensor,
    alpha: float,
    beta: float,
    gamma: float,
    noise: Tensor | None,
    seeds: Tensor | None,
    stream: int,
) -> Tensor:
    """The next stage's start, contiguous, in the dtype of x."""
    B, C, T, H, W = x.shape
    out = x.new_empty(B, C, T, 2 * H, 2 * W)
    if out.numel() == 0:
        return out
    _expect_plane(out)
    source = DRAWN if noise is None else NORMALS if noise.dim() == 6 else BLOCKS
    x = planes(x)
    block, warps, blocks = _pieces(H * W)
    _, *root = factors(alpha, beta, gamma)
    _renoise[(B * C * T * blocks,)](
        x, x if noise is None else noise, x if seeds is None else seeds, out, alpha, beta, *root,
        C, T, H * W, W, blocks, *steps(x, 3), stream, SOURCE=source, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out


def launch_halve(x: Tensor, factor: float) -> Tensor:
    """`factor` times the mean of every block, contiguous, in the dtype of x."""
    B, C, T, H, W = x.shape
    H, W = H // 2, W // 2
    out = x.new_empty(B, C, T, H, W)
    if out.numel() == 0:
        return out
    _expect_plane(x)
    x = planes(x)
    block, warps, blocks = _pieces(H * W)
    _halve[(B * C * T * blocks,)](
        x, out, factor / 4, C, T, H * W, W, blocks, *steps(x, 3), BLOCK=block, num_warps=warps
    )
    return out


def launch_endpoints(
    latents: Tensor,
    lower: Tensor | None,
    noise: Tensor,
    start_sigma: float,
    end_sigma: float,
    ratio: Tensor,
    endpoints: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Start and end (empty unless wanted), sample and target, contiguous, dtype of `latents`."""
    B, C, T, H, W = latents.shape
    start, end = (latents.new_empty(latents.shape if endpoints else (0,)) for _ in range(2))
    sample, target = latents.new_empty(latents.shape), latents.new_empty(latents.shape)
    if latents.numel() == 0:
        return start, end, sample, target
    _expect_plane(latents)
    latents, noise = planes(latents), planes(noise)
    below = latents if lower is None else planes(lower)
    block, warps, blocks = pieces(H * W)
    _endpoints[(B * C * T * blocks,)](
        latents, below, noise, ratio, start, end, sample, target, start_sigma, end_sigma,
        C, T, H * W, W, blocks, *steps(latents, 3), *steps(below, 3), *steps(noise, 3),
        LOWER=lower is not None, ENDS=endpoints, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return start, end, sample, target


def _expect_plane(tensor: Tensor) -> None:
    """Raise NotImplementedError where the number of a cell in its plane is no int32."""
    H, W = tensor.shape[-2:]
    if H * W >= 2**31:
        raise NotImplementedError(f"a plane must have less than 2**31 numbers, got {H} x {W}")


def _pieces(size: int) -> tuple[int, int, int]:
    """BLOCK, warps and number of pieces of a plane of 2 x 2 blocks: two blocks per thread."""
    warps = 1 if size <= 64 else 2 if size <= 128 else 4
    return 64 * warps, warps, -(-size // (64 * warps))


def _variant(name, kernel, constants, dtype="bf16", noise=None, HW=960):
    """A call on latents whose small plane has HW numbers, in rows of 16 or a multiple of it."""
    block, warps, _ = pieces(HW) if kernel is _endpoints else _pieces(HW)
    names = ("x", "lower", "start", "end", "sample", "target", "out")
    pointers = {f"{name}_ptr": dtype for name in names}
    pointers |= {"noise_ptr": noise or dtype, "seeds_ptr": "i64", "ratio_ptr": "fp32"}
    types = {name: f"*{dtype}:16" for name, dtype in pointers.items()}
    floats = "alpha beta d0 d1 d2 d3 l0 l1 l2 factor start_sigma end_sigma"
    types |= dict.fromkeys(floats.split(), "fp32")
    types |= {f"{name}_{axis}": "i32:16" for name in ("x", "lower", "noise") for axis in "bct"}
    types |= {"HW": "i32:16", "W": "i32:16"}
    types |= dict.fromkeys(("C", "T", "blocks", "stream"), "i32")
    return Variant(name, kernel, types, {"BLOCK": block} | constants, warps)


# One frame, 384p and 768p: low to mid has 240 and 960 blocks per plane, mid to high four times so.
VARIANTS = [
    _variant("renoise_drawn", _renoise, {"SOURCE": DRAWN}),
    _variant("renoise_drawn_fp32", _renoise, {"SOURCE": DRAWN}, "fp32"),
    _variant("renoise_normals", _renoise, {"SOURCE": NORMALS}),
    _variant("renoise_normals_fp32", _renoise, {"SOURCE": NORMALS}, "fp32"),
    _variant("renoise_blocks", _renoise, {"SOURCE": BLOCKS}),
    _variant("renoise_blocks_fp32", _renoise, {"SOURCE": BLOCKS}, "fp32"),
    _variant("halve", _halve, {}),
    _variant("halve_fp32", _halve, {}, "fp32"),
    _variant("endpoints", _endpoints, {"LOWER": True, "ENDS": False}),
    _variant("endpoints_fp32", _endpoints, {"LOWER": True, "ENDS": True}, "fp32"),
    _variant("endpoints_lowest", _endpoints, {"LOWER": False, "ENDS": False}),
]
