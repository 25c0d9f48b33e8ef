"""The Triton kernels of `noising` and `masked_mse`, and their launchers.

A program takes a piece of one (H, W) plane (`_shared/planes_kernel.py`). Noise is drawn by number:
blocks start at multiples of four numbers of the sample, a counter's worth.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._shared.philox_kernel import normals
from .._shared.planes import pieces, planes, steps
from .._shared.planes_kernel import CELLS, FRAMES, known_arguments, place, unknown_numbers
from .._shared.variants import Variant


@triton.jit(do_not_specialize=["C", "T", "blocks", "stream"])
def _noising(
    x0_ptr, noise_ptr, seeds_ptr, alpha_ptr, sigma_ptr, known_ptr, known_alpha_ptr,
    known_sigma_ptr, noisy_ptr, target_ptr, C, T, HW, blocks, x0_b, x0_c, x0_t,
    noise_b, noise_c, noise_t, level_b, level_t, known_b, known_t, own_b, own_t, stream,
    DRAWN: tl.constexpr, KNOWN: tl.constexpr, OWN: tl.constexpr, TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b, c, t, block = place(C, T, blocks)
    start = (c * T + t) * HW  # of the plane in its sample
    first = start // 4 * 4 + block * BLOCK
    p = first - start + tl.arange(0, BLOCK)  # in the plane; starts below 0 where 4 straddle planes
    live = (p >= 0) & (p < HW)

    x = tl.load(x0_ptr + b * x0_b + c * x0_c + t * x0_t + p, mask=live, other=0.0)
    if DRAWN:
        index = first // 4 + tl.arange(0, BLOCK // 4).to(tl.int64)
        n0, n1, n2, n3 = normals(tl.load(seeds_ptr + b), index, stream)
        eps = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
    else:
        at = noise_ptr + b * noise_b + c * noise_c + t * noise_t + p
        eps = tl.load(at, mask=live, other=0.0).to(tl.float32)

    alpha = tl.load(alpha_ptr + b * level_b + t * level_t).to(tl.float32)
    sigma = tl.load(sigma_ptr + b * level_b + t * level_t).to(tl.float32)
    unknown = unknown_numbers(known_ptr, known_b, known_t, b, t, p, live, KNOWN)
    if KNOWN:
        own_alpha, own_sigma = 1.0, 0.0
        if OWN:
            own_alpha = tl.load(known_alpha_ptr + b * own_b + t * own_t).to(tl.float32)
            own_sigma = tl.load(known_sigma_ptr + b * own_b + t * own_t).to(tl.float32)
        alpha = tl.where(unknown, alpha, own_alpha)
        sigma = tl.where(unknown, sigma, own_sigma)
    wide = x.to(tl.float32)
    noisy = alpha * wide + sigma * eps
    if KNOWN and not OWN:
        noisy = tl.where(unknown, noisy, wide)
    at = b * (C * T) * HW + start + p
    tl.store(noisy_ptr + at, noisy.to(x.dtype), mask=live)
    if TARGET == "v":
        eps = alpha * eps - sigma * wide
    if TARGET == "flow":
        eps = eps - wide
    if TARGET != "none":
        tl.store(target_ptr + at, eps.to(x.dtype), mask=live)


@triton.jit(do_not_specialize=["C", "T", "blocks"])
def _square_sums(
    pred_ptr, target_ptr, known_ptr, sums_ptr, counts_ptr, C, T, HW, blocks,
    pred_b, pred_c, pred_t, target_b, target_c, target_t, known_b, known_t,
    KNOWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of squares and count of unknown numbers of every piece."""
    b, c, t, block = place(C, T, blocks)
    p = block * BLOCK + tl.arange(0, BLOCK)
    live = p < HW
    unknown = unknown_numbers(known_ptr, known_b, known_t, b, t, p, live, KNOWN)
    read = live if KNOWN == 2 else unknown  # a mask that changes inside a row splits its loads
    pred = tl.load(pred_ptr + b * pred_b + c * pred_c + t * pred_t + p, mask=read, other=0.0)
    at = target_ptr + b * target_b + c * target_c + t * target_t + p
    target = tl.load(at, mask=read, other=0.0)
    difference = tl.where(unknown, pred.to(tl.float32) - target.to(tl.float32), 0.0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(difference * difference))
    tl.store(counts_ptr + tl.program_id(0), tl.sum(unknown.to(tl.int32)))


