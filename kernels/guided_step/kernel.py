"""The Triton kernel of `guided_step` and its launcher.

A program takes a piece of one (H, W) plane (`_shared/planes_kernel.py`), as do those of `noising`,
so that noise is drawn by number: blocks start at multiples of four numbers of the sample.
"""

import triton
import triton.language as tl
from torch import Tensor

from .._shared.philox_kernel import normals
from .._shared.planes import pieces, planes, steps
from .._shared.planes_kernel import CELLS, FRAMES, NONE, known_arguments, place, unknown_numbers
from .._shared.variants import Variant
from .reference import COLUMNS


@triton.jit(do_not_specialize=["C", "T", "blocks", "stream", "rows"])
def _guided_step(
    x_ptr, prediction_ptr, table_ptr, step_ptr, known_ptr, clean_ptr, noise_ptr, seeds_ptr, out_ptr,
    first_scale, second_scale, clip, C, T, HW, blocks, rows, stream, x_b, x_c, x_t,
    prediction_g, prediction_b, prediction_c, prediction_t, clean_b, clean_c, clean_t,
    noise_b, noise_c, noise_t, known_b, known_t, COLUMNS: tl.constexpr, BRANCHES: tl.constexpr,
    CLIP: tl.constexpr, KNOWN: tl.constexpr, NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, c, t, block = place(C, T, blocks)
    start = (c * T + t) * HW  # of the plane in its sample
    first = start // 4 * 4 + block * BLOCK
    p = first - start + tl.arange(0, BLOCK)  # in the plane; starts below 0 where 4 straddle planes
    live = (p >= 0) & (p < HW)

    row = tl.load(step_ptr)
    row = tl.minimum(tl.maximum(row, 0), rows - 1)
    coefficients = table_ptr + row * COLUMNS
    x0_of_x = tl.load(coefficients)
    x0_of_prediction = tl.load(coefficients + 1)
    of_x0 = tl.load(coefficients + 2)
    of_x = tl.load(coefficients + 3)
    of_noise = tl.load(coefficients + 4)

    unknown = unknown_numbers(known_ptr, known_b, known_t, b, t, p, live, KNOWN)
    read = live if KNOWN == 2 else unknown  # a mask that changes inside a row splits its loads
    old = tl.load(x_ptr + b * x_b + c * x_c + t * x_t + p, mask=read, other=0.0)
    x = old.to(tl.float32)
    at = prediction_ptr + b * prediction_b + c * prediction_c + t * prediction_t + p
    predicted = tl.load(at, mask=read, other=0.0).to(tl.float32)
    if BRANCHES > 1:
        after = tl.load(at + prediction_g, mask=read, other=0.0).to(tl.float32)
        predicted += first_scale * (after - predicted)
        if BRANCHES > 2:
            at = at + prediction_g + prediction_g  # 2 * prediction_g may not fit 32 bits
            last = tl.load(at, mask=read, other=0.0).to(tl.float32)
            predicted += second_scale * (last - after)
    if CLIP:
        x0 = x0_of_x * x + x0_of_prediction * predicted
        x0 = tl.minimum(tl.maximum(x0, -clip, tl.PropagateNan.ALL), clip, tl.PropagateNan.ALL)
        following = of_x0 * x0 + of_x * x
    else:  # without x0, which may be large and cancel
        following = (of_x + of_x0 * x0_of_x) * x + of_x0 * x0_of_prediction * predicted
    if NOISE == "given":
        at = noise_ptr + b * noise_b + c * noise_c + t * noise_t + p
        counts = of_noise.to(tl.int32, bitcast=True) != 0  # NaN times 0 would be NaN
        eps = tl.load(at, mask=read & counts, other=0.0).to(tl.float32)
        following += of_noise * eps
    if NOISE == "drawn":
        index = first // 4 + tl.arange(0, BLOCK // 4).to(tl.int64)
        n0, n1, n2, n3 = normals(tl.load(seeds_ptr + b), index, stream + row)
        following += of_noise * tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
    new = following.to(old.dtype)
    if KNOWN:
        at = clean_ptr + b * clean_b + c * clean_c + t * clean_t + p
        new = tl.where(unknown, new, tl.load(at, mask=live & (unknown == 0), other=0.0))
    tl.store(out_ptr + b * (C * T) * HW + start + p, new, mask=live)


def launch_guided_step(
    x: Tensor,
    prediction: Tensor,
    table: Tensor,
    step: Tensor,
    scales: list[float],
    clip: float | None,
    known: Tensor | None,
    clean: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    stream: int,
    out: Tensor,
) -> None:
    """Write the next state to `out`, contiguous, which may be `x`."""
    B, C, T, H, W = x.shape
    if out.numel() == 0:
        return
    block, warps, blocks = pieces(H * W, 0 if H * W % 4 == 0 else 3)
    known, known_steps, kind = known_arguments(known, x)
    x, prediction = planes(x), planes(prediction)
    clean = x if clean is None else planes(clean)
    given = "given" if noise is not None else "none" if seeds is None else "drawn"
    noise = x if noise is None else planes(noise)
    branch, *prediction_steps = (B * prediction.stride(0), *steps(prediction, 3))
    first, second = (*scales, 0.0, 0.0)[:2]
    _guided_step[(B * C * T * blocks,)](
        x, prediction, table, step, known, clean, noise, step if seeds is None else seeds, out,
        first, second, 0.0 if clip is None else clip, C, T, H * W, blocks, len(table), stream,
        *steps(x, 3), branch, *prediction_steps, *steps(clean, 3), *steps(noise, 3), *known_steps,
        COLUMNS=COLUMNS, BRANCHES=len(scales) + 1, CLIP=clip is not None, KNOWN=kind, NOISE=given,
        BLOCK=block, num_warps=warps,
    )  # fmt: skip


def _variant(name, branches, known=NONE, noise="none", clip=False, predicted="bf16", HW=4096):
    """A call on float32 states of HW numbers a plane."""
    block, warps, _ = pieces(HW)
    pointers = dict.fromkeys(("x", "clean", "noise", "out", "table"), "fp32")
    pointers |= {"prediction": predicted, "step": "i64", "seeds": "i64", "known": "u8"}
    types = {f"{name}_ptr": f"*{dtype}:16" for name, dtype in pointers.items()}
    types |= dict.fromkeys(("first_scale", "second_scale", "clip"), "fp32")
    types |= dict.fromkeys(("C", "T", "blocks", "rows", "stream"), "i32")
    axes = {"x": "bct", "prediction": "gbct", "clean": "bct", "noise": "bct", "known": "bt"}
    types |= {f"{name}_{axis}": "i32:16" for name in axes for axis in axes[name]} | {"HW": "i32:16"}
    constants = {"COLUMNS": COLUMNS, "BRANCHES": branches, "CLIP": clip, "KNOWN": known}
    return Variant(name, _guided_step, types, constants | {"NOISE": noise, "BLOCK": block}, warps)


# VDT (16 x 16 and 32 x 32 latents, no guidance or two branches), MarDini (64 x 64, v), stickers.
VARIANTS = [
    _variant("plain", 1),
    _variant("plain_frames_fp32_256", 1, FRAMES, predicted="fp32", HW=256),
    _variant("two_branches", 2),
    _variant("two_branches_frames", 2, FRAMES),
    _variant("two_branches_cells_clip", 2, CELLS, clip=True, predicted="fp32"),
    _variant("two_branches_given_noise_clip", 2, FRAMES, "given", clip=True, HW=1024),
    _variant("two_branches_drawn_noise", 2, FRAMES, "drawn"),
    _variant("three_branches", 3),
]