@triton.jit(do_not_specialize=["parts", "size"])
def _mean(
    sums_ptr, counts_ptr, loss_ptr, weight_ptr, parts, size, ALL: tl.constexpr, BLOCK: tl.constexpr
):
    """Add the pieces of a sample in their order."""
    b = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int64)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        at = b * parts + part
        total += tl.load(sums_ptr + at, mask=part < parts, other=0.0)
        count += tl.load(counts_ptr + at, mask=part < parts, other=0)
    unknown = tl.sum(count).to(tl.float32)
    divisor = unknown
    if ALL:
        divisor = tl.where(unknown > 0, size * 1.0, 0.0)
    tl.store(loss_ptr + b, tl.sum(total) / divisor)  # 0 / 0: NaN where nothing is unknown
    tl.store(weight_ptr + b, 1.0 / divisor)


@triton.jit(do_not_specialize=["C", "T", "blocks"])
def _slope(
    dloss_ptr, pred_ptr, target_ptr, known_ptr, weight_ptr, dpred_ptr, C, T, HW, blocks, dloss_b,
    pred_b, pred_c, pred_t, target_b, target_c, target_t, known_b, known_t,
    KNOWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of pred: 2 * dloss * weight * (pred - target), 0 at known cells."""
    b, c, t, block = place(C, T, blocks)
    p = block * BLOCK + tl.arange(0, BLOCK)
    live = p < HW
    unknown = unknown_numbers(known_ptr, known_b, known_t, b, t, p, live, KNOWN)
    read = live if KNOWN == 2 else unknown  # a mask that changes inside a row splits its loads
    pred = tl.load(pred_ptr + b * pred_b + c * pred_c + t * pred_t + p, mask=read, other=0.0)
    at = target_ptr + b * target_b + c * target_c + t * target_t + p
    target = tl.load(at, mask=read, other=0.0)
    slope = 2.0 * tl.load(dloss_ptr + b * dloss_b) * tl.load(weight_ptr + b)
    dpred = tl.where(unknown, slope * (pred.to(tl.float32) - target.to(tl.float32)), 0.0)
    at = ((b * C + c) * T + t) * HW + p
    tl.store(dpred_ptr + at, dpred.to(pred.dtype), mask=live)


def launch_noising(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    stream: int,
    known: Tensor | None,
    known_alpha: Tensor | None,
    known_sigma: Tensor | None,
    target: str,
) -> tuple[Tensor, Tensor]:
    """Noisy latents and target ("none": empty), contiguous, in the dtype of x0."""
    _, C, T, H, W = x0.shape
    noisy = x0.new_empty(x0.shape)
    made = x0.new_empty((0,) if target == "none" else x0.shape)
    if noisy.numel() == 0:
        return noisy, made
    x0, noise = planes(x0), x0 if noise is None else planes(noise)
    own = alpha if known_alpha is None else known_alpha
    block, warps, blocks = pieces(H * W, 0 if H * W % 4 == 0 else 3)
    known, known_steps, kind = known_arguments(known, x0)
    _noising[(x0.shape[0] * C * T * blocks,)](
        x0, noise, alpha if seeds is None else seeds, alpha, sigma, known, own,
        sigma if known_sigma is None else known_sigma, noisy, made, C, T, H * W, blocks,
        *steps(x0, 3), *steps(noise, 3), *steps(alpha, 2), *known_steps, *steps(own, 2), stream,
        DRAWN=seeds is not None, KNOWN=kind, OWN=known_alpha is not None, TARGET=target,
        BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return noisy, made


def launch_mse(
    pred: Tensor, target: Tensor, known: Tensor | None, average: str
) -> tuple[Tensor, Tensor]:
    """Loss (B,) and one over each sample's divisor, float32."""
    B, C, T, H, W = pred.shape
    loss, weight = (pred.new_empty(B, dtype=torch.float32) for _ in range(2))
    if pred.numel() == 0:
        return loss.fill_(torch.nan), weight.fill_(torch.inf)
    block, warps, blocks = pieces(H * W)
    parts = C * T * blocks
    sums = pred.new_empty(B * parts, dtype=torch.float32)
    counts = pred.new_empty(B * parts, dtype=torch.int32)
    pred, target = planes(pred), planes(target)
    known, known_steps, kind = known_arguments(known, pred)
    _square_sums[(B * parts,)](
        pred, target, known, sums, counts, C, T, H * W, blocks,
        *steps(pred, 3), *steps(target, 3), *known_steps, KNOWN=kind, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    size = C * T * H * W
    _mean[(B,)](
        sums, counts, loss, weight, parts, size, ALL=average == "all", BLOCK=1024, num_warps=4
    )
    return loss, weight


def launch_mse_backward(
    dloss: Tensor, pred: Tensor, target: Tensor, known: Tensor | None, weight: Tensor
) -> Tensor:
    """The gradient of pred, contiguous, in its dtype."""
    B, C, T, H, W = pred.shape
    dpred = pred.new_empty(pred.shape)
    if dpred.numel() == 0:
        return dpred
    block, warps, blocks = pieces(H * W)
    pred, target = planes(pred), planes(target)
    known, known_steps, kind = known_arguments(known, pred)
    _slope[(B * C * T * blocks,)](
        dloss, pred, target, known, weight, dpred, C, T, H * W, blocks, *steps(dloss, 1),
        *steps(pred, 3), *steps(target, 3), *known_steps, KNOWN=kind, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return dpred


def _variant(name, kernel, constants, dtype="bf16", HW=4096):
    """A call on latents of HW numbers a plane."""
    block, warps, _ = pieces(HW)
    pointers = dict.fromkeys(("x0_ptr", "noise_ptr", "noisy_ptr", "pred_ptr", "dpred_ptr"), dtype)
    pointers |= dict.fromkeys(("target_ptr",), dtype)
    pointers |= {"seeds_ptr": "i64", "known_ptr": "u8", "counts_ptr": "i32"}
    levels = ("alpha_ptr", "sigma_ptr", "known_alpha_ptr", "known_sigma_ptr")
    sums = ("sums_ptr", "loss_ptr", "weight_ptr", "dloss_ptr")
    pointers |= dict.fromkeys((*levels, *sums), "fp32")
    types = {name: f"*{dtype}:16" for name, dtype in pointers.items()}
    types |= {
        f"{name}_{axis}": "i32:16" for name in ("x0", "noise", "pred", "target") for axis in "bct"
    }
    types |= {f"{name}_{axis}": "i32" for name in ("level", "own") for axis in "bt"}
    types |= {"known_b": "i32:16", "known_t": "i32:16", "dloss_b": "i32", "HW": "i32:16"}
    types |= dict.fromkeys(("C", "T", "blocks", "stream", "parts", "size"), "i32")
    return Variant(name, kernel, types, {"BLOCK": block} | constants, warps)


def _drawn(known=FRAMES, target="v", own=False):
    return {"DRAWN": True, "KNOWN": known, "OWN": own, "TARGET": target}


_GIVEN = {"DRAWN": False}

# VDT (16 x 16 and 32 x 32 latents, noise prediction) and MarDini (64 x 64, v); flow for Pyramid.
VARIANTS = [
    _variant("given_v_frames", _noising, _drawn() | _GIVEN),
    _variant("given_none_cells_256", _noising, _drawn(CELLS, "none") | _GIVEN, "fp32", 256),
    _variant("drawn_v_frames", _noising, _drawn()),
    _variant("drawn_v_frames_fp32", _noising, _drawn(), "fp32"),
    _variant("drawn_eps_cells_256", _noising, _drawn(CELLS, "eps"), "fp32", 256),
    _variant("drawn_flow_own_level", _noising, _drawn(FRAMES, "flow", True)),
    _variant("square_sums_frames", _square_sums, {"KNOWN": FRAMES}),
    _variant("square_sums_cells_fp32", _square_sums, {"KNOWN": CELLS}, "fp32", 1024),
    _variant("mean", _mean, {"ALL": False}),
    _variant("slope_frames", _slope, {"KNOWN": FRAMES}),
    _variant("slope_cells_fp32", _slope, {"KNOWN": CELLS}, "fp32", 1024),
]  # fmt: skip
